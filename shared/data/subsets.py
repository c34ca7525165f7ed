"""Small subsets of labelled samples: balanced, nested, and a function of the seed."""

import numpy as np

from shared.data.randomness import derive_seed, shuffled_indices


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
