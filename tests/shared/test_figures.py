"""The loss curve is drawn from whatever metrics.jsonl holds."""

import math
import warnings

import pytest

from shared.figures import loss_curve


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{"step": 1, "perf/mfu": 0.5}],
        [{"step": 1, "train/loss": 3.0}],
        [{"step": 1, "eval/loss": 3.0}],
        [{"step": 1, "train/loss": math.nan}, {"step": 2, "train/loss": 3.0, "eval/loss": math.nan}],
        [{"step": step, "train/loss": 1 / step, "eval/loss": 2 / step} for step in range(1, 50)],
    ],
)
def test_a_picture_comes_out(tmp_path, entries):
    path = tmp_path / "figures" / "loss.png"
    for _ in range(2):
        with warnings.catch_warnings(action="error"):
            loss_curve(entries, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_drawn_curve_differs_from_none(tmp_path):
    loss_curve([], tmp_path / "empty.png")
    loss_curve([{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}], tmp_path / "curve.png")
    assert (tmp_path / "empty.png").read_bytes() != (tmp_path / "curve.png").read_bytes()
