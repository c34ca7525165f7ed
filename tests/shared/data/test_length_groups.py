"""The order of updates whose samples have about the same length."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.length_groups import WINDOW_UPDATES, samples_of_update


def update(step: int, lengths: tuple[int, ...], batch: int, seed: int = 0, processes: int = 1) -> list[tuple[int, int]]:
    shares = [
        samples_of_update(step, lengths, seed=seed, global_batch_size=batch, rank=rank, num_processes=processes)
        for rank in range(processes)
    ]
    assert len(set(map(len, shares))) == 1
    return [sample for share in shares for sample in share]


@given(st.integers(1, 60), st.sampled_from([1, 2, 4, 8]), st.integers(0, 99))
@settings(deadline=None)
def test_every_epoch_has_every_sample_once(number: int, batch: int, seed: int) -> None:
    lengths = tuple(random.Random(seed).randint(1, 40) for _ in range(number))
    steps = range(WINDOW_UPDATES * 3)
    seen = Counter(sample for step in steps for sample in update(step, lengths, batch, seed))
    assert set(seen.values()) == {1}
    last = max(epoch for epoch, _ in seen)
    for epoch in range(last):
        assert {index for of_epoch, index in seen if of_epoch == epoch} == set(range(number))


@given(st.integers(0, 40), st.sampled_from([1, 2, 4]))
@settings(deadline=None)
def test_an_update_does_not_depend_on_the_processes(step: int, processes: int) -> None:
    lengths = tuple(range(50))
    assert update(step, lengths, 8, processes=processes) == update(step, lengths, 8)
    assert update(step, lengths, 8, seed=1) != update(step, lengths, 8)


def test_little_is_padded_and_updates_come_in_no_order_of_length() -> None:
    draw = random.Random(0)
    lengths = tuple(draw.randint(4, 128) for _ in range(4000))
    longest = []
    padded = total = 0
    for step in range(64):
        own = [lengths[index] for _, index in update(step, lengths, 32)]
        longest.append(max(own))
        padded, total = padded + 32 * max(own), total + sum(own)
    assert total / padded > 0.9  # of batches in random order 0.53
    assert longest[:16] != sorted(longest[:16])
