import json
import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.run.best import Best


@pytest.mark.parametrize(
    ("metric", "best_of"), [("eval/accuracy", max), ("eval/loss", min), ("eval/prose/bits_per_byte", min)]
)
@given(values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), min_size=1), data=st.data())
@settings(deadline=None)
def test_the_first_of_the_best_is_kept_over_any_stop(
    metric: str, best_of: Callable[[list[float]], float], values: list[float], data: st.DataObject
) -> None:
    stop = data.draw(st.integers(0, len(values)))
    best = Best(metric, {})
    noted = []
    for step, value in enumerate(values, start=1):
        if step == stop:
            best = Best(metric, json.loads(json.dumps(best.state())))
        if best.is_better(step, {metric: value, "eval/other": 1.0}, f"at {step}"):
            noted.append(step)
        if step == stop and data.draw(st.booleans()):  # in this evaluation, which is done again
            best = Best(metric, json.loads(json.dumps(best.state())))
            assert best.is_better(step, {metric: value, "eval/other": 1.0}, f"at {step}") == (step in noted)
    finite = [value for value in values if not math.isnan(value)]
    expected = values.index(best_of(finite)) + 1 if finite else 0
    assert best.step == expected == (noted[-1] if noted else 0)
    assert best.waited == len(values) - expected
    assert not best.has_waited(0)
    assert [best.has_waited(patience) for patience in (best.waited, best.waited + 1)] == [best.waited > 0, False]
    if finite:
        assert best.metrics == {metric: best_of(finite), "eval/other": 1.0}
        assert best.samples == f"at {expected}"


def test_of_equal_values_the_least_loss_is_the_best() -> None:
    best = Best("eval/accuracy", {})
    steps = [(0.5, 3.0), (0.5, 2.0), (0.5, math.nan), (0.5, 2.0), (0.4, 0.1), (0.5, 1.0), (0.6, 9.0)]
    better, waited = [], []
    for step, (accuracy, loss) in enumerate(steps):
        if best.is_better(step, {"eval/accuracy": accuracy, "eval/loss": loss}, ""):
            better.append(step)
        waited.append(best.waited)
    assert better == [0, 1, 5, 6]
    assert waited == [0, 1, 2, 3, 4, 5, 0]  # patience is for the metric


def test_without_a_metric_none_is_the_best() -> None:
    best = Best("", {})
    assert not best.is_better(1, {"eval/loss": 1.0}, "")
    assert (best.state(), best.kept()) == ({}, {})


def test_the_best_is_told_with_its_evaluation_alone() -> None:
    best = Best("eval/loss", {})
    assert best.is_better(3, {"train/loss": 1.0, "eval/loss": 2.0}, "")
    expected = {"folder": "best", "metric": "eval/loss", "step": 3, "evaluation": {"eval/loss": 2.0}}
    assert best.kept() == {"best": expected}
