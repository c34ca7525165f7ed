"""Pictures of a run, drawn from its metrics.jsonl."""

from pathlib import Path


def loss_curve(entries: list[dict[str, float]], path: Path) -> None:
    """Draw `train/loss` and `eval/loss` over the steps into a PNG.

    Args:
        entries: the objects of metrics.jsonl.
        path: file to write; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, style in (("train/loss", {"linewidth": 1, "alpha": 0.7}), ("eval/loss", {"marker": "o", "markersize": 4})):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, **style)
    axes.set(xlabel="step (optimizer updates)", ylabel="loss")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
