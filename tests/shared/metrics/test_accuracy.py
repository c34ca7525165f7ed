import evaluate
import numpy as np
import pytest

from shared.metrics.accuracy import Accuracy, TopKAccuracy


def test_accuracy_is_a_metric_of_the_library_that_needs_no_network() -> None:
    metric = Accuracy()
    assert isinstance(metric, evaluate.Metric)
    for batch in ([1, 2, 3], [4]):
        metric.add_batch(predictions=np.array(batch), references=np.array([1, 2, 4][: len(batch)]))
    assert metric.compute() == {"accuracy": 0.5}


def test_accuracy_agrees_with_counting() -> None:
    draw = np.random.default_rng(0)
    predictions, references = draw.integers(0, 3, (2, 1000))
    counted = sum(int(one == other) for one, other in zip(predictions, references, strict=True)) / 1000
    assert Accuracy().compute(predictions=predictions, references=references)["accuracy"] == pytest.approx(counted)


def test_top_k_accuracy_counts_references_among_the_guesses() -> None:
    guesses = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 1, 2]]
    found = TopKAccuracy().compute(predictions=guesses, references=[3, 4, 1, 5])
    assert found == {"accuracy": 0.5}
