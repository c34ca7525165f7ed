"""Figures are drawn from whatever a run holds."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from shared.metrics import figures
from shared.metrics.figures import loss_curve


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
def test_a_image_comes_out(tmp_path, entries):
    path = tmp_path / "figures" / "loss.png"
    for _ in range(2):
        with warnings.catch_warnings(action="error"):
            loss_curve(entries, path)
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_drawn_curve_differs_from_none(tmp_path):
    loss_curve([], tmp_path / "empty.png")
    loss_curve([{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}], tmp_path / "curve.png")
    assert (tmp_path / "empty.png").read_bytes() != (tmp_path / "curve.png").read_bytes()


def test_confusion_matrix_and_grid_are_drawn(tmp_path: Path) -> None:
    from PIL import Image

    figures.confusion_matrix(np.array([[3, 1], [0, 0]]), ["a $class$", "other"], tmp_path / "new" / "matrix.png")
    for number, rows in ((0, 1), (5, 2), (16, 4)):
        shown = [np.full((6, 8, 3), 40 * index % 256, dtype=np.uint8) for index in range(number)]
        figures.image_grid(shown, ["$5 title"] * number, tmp_path / "grid.png")
        assert Image.open(tmp_path / "grid.png").size == (960, 276 * rows)
    with Image.open(tmp_path / "new" / "matrix.png") as image:
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_label_curves_are_drawn(tmp_path: Path) -> None:
    curves = {name: np.random.default_rng(0).random((3, 2)) for name in ("pretrained", "scratch", "classical")}
    drawn = []
    for place, gaps in enumerate(([], [(2.0, 7.5, 0.5)])):
        path = tmp_path / f"{place}.png"
        with warnings.catch_warnings(action="error"):
            figures.label_curves([2, 5, 460.3], curves, 0.1, gaps, path)
        drawn.append(path.read_bytes())
    assert drawn[0] != drawn[1]
