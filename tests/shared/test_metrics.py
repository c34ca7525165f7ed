import evaluate
import numpy as np
import pytest

from shared.metrics import Accuracy


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
