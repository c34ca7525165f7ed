"""Which samples update t sees: a pure function of (seed, t), found in constant time, on any number of processes."""

import functools
from collections.abc import Sequence

import numpy as np

from shared.data.randomness import derive_seed, shuffled_indices

SMALLEST_SHARE = 2.0**-20  # of a source that a mixture can have
_BLOCK, _LEAST_OF_SOURCE = 4096, 16  # samples of a block, and how many of each source it has at least where it may grow


def samples_of_update(
    step: int,
    sizes: list[int],
    weights: list[float],
    *,
    seed: int,
    global_batch_size: int,
    rank: int,
    num_processes: int,
) -> list[tuple[int, int, int]]:
    """The samples of update `step` on process `rank`.

    All updates together walk one endless order that depends on the seed alone: sample n comes from a source in
    proportion to its weight, and each source is shuffled anew every epoch. Processes take equal, adjacent shares of
    an update's samples, so their number never changes what the update sees.

    Args:
        step: number of the update, from 0.
        sizes: samples of each source.
        weights: share of each source; they need not sum to 1.
        seed: of the whole order.
        global_batch_size: samples of one update, a multiple of `num_processes`.
        rank: this process.
        num_processes: processes in all.

    Returns:
        (source, epoch of that source, index in that source) of each sample.
    """
    return samples_at(positions_of_update(step, global_batch_size, rank, num_processes), sizes, weights, seed)


def samples_at(positions: np.ndarray, sizes: list[int], weights: list[float], seed: int) -> list[tuple[int, int, int]]:
    """The samples at the given places of that endless order, as (source, epoch of that source, index in that source).

    Args:
        positions: int64 (N,).
        sizes: samples of each source.
        weights: share of each source; they need not sum to 1.
        seed: of the whole order.
    """
    sources, numbers = mixture_sources(positions, weights, seed)
    epochs, indices = np.divmod(numbers, np.array(sizes)[sources])
    for source, epoch in set(zip(sources.tolist(), epochs.tolist(), strict=True)):
        same = (sources == source) & (epochs == epoch)
        order_seed = derive_seed(seed, "order", source, epoch)
        indices[same] = shuffled_indices(indices[same], sizes[source], order_seed)
    return list(zip(sources.tolist(), epochs.tolist(), indices.tolist(), strict=True))


def positions_of_update(step: int, global_batch_size: int, rank: int, num_processes: int) -> np.ndarray:
    """Where the samples of update `step` on process `rank` stand in the endless order, int64."""
    share = global_batch_size // num_processes
    return step * global_batch_size + rank * share + np.arange(share, dtype=np.int64)


def mixture_sources(positions: np.ndarray, weights: list[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which source each sample of a weighted mixture comes from, and its running number within that source.

    Samples are dealt in blocks of 4,096, or where a source would have fewer than 16 of them of 8,192 and so on up to
    about a million, that hold each source's share exactly (rounded to one sample, the rounding going to the largest
    remainders) in an order of their own, so any position is found without walking there.

    Args:
        positions: int64 (N,), sample numbers.
        weights: one share a source, at least `SMALLEST_SHARE` of their sum, which need not be 1.
        seed: another seed gives another order within the blocks.

    Returns:
        sources: int64 (N,), index into `weights`.
        numbers: int64 (N,), how many samples of that source come before this one.
    """
    sources, numbers = np.empty_like(positions), np.empty_like(positions)
    size = _block_size(weights)
    blocks, places = np.divmod(positions, size)
    for block in np.unique(blocks).tolist():
        dealt, before = _mixture_block(block, size, tuple(weights), seed)
        inside = blocks == block
        sources[inside], numbers[inside] = dealt[places[inside]], before[places[inside]]
    return sources, numbers


@functools.lru_cache(maxsize=2)  # an update needs one or two blocks, thousands of updates in a row the same
def _mixture_block(block: int, size: int, weights: tuple[float, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    exact = np.array(weights) / np.sum(weights) * size
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: size - quotas.sum()]] += 1
    order = shuffled_indices(np.arange(size), size, derive_seed(seed, "mixture", block))
    dealt = np.repeat(np.arange(len(weights)), quotas)[order]
    before = np.empty(size, dtype=np.int64)
    for source, quota in enumerate(quotas.tolist()):
        before[dealt == source] = block * quota + np.arange(quota)
    return dealt, before


def _block_size(weights: Sequence[float]) -> int:
    size, smallest = _BLOCK, min(weight for weight in weights if weight) / sum(weights)
    while size * smallest < _LEAST_OF_SOURCE and size * SMALLEST_SHARE < 1:
        size *= 2
    return size
