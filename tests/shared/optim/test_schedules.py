"""Schedules are pure, stay in [0, 1], never jump, start above 0 and end where they should."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.optim.schedules import warmup, warmup_cosine, warmup_line_from_start, warmup_stable_decay


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, int]:
    """(step, max_steps, warmup_steps), the warm-up shorter than the run."""
    max_steps = draw(st.integers(1, 10_000))
    return draw(st.integers(0, max_steps - 1)), max_steps, draw(st.integers(0, max_steps - 1))


fractions = st.floats(0, 1)
shares = st.floats(0.01, 1)


@given(runs(), shares, fractions)
def test_factors_lie_between_0_and_1_and_depend_on_the_step_alone(run, decay, final):
    step, max_steps, warmup_steps = run
    for schedule in (
        lambda: warmup(step, warmup_steps),
        lambda: warmup_stable_decay(step, max_steps, warmup_steps, decay, final),
        lambda: warmup_line_from_start(step, max_steps, warmup_steps),
        lambda: warmup_cosine(step, max_steps, warmup_steps, final),
    ):
        assert 0 < schedule() <= 1 or (final == 0 and schedule() >= 0)
        assert schedule() == schedule()


@given(runs(), shares, fractions)
def test_no_jump_is_larger_than_the_slopes_allow(run, decay, final):
    step, max_steps, warmup_steps = run
    rise = 1 / (warmup_steps + 1)
    slope = max(rise, 1 / max(1, min(round(max_steps * decay), max_steps - warmup_steps)))
    one, other = (warmup_stable_decay(at, max_steps, warmup_steps, decay) for at in (step, step + 1))
    assert abs(one - other) <= slope + 1e-9
    slope = max(rise, math.pi / 2 / max(1, max_steps - warmup_steps))
    one, other = (warmup_cosine(at, max_steps, warmup_steps, final) for at in (step, step + 1))
    assert abs(one - other) <= slope + 1e-9


@given(runs(), shares, fractions)
def test_after_the_warm_up_no_factor_rises(run, decay, final):
    step, max_steps, warmup_steps = run
    at = max(step, warmup_steps)
    assert warmup_stable_decay(at + 1, max_steps, warmup_steps, decay) <= warmup_stable_decay(
        at, max_steps, warmup_steps, decay
    )
    assert warmup_cosine(at + 1, max_steps, warmup_steps, final) <= warmup_cosine(at, max_steps, warmup_steps, final)


@given(st.integers(0, 1000))
def test_the_warm_up_starts_above_0_and_reaches_1_at_its_end(warmup_steps):
    assert warmup(0, warmup_steps) == pytest.approx(1 / (warmup_steps + 1))
    assert warmup(warmup_steps, warmup_steps) == 1
    assert warmup(warmup_steps + 5, warmup_steps) == 1
    if warmup_steps:
        assert warmup(warmup_steps - 1, warmup_steps) < 1


def test_no_warm_up_is_full_rate_at_once():
    assert warmup(0, 0) == 1
    assert warmup_stable_decay(0, 100, 0, 0.2) == 1
    assert warmup_cosine(0, 100, 0, 0.1) == 1


def test_warmup_stable_decay_holds_and_then_falls_in_a_straight_line_to_near_0():
    factors = [warmup_stable_decay(step, 100, 10, 0.2) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert factors[10:81] == [1.0] * 71
    assert factors[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])
    assert factors[-1] == pytest.approx(0.05)


@given(st.integers(100, 10_000), st.floats(0.2, 1))
def test_the_last_factor_of_warmup_stable_decay_is_near_0(max_steps, decay):
    assert 0 < warmup_stable_decay(max_steps - 1, max_steps, 0, decay) <= 0.05
    assert warmup_stable_decay(max_steps, max_steps, 0, decay) == 0
    assert warmup_stable_decay(max_steps + 7, max_steps, 0, decay) == 0


@given(runs(), shares, fractions)
def test_the_peak_is_reached_however_long_the_warm_up(run, decay, final):
    _, max_steps, warmup_steps = run
    assert warmup_stable_decay(warmup_steps, max_steps, warmup_steps, decay, final) == pytest.approx(1)
    assert warmup_cosine(warmup_steps, max_steps, warmup_steps, final) == pytest.approx(1)


def test_a_fall_from_the_end_of_the_warm_up_and_one_on_the_line_from_the_start():
    """The rates of NVIDIA's and of Google's BERT: 28 % of warm-up, the latter's falls from 0.72 then."""
    assert [warmup_stable_decay(step, 100, 28, 1.0) for step in (28, 64, 100)] == [1.0, 0.5, 0.0]
    assert warmup_stable_decay(99, 100, 28, 1.0, final_fraction=0.1) == pytest.approx(0.1 + 0.9 / 72)
    assert [warmup_line_from_start(step, 100, 28) for step in (28, 64, 100)] == [0.72, 0.36, 0.0]
    assert warmup_line_from_start(27, 100, 28) == pytest.approx(28 / 29)


def test_warmup_cosine_falls_to_its_final_fraction():
    factors = [warmup_cosine(step, 110, 10, 0.1) for step in range(111)]
    assert factors[10] == 1
    assert factors[60] == pytest.approx(0.55)
    assert factors[35] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors[109] == pytest.approx(0.1, abs=1e-3)
    assert factors[110] == pytest.approx(0.1)
    assert warmup_cosine(500, 110, 10, 0.1) == pytest.approx(0.1)


@given(st.integers(1, 1000), fractions)
def test_the_final_fraction_is_never_passed(max_steps, final):
    assert all(warmup_cosine(step, max_steps, 0, final) >= final - 1e-9 for step in range(max_steps))


@pytest.mark.parametrize("max_steps", [1, 2, 3])
def test_the_shortest_runs(max_steps):
    for step in range(max_steps):
        assert 0 < warmup_stable_decay(step, max_steps, 0, 0.5) <= 1
        assert 0 < warmup_stable_decay(step, max_steps, 20, 1.0) <= 1
        assert 0 < warmup_cosine(step, max_steps, 20, 0.1) <= 1
