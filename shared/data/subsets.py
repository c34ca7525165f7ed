"""Subsets of samples, a function of a seed: few for training, those held out of it, and those of them evaluated."""

import numpy as np

from shared.data.randomness import derive_seed, shuffled_indices

_HELD_OUT_SEED = 0  # so that runs of any seed are evaluated on the same samples


def few_of_each(labels: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Positions of so many samples of each class, all where there are fewer; those of fewer are among those of more.

    Args:
        labels: int64 (N,), the class of each sample.
        number: of each class.
        seed: of the choice.

    Returns:
        int64, sorted.
    """
    chosen = []
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        order = shuffled_indices(np.arange(len(members)), len(members), derive_seed(seed, "few labels", label))
        chosen.append(members[order[:number]])
    return np.sort(np.concatenate(chosen))


def held_out_of_each(labels: np.ndarray, fraction: float) -> np.ndarray:
    """Which samples are held out, bool (N,): this share of each class, the same at every call and for every seed.

    Training and evaluation get at least one of each class of two samples or more; of a class of one, training does.

    Args:
        labels: int64 (N,), the class of each sample.
        fraction: of each class.
    """
    is_held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels).tolist():
        members = np.flatnonzero(labels == label)
        number = min(max(round(fraction * len(members)), 1), len(members) - 1)
        seed = derive_seed(_HELD_OUT_SEED, "held out", label)
        is_held_out[members[shuffled_indices(np.arange(number), len(members), seed)]] = True
    return is_held_out


def fixed_choice(number: int, most: int) -> np.ndarray:
    """Positions of at most `most` of so many samples, 0 = all, the same at every call and for every seed.

    They are drawn, so samples that are sorted by class give all classes; those of fewer are among those of more.

    Args:
        number: of the samples.
        most: that are taken.

    Returns:
        int64, sorted.
    """
    if not 0 < most < number:
        return np.arange(number)
    return np.sort(shuffled_indices(np.arange(most), number, derive_seed(_HELD_OUT_SEED, "evaluated")))
