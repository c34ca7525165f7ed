"""What the exported model says of each sample that it was tried on: predictions.jsonl in the run folder."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shared.run.folder import write_text


def write_predictions(folder: Path, samples: Iterable[Any], labels: Iterable[Any], predictions: Iterable[Any]) -> None:
    """Write one line a sample, in the order of the data: `{"sample": ..., "label": ..., "prediction": ...}`.

    Args:
        folder: of the run.
        samples: what each is: the row of its split, the name of its file, or a question.
        labels: names of classes, numbers, or lists of them.
        predictions: in the same form.
    """
    rows = (
        {"sample": sample, "label": label, "prediction": guess}
        for sample, label, guess in zip(samples, labels, predictions, strict=True)
    )
    # Names of files may hold bytes that are no UTF-8.
    lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    write_text(folder / "predictions.jsonl", lines.encode("utf-8", "backslashreplace").decode("utf-8"))


def read_predictions(folder: Path) -> tuple[list[Any], list[Any]]:
    """Labels and predictions as `write_predictions` got them."""
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    pairs = [json.loads(line) for line in lines if line]
    return [pair["label"] for pair in pairs], [pair["prediction"] for pair in pairs]
