import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from shared.metrics.transfer import labels_worth, paired_bootstrap, t_interval

LABELS = [2, 5, 10, 25, 100, 460]


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=8))
@settings(deadline=None)
def test_the_interval_is_student_s(values: list[float]) -> None:
    found, spread = t_interval(values), stats.sem(values)
    low, high = np.mean(values), np.mean(values)
    if spread > 1e-12:
        low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), spread)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_one_value_has_no_bounds() -> None:
    assert t_interval([0.3]) == (0.3, -math.inf, math.inf)


def test_the_bootstrap_over_items_is_about_as_wide_as_theory_says() -> None:
    """For one run of each arm the difference is a mean of N values of -1, 0 and 1."""
    draw = np.random.default_rng(0)
    one, other = draw.random((1, 2000)) < 0.6, draw.random((1, 2000)) < 0.5
    found = paired_bootstrap(one, other)
    difference = one.astype(int) - other.astype(int)
    half = 1.96 * difference.std() / math.sqrt(2000)
    assert found.mean == pytest.approx(difference.mean())
    assert found.high - found.mean == pytest.approx(half, rel=0.05)
    assert found.mean - found.low == pytest.approx(half, rel=0.05)
    assert paired_bootstrap(one, one) == (0, 0, 0)


@given(st.floats(1.0, 8.0), st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_an_arm_that_has_the_score_of_n_times_the_labels_is_worth_n(factor: float, place: int) -> None:
    """Where scores are straight over the logarithm of the labels, interpolation is exact."""
    spread = np.linspace(-0.01, 0.01, 5)
    curve = np.array([0.1 * math.log(number) + spread for number in LABELS])
    factor = min(factor, LABELS[-1] / LABELS[place])
    worth = labels_worth(LABELS, curve, place, (0.1 * math.log(factor * LABELS[place]) + spread).tolist())
    assert worth.factor == pytest.approx(factor, rel=1e-6)
    assert worth.low == pytest.approx(factor, rel=1e-6)  # both arms share what the seeds do


def test_a_score_beyond_the_curve_is_worth_more_or_less_than_it_shows() -> None:
    curve = np.array([[0.1, 0.1], [0.2, 0.2], [0.15, 0.15]])
    assert labels_worth([2, 5, 10], curve, 1, [0.3, 0.3]) == (math.inf, math.inf, math.inf)
    assert labels_worth([2, 5, 10], curve, 1, [0.05, 0.05]) == (0, 0, 0)
    assert labels_worth([2, 5, 10], curve, 0, [0.1, 0.1]) == (1, 1, 1)
    assert labels_worth([2, 5, 10], curve, 0, [0.2, 0.2]).factor == pytest.approx(2.5)  # a dip is no better


def test_seeds_that_differ_widen_the_interval() -> None:
    curve = np.array([np.full(5, 0.1 * math.log(number)) for number in LABELS])
    there = 0.1 * math.log(15) + np.array([-0.1, -0.05, 0, 0.05, 0.1])
    worth = labels_worth(LABELS, curve, 1, there.tolist())
    assert worth.low < worth.factor * 0.7
    assert worth.high > worth.factor * 1.4
