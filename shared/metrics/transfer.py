"""What a start is worth: differences of two arms of an experiment, paired by seed, and in labels."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shared.data.randomness import derive_seed

LEVEL = 0.95
DRAWS = 10_000


class Interval(NamedTuple):
    """An estimate and the bounds of its interval at 95 %."""

    mean: float
    low: float
    high: float


class Worth(NamedTuple):
    """How many times the labels one arm needs for the score of another, and the middle 95 % over draws of the seeds.

    Infinite = more than the most at which it was measured, 0 = fewer than the least.
    """

    factor: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of a few values and Student's interval, which is wide where they are few; of one value without bounds."""
    from scipy import stats

    mean, number = float(np.mean(values)), len(values)
    if number < 2:
        return Interval(mean, -math.inf, math.inf)
    half = stats.t.ppf((1 + LEVEL) / 2, number - 1) * float(np.std(values, ddof=1)) / math.sqrt(number)
    return Interval(mean, mean - half, mean + half)


def paired_bootstrap(one: np.ndarray, other: np.ndarray, seed: int = 0) -> Interval:
    """Difference of two accuracies, its interval over test items, which are drawn anew for all runs together.

    Args:
        one: bool (S, N), whether each of S runs was right about each of N items.
        other: the same of the arm that is subtracted; runs of one seed stand in one row.
        seed: of the draws.
    """
    by_item = (one.astype(float) - other.astype(float)).mean(0)
    draw = np.random.Generator(np.random.Philox(key=derive_seed(seed, "bootstrap")))
    means = [by_item[draw.integers(len(by_item), size=len(by_item))].mean() for _ in range(DRAWS)]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(by_item.mean()), float(low), float(high))


def labels_worth(
    labels: Sequence[float], scores: np.ndarray, place: int, scores_there: Sequence[float], seed: int = 0
) -> Worth:
    """Labels that a baseline needs for the score that another arm has with fewer (Hernandez et al. 2021).

    Between two numbers of labels the baseline's mean score, which is taken never to fall, is drawn straight over their
    logarithm. For the bounds seeds are drawn anew, with those of the other arm; of few seeds they are too narrow.

    Args:
        labels: numbers of labels at which the baseline was measured, rising.
        scores: of the baseline (len(labels), S), of S seeds.
        place: in `labels`, of the number that the other arm had.
        scores_there: of the other arm (S,).
        seed: of the draws.
    """
    chosen = np.arange(scores.shape[1])
    needed = _needed(labels, scores.mean(1), float(np.mean(scores_there)))
    draw = np.random.Generator(np.random.Philox(key=derive_seed(seed, "bootstrap of seeds")))
    factors = []
    for _ in range(DRAWS // 10):
        drawn = draw.choice(chosen, size=len(chosen))
        factors.append(_needed(labels, scores[:, drawn].mean(1), float(np.mean(np.array(scores_there)[drawn]))))
    bounds = np.quantile(factors, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")  # of which some are infinite
    low, high = (bounds / labels[place]).tolist()
    return Worth(needed / labels[place], low, high)


def _needed(labels: Sequence[float], curve: np.ndarray, score: float) -> float:
    """The number of labels at which a curve reaches a score; infinite if it ends below it, 0 if it begins above."""
    rising = np.maximum.accumulate(curve)
    if score > rising[-1]:
        return math.inf
    above = int(np.argmax(rising >= score))
    if above == 0:
        return float(labels[0]) if score == rising[0] else 0.0
    share = (score - rising[above - 1]) / (rising[above] - rising[above - 1])
    few, many = math.log(labels[above - 1]), math.log(labels[above])
    return math.exp(few + share * (many - few))
