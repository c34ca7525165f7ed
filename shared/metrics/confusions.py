"""Which classes a classifier takes for others."""

from collections.abc import Sequence

import numpy as np

_NUM_DESCRIBED = 16


def count_confusions(labels: np.ndarray, guesses: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each class (rows) was taken for each (columns), int64 (C, C), from int64 (N,) of both."""
    return np.bincount(labels * num_classes + guesses, minlength=num_classes**2).reshape(num_classes, num_classes)


def describe_confusions(labels: np.ndarray, guesses: np.ndarray, class_names: Sequence[str]) -> str:
    """The pairs of classes that are confused most often, a line each, from int64 (N,) of both."""
    counts = count_confusions(labels, guesses, len(class_names))
    totals = counts.sum(1)
    np.fill_diagonal(counts, 0)
    most = np.argsort(-counts, axis=None, kind="stable")[:_NUM_DESCRIBED].tolist()
    pairs = [divmod(place, len(class_names)) for place in most if counts.flat[place]]
    lines = [f"{class_names[a]} taken for {class_names[b]}: {counts[a, b]} of {totals[a]}" for a, b in pairs]
    return "\n".join(lines) or "no mistake"
