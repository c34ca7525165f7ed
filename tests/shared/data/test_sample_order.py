"""The order of samples: each once an epoch, the same on any number of processes, found anywhere at once."""

import collections
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.sample_order import SMALLEST_SHARE, mixture_sources, positions_of_update, samples_of_update

BLOCK = 4096
Sample = tuple[int, int, int]


def update(
    step: int,
    sizes: list[int],
    weights: list[float],
    *,
    seed: int = 0,
    global_batch_size: int,
    num_processes: int = 1,
) -> list[Sample]:
    """The samples of an update, those of all processes one after the other."""
    return [
        sample
        for rank in range(num_processes)
        for sample in samples_of_update(
            step,
            sizes,
            weights,
            seed=seed,
            global_batch_size=global_batch_size,
            rank=rank,
            num_processes=num_processes,
        )
    ]


sizes_and_weights = st.lists(st.tuples(st.integers(1, 400), st.floats(0.05, 10)), min_size=1, max_size=4).map(
    lambda pairs: ([size for size, _ in pairs], [weight for _, weight in pairs])
)


@settings(max_examples=100, deadline=None)
@given(
    sizes_and_weights,
    st.integers(0, 2**40),
    st.integers(1, 8),
    st.integers(1, 6),
    st.integers(0, 10**6),
    st.integers(1, 5),
)
def test_an_update_is_the_same_on_any_number_of_processes(
    sources: tuple[list[int], list[float]], seed: int, processes: int, share: int, step: int, updates: int
) -> None:
    batch = processes * share
    for at in range(step, step + updates):
        alone = update(at, *sources, seed=seed, global_batch_size=batch)
        assert update(at, *sources, seed=seed, global_batch_size=batch, num_processes=processes) == alone
        assert len(alone) == batch


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(0, 2**40), st.integers(1, 3))
def test_each_epoch_visits_each_row_once(size: int, batch: int, seed: int, epochs: int) -> None:
    updates = -(-size * epochs // batch)
    samples = [
        sample for step in range(updates) for sample in update(step, [size], [1.0], seed=seed, global_batch_size=batch)
    ]
    for epoch in range(epochs):
        visited = samples[epoch * size : (epoch + 1) * size]
        assert sorted(visited) == [(0, epoch, index) for index in range(size)]


@settings(max_examples=40, deadline=None)
@given(sizes_and_weights, st.integers(1, 64), st.lists(st.integers(1, 20), min_size=1, max_size=5), st.data())
def test_any_number_of_stops_leaves_no_gap_and_repeats_nothing(
    sources: tuple[list[int], list[float]], batch: int, stops: list[int], data: st.DataObject
) -> None:
    sizes, weights = sources
    samples, step = [], 0
    for length in stops:  # after each stop the run goes on with another number of processes
        processes = data.draw(st.sampled_from([count for count in range(1, 9) if batch % count == 0]))
        for at in range(step, step + length):
            samples += update(at, sizes, weights, global_batch_size=batch, num_processes=processes)
        step += length
    assert len(set(samples)) == len(samples) == step * batch
    for source, size in enumerate(sizes):
        number = collections.Counter(epoch for found, epoch, _ in samples if found == source)
        epochs = range(len(number))
        assert [number[epoch] for epoch in epochs[:-1]] == [size] * len(epochs[:-1])


def test_epochs_and_seeds_have_different_orders() -> None:
    epochs = [tuple(i for _, _, i in update(step, [100], [1.0], global_batch_size=100)) for step in range(20)]
    seeds = [tuple(i for _, _, i in update(0, [100], [1.0], seed=s, global_batch_size=100)) for s in range(20)]
    sources = [tuple(i for s, _, i in update(0, [50, 50], [1, 1], global_batch_size=BLOCK) if s == n) for n in (0, 1)]
    assert len({*epochs, *seeds}) == 39  # epoch 0 of seed 0 is in both
    assert sources[0][:50] != sources[1][:50]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=6), st.integers(0, 2**40), st.integers(0, 10**9))
def test_each_block_holds_the_exact_shares(weights: list[float], seed: int, block: int) -> None:
    """A block is as large as the smallest source needs to have sixteen samples of it."""
    size = BLOCK
    while size * min(weights) / sum(weights) < 16:
        size *= 2
    sources, _ = mixture_sources(block * size + np.arange(size), weights, seed)
    exact = np.array(weights) / sum(weights) * size
    counts = np.bincount(sources, minlength=len(weights))
    assert counts.sum() == size
    assert np.abs(counts - exact).max() < 1
    first, _ = mixture_sources(np.arange(size), weights, seed)
    assert counts.tolist() == np.bincount(first, minlength=len(weights)).tolist()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda weights: sum(weights) > 0.01), st.integers(0, 99)
)
def test_the_running_numbers_of_each_source_have_no_gap_and_no_repeat(weights: list[float], seed: int) -> None:
    sources, numbers = mixture_sources(np.arange(3 * BLOCK), weights, seed)
    for source in range(len(weights)):
        assert numbers[sources == source].tolist() == list(range(np.sum(sources == source)))


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=30))
def test_a_position_does_not_depend_on_what_is_asked_with_it(positions: list[int]) -> None:
    weights = [0.5, 0.3, 0.2]
    sources, numbers = mixture_sources(np.array(positions), weights, 7)
    for position, source, number in zip(positions, sources, numbers, strict=True):
        alone = mixture_sources(np.array([position]), weights, 7)
        assert (source, number) == (alone[0][0], alone[1][0])


def test_sources_are_mixed_within_a_block() -> None:
    sources, _ = mixture_sources(np.arange(BLOCK), [0.5, 0.5], 0)
    assert abs(sources[: BLOCK // 2].mean() - 0.5) < 0.05
    assert np.sum(sources[1:] == sources[:-1]) < 0.6 * BLOCK


def test_positions_of_an_update() -> None:
    assert positions_of_update(3, 8, 1, 2).tolist() == [28, 29, 30, 31]


@pytest.mark.parametrize("step", [0, 10**9])
def test_any_update_is_found_at_once(step: int) -> None:
    options = {"global_batch_size": 512, "num_processes": 8}
    update(step, [10**9 + 7, 12345], [0.9, 0.1], **options)
    started = time.process_time()
    samples = update(step, [10**9 + 7, 12345], [0.9, 0.1], **options)
    assert time.process_time() - started < 1.0
    assert all(0 <= index < (10**9 + 7, 12345)[source] for source, _, index in samples)


def test_the_order_never_changes() -> None:
    # A run resumed with a newer version must go on with the same data.
    pinned = [(0, 0, 33), (1, 1, 1), (0, 0, 13), (0, 0, 12), (0, 0, 68), (0, 0, 45)]
    assert update(5, [100, 10], [2, 1], seed=3, global_batch_size=6) == pinned


@pytest.mark.parametrize("share", [0.3, 1e-2, 1e-3, 1e-4, 1e-5, SMALLEST_SHARE])
def test_a_small_source_has_its_share(share: float) -> None:
    """Of 4,096 samples one of a ten-thousandth would have none, in every block."""
    size = 2**20 if share < 1e-3 else 2**16
    sources, numbers = mixture_sources(np.arange(size), [1 - share, share], 3)
    count = int((sources == 1).sum())
    assert count == pytest.approx(size * share, rel=0.04, abs=0.5)
    assert numbers[sources == 1].tolist() == list(range(count))
    first, last = (
        mixture_sources(np.arange(5), [1 - share, share], 3),
        mixture_sources(np.arange(2), [1 - share, share], 3),
    )
    assert all((one[:2] == other).all() for one, other in zip(first, last, strict=True))
