"""Scores against scikit-learn and SciPy on random cases, and against what seqeval 1.2.2 said of entities."""

import json
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as expected

from shared.metrics import scores

RECORDED = json.loads(Path(__file__).with_name("seqeval_outputs.json").read_text())
CLASSES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)
NUMBERS = st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=60)
LABELS = st.integers(2, 4).flatmap(
    lambda width: st.lists(
        st.tuples(*[st.lists(st.integers(0, 1), min_size=width, max_size=width)] * 2), min_size=1, max_size=30
    )
)


def compute(metric: evaluate.Metric, pairs: list[tuple[Any, Any]]) -> float:
    predictions, references = zip(*pairs, strict=True)
    [value] = metric.compute(predictions=predictions, references=references).values()
    return value


@pytest.mark.parametrize(
    "name",
    [name for name, kind in vars(scores).items() if isinstance(kind, type) and name[0].isupper() and name != "Any"],
)
def test_every_score_is_a_metric_of_the_library_that_needs_no_network(name: str) -> None:
    metric = getattr(scores, name)()
    assert isinstance(metric, evaluate.Metric)
    assert metric.description.endswith(".")


def test_batches_add_up() -> None:
    metric = scores.Accuracy()
    for batch in ([1, 2, 3], [4]):
        metric.add_batch(predictions=np.array(batch), references=np.array([1, 2, 4][: len(batch)]))
    assert metric.compute() == {"accuracy": 0.5}


@given(CLASSES)
@settings(deadline=None)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_scores_of_classes_are_scikit_learn_s(pairs: list[tuple[int, int]]) -> None:
    guesses, labels = zip(*pairs, strict=True)
    assert compute(scores.Accuracy(), pairs) == pytest.approx(expected.accuracy_score(labels, guesses))
    balanced = expected.balanced_accuracy_score(labels, guesses)
    assert compute(scores.BalancedAccuracy(), pairs) == pytest.approx(balanced)
    macro = expected.f1_score(labels, guesses, average="macro", zero_division=0.0)
    assert compute(scores.MacroF1(), pairs) == pytest.approx(macro)
    matthews = expected.matthews_corrcoef(labels, guesses)
    assert compute(scores.MatthewsCorrelation(), pairs) == pytest.approx(matthews)
    positive = [(guess == 1, label == 1) for guess, label in pairs]
    f1 = expected.f1_score(*zip(*((label, guess) for guess, label in positive), strict=True), zero_division=0.0)
    assert compute(scores.BinaryF1(), pairs) == pytest.approx(f1)


def test_top_k_accuracy_counts_references_among_the_guesses() -> None:
    guesses = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 1, 2]]
    assert scores.TopKAccuracy().compute(predictions=guesses, references=[3, 4, 1, 5]) == {"accuracy": 0.5}


@given(NUMBERS)
def test_correlations_are_scipy_s(pairs: list[tuple[int, int]]) -> None:
    guesses, numbers = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    if np.ptp(guesses) == 0 or np.ptp(numbers) == 0:
        assert compute(scores.PearsonCorrelation(), pairs) == compute(scores.SpearmanCorrelation(), pairs) == 0
    else:
        pearson, spearman = stats.pearsonr(guesses, numbers), stats.spearmanr(guesses, numbers)
        assert compute(scores.PearsonCorrelation(), pairs) == pytest.approx(pearson.statistic)
        assert compute(scores.SpearmanCorrelation(), pairs) == pytest.approx(spearman.statistic)


@given(LABELS)
def test_scores_of_several_labels_are_scikit_learn_s(pairs: list[tuple[list[int], list[int]]]) -> None:
    guesses, labels = (np.array(column) for column in zip(*pairs, strict=True))
    macro = expected.f1_score(labels, guesses, average="macro", zero_division=0.0)
    assert compute(scores.MultiLabelMacroF1(), pairs) == pytest.approx(macro)
    has_both = (labels.min(0) == 0) & (labels.max(0) == 1)
    found = compute(scores.AreaUnderRoc(), pairs)
    if has_both.any():
        area = expected.roc_auc_score(labels[:, has_both], guesses[:, has_both].astype(float), average="macro")
        assert found == pytest.approx(area)
    else:
        assert np.isnan(found)


@pytest.mark.parametrize("case", RECORDED)
def test_entities_are_counted_as_seqeval_counts_them(case: dict[str, Any]) -> None:
    pairs = list(zip(case["predictions"], case["references"], strict=True))
    assert compute(scores.EntityF1(), pairs) == pytest.approx(case["f1"])


def test_an_entity_goes_on_with_tags_of_its_type_alone() -> None:
    tags = ["I-PER", "I-PER", "B-PER", "I-LOC", "O", "B-LOC"]
    assert scores.entities(tags) == [("PER", 0, 2), ("PER", 2, 3), ("LOC", 3, 4), ("LOC", 5, 6)]


def test_no_entity_at_all_is_no_score() -> None:
    assert compute(scores.EntityF1(), [(["O"], ["O"])]) == 0
