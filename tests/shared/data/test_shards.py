"""Shards are dealt so that every process comes to the end of a pass after as many records, and none comes twice."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.data.shards import deal_records, shares_of, start_of_stream


@given(st.integers(1, 40), st.integers(1, 40))
def test_each_part_is_read_by_one_process(number: int, processes: int) -> None:
    order = list(range(number))[::-1]
    shares = [shares_of(rank, processes, order) for rank in range(processes)]
    parts = Counter((shard, part) for share in shares for shard, of_it in share for part in of_it)
    assert parts == Counter(itertools.product(order, range(processes)))
    for share in shares:
        assert sum(len(of_it) for _, of_it in share) == number  # parts of 1 / processes of a shard
        assert number < processes or len(share) <= number // processes + 2  # that are opened


@pytest.mark.parametrize(("number", "processes"), [(15, 8), (100, 64), (3, 1024), (257, 256)])
def test_a_pass_of_all_together_sees_everything_once(number: int, processes: int) -> None:
    """Each process took as many records; before, 15 shards on 8 processes left 6 % unseen, 100 on 64 16 %."""
    of_a_shard = 2 * processes
    shards = [range(shard * of_a_shard, (shard + 1) * of_a_shard) for shard in range(number)]
    seen: Counter[int] = Counter()
    for rank in range(processes):
        dealt = deal_records(shards, 0, rank, start_of_stream(processes))
        seen.update(record for record, _ in itertools.islice(dealt, 2 * number))
    assert seen == Counter(range(number * of_a_shard))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(1, 12))
def test_shards_of_any_length_are_read_once_and_none_starves(lengths: list[int], processes: int) -> None:
    """Each process finds a record where one of fewer shards has as many as processes, or where it has whole shards."""
    shards = [[(shard, number) for number in range(length)] for shard, length in enumerate(lengths)]
    if (len(shards) < processes and max(lengths) < processes) or not any(shards):
        return
    seen: Counter[tuple[int, int]] = Counter()
    for rank in range(processes):
        dealt = deal_records(shards, 0, rank, start_of_stream(processes))
        seen.update(record for record, state in itertools.takewhile(lambda pair: pair[1]["epoch"] == 0, dealt))
    assert seen == Counter(itertools.chain.from_iterable(shards))
