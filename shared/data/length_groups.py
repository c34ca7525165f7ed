"""Samples of about the same length share an update, so that little is padded: a function of (seed, step)."""

import functools

import numpy as np

from shared.data.randomness import derive_seed, shuffled_indices
from shared.data.sample_order import samples_at

WINDOW_UPDATES = 16  # whose samples are sorted by length together; more would pad less and mix less


def samples_of_update(
    step: int, lengths: tuple[int, ...], *, seed: int, global_batch_size: int, rank: int, num_processes: int
) -> list[tuple[int, int]]:
    """The samples of update `step` on process `rank`, as (epoch, index).

    All updates walk one endless order in which each epoch is shuffled anew; `WINDOW_UPDATES` whole updates at a time
    are sorted by length and then shuffled. So an epoch holds every sample once, its end may share an update with the
    next one's beginning, and processes, which take equal, adjacent shares, never change what an update sees.

    Args:
        step: number of the update, from 0.
        lengths: of all samples.
        seed: of the order.
        global_batch_size: samples of one update, a multiple of `num_processes`.
        rank: this process.
        num_processes: processes in all.
    """
    window, place = divmod(step, WINDOW_UPDATES)
    share = global_batch_size // num_processes
    return _window(window, lengths, seed, global_batch_size)[place][rank * share : (rank + 1) * share]


@functools.lru_cache(maxsize=2)  # an update needs one, the next one the same
def _window(window: int, lengths: tuple[int, ...], seed: int, global_batch_size: int) -> list[list[tuple[int, int]]]:
    """The samples of each update of a window."""
    number = WINDOW_UPDATES * global_batch_size
    positions = window * number + np.arange(number, dtype=np.int64)
    drawn = [(epoch, index) for _, epoch, index in samples_at(positions, [len(lengths)], [1.0], seed)]
    by_length = sorted(drawn, key=lambda sample: lengths[sample[1]])
    updates = [by_length[first : first + global_batch_size] for first in range(0, number, global_batch_size)]
    order = shuffled_indices(np.arange(WINDOW_UPDATES), WINDOW_UPDATES, derive_seed(seed, "updates", window))
    return [updates[place] for place in order.tolist()]
