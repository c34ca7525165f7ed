"""What the exported model says of each sample that it was tried on: predictions.jsonl in the run folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.run.folder import write_text


def write_predictions(folder: Path, labels: Iterable[Any], predictions: Iterable[Any]) -> None:
    """Write one line a sample, in the order of the data: `{"label": ..., "prediction": ...}`.

    Args:
        folder: of the run.
        labels: names of classes, numbers, or lists of them.
        predictions: in the same form.
    """
    pairs = ({"label": label, "prediction": guess} for label, guess in zip(labels, predictions, strict=True))
    write_text(folder / "predictions.jsonl", "".join(f"{json.dumps(pair, ensure_ascii=False)}\n" for pair in pairs))


def read_predictions(folder: Path) -> tuple[list[Any], list[Any]]:
    """Labels and predictions as `write_predictions` got them."""
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    pairs = [json.loads(line) for line in lines if line]
    return [pair["label"] for pair in pairs], [pair["prediction"] for pair in pairs]
