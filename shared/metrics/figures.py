"""Figures of a run: its loss curve, and what its model sees and mistakes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def loss_curve(entries: list[dict[str, float]], path: Path) -> None:
    """Draw `train/loss` and `eval/loss` over the steps into a PNG.

    Args:
        entries: the objects of metrics.jsonl.
        path: file to write; its folder is made.
    """
    figure = _figure(7, 4)
    axes = figure.subplots()
    for key, style in (("train/loss", {"linewidth": 1, "alpha": 0.7}), ("eval/loss", {"marker": "o", "markersize": 4})):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, **style)
    axes.set(xlabel="step (optimizer updates)", ylabel="loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    _save(figure, path)


def confusion_matrix(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draw how often each class was taken for each other, as shares of the class, into a PNG.

    Args:
        counts: int64 (C, C), classes in rows, guesses in columns.
        names: of the classes; written beside the matrix where there are at most 40.
        path: file to write; its folder is made.
    """
    size = len(names)
    side = min(12.0, 3 + 0.45 * size)
    figure = _figure(side, side)
    axes = figure.subplots()
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="guess", ylabel="class")
    if size <= 40:
        axes.set_xticks(range(size), names, rotation=90)
        axes.set_yticks(range(size), names)
    if size <= 20:
        for row, column in np.argwhere(counts > 0).tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=color)
    _save(figure, path)


def image_grid(images: Sequence[np.ndarray], titles: Sequence[str], path: Path) -> None:
    """Draw images with a title each, four in a row, into a PNG.

    Args:
        images: uint8 (H, W, 3); there may be none.
        titles: of each.
        path: file to write; its folder is made.
    """
    rows = max(1, math.ceil(len(images) / 4))
    figure = _figure(8, 2.3 * rows)
    grid = figure.subplots(rows, 4, squeeze=False).flatten()
    for axes in grid:
        axes.axis("off")
    for axes, image, title in zip(grid, images, titles, strict=False):
        axes.imshow(image)
        axes.set_title(title, fontsize=8, parse_math=False)
    _save(figure, path)


def label_curves(
    labels: Sequence[float],
    curves: dict[str, np.ndarray],
    majority: float,
    gaps: Sequence[tuple[float, float, float]],
    path: Path,
) -> None:
    """Draw scores over labels of each class, with the spread of their seeds, into a PNG.

    Args:
        labels: of each class, rising.
        curves: of each arm (len(labels), S) scores of S seeds; the first two are drawn in full, the others dashed.
        majority: score of the most frequent class.
        gaps: of each horizontal distance to draw the labels at its beginning and end, and the score.
        path: file to write; its folder is made.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    for place, (name, scores) in enumerate(curves.items()):
        means = scores.mean(1)
        [line] = axes.plot(labels, means, marker="o", markersize=3, label=name, linestyle="-" if place < 2 else "--")
        if place < 2:
            axes.fill_between(labels, scores.min(1), scores.max(1), alpha=0.2, color=line.get_color(), linewidth=0)
    for begin, end, score in gaps:
        style = {"arrowstyle": "<->", "color": "black", "linewidth": 0.8}
        axes.annotate("", xy=(begin, score), xytext=(end, score), arrowprops=style)
    axes.axhline(majority, color="grey", linestyle=":", label="most frequent class")
    axes.set(xscale="log", xlabel="labels of each class", ylabel="accuracy")
    axes.set_xticks(labels, [f"{number:.0f}" for number in labels])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
