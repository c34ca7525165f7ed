"""Which classes a classifier takes for others."""

from collections.abc import Sequence

import numpy as np

_NUM_DESCRIBED = 16


def count_confusions(labels: np.ndarray, guesses: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each class (rows) was taken for each (columns), int64 (C, C), from int64 (N,) of both."""
    return np.bincount(labels * num_classes + guesses, minlength=num_classes**2).reshape(num_classes, num_classes)


def describe_confusions(labels: np.ndarray, guesses: np.ndarray, class_names: Sequence[str]) -> str:
    """The pairs of classes that are confused most often, a line each, from int64 (N,) of both.

    Memory grows with N, not with the square of the classes.
    """
    totals = np.bincount(labels, minlength=len(class_names))
    is_wrong = labels != guesses
    pairs, counts = np.unique(np.stack([labels[is_wrong], guesses[is_wrong]], axis=1), axis=0, return_counts=True)
    most = np.argsort(-counts, kind="stable")[:_NUM_DESCRIBED].tolist()
    found = [(*pairs[place].tolist(), counts[place]) for place in most]
    lines = [f"{class_names[a]} taken for {class_names[b]}: {number} of {totals[a]}" for a, b, number in found]
    return "\n".join(lines) or "no mistake"
