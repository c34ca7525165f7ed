"""Metrics as `evaluate.Metric` classes that need no network: the library's own are downloaded as code."""

from typing import Any

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their references, both class indices.

    >>> Accuracy().compute(predictions=[1, 2, 3], references=[1, 2, 4])["accuracy"]
    0.6666666666666666
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **options})  # else it writes to a cache folder

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(
            description="Share of predictions that equal their references.",
            citation="",
            inputs_description="predictions and references: class indices",
            features=features,
        )

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


class TopKAccuracy(evaluate.Metric):
    """Share of references that are among their predictions: of each sample a list of class indices.

    >>> TopKAccuracy().compute(predictions=[[1, 2], [3, 4]], references=[2, 5])["accuracy"]
    0.5
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **options})  # else it writes to a cache folder

    def _info(self) -> evaluate.MetricInfo:
        classes = datasets.Value("int64")
        features = datasets.Features({"predictions": datasets.List(classes), "references": classes})
        return evaluate.MetricInfo(
            description="Share of references that are among their predictions.",
            citation="",
            inputs_description="predictions: lists of class indices; references: class indices",
            features=features,
        )

    def _compute(self, *, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        found = [reference in guesses for guesses, reference in zip(predictions, references, strict=True)]
        return {"accuracy": float(np.mean(found))}
