"""Metrics as `evaluate.Metric` classes that need no network: the library's own are downloaded as code.

All take `predictions` and `references`, add them up over batches, and give a dictionary with one number.
"""

import re
from typing import Any

import datasets
import evaluate
import numpy as np

_CLASS = datasets.Value("int64")
_NUMBER = datasets.Value("float64")
_TEXT = datasets.Value("string")
_TAGS = datasets.List(_TEXT)


class _Score(evaluate.Metric):
    """A metric that is kept in memory; its first line says what it is."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **options})  # else it writes to a cache folder

    def _of(self, predictions: Any, references: Any) -> evaluate.MetricInfo:
        """What the library wants to know, from the types of both."""
        return evaluate.MetricInfo(
            description=(type(self).__doc__ or "").partition("\n")[0],
            citation="",
            inputs_description=f"predictions: {predictions}; references: {references}",
            features=datasets.Features({"predictions": predictions, "references": references}),
        )


class Accuracy(_Score):
    """Share of predictions that equal their references, both class indices.

    >>> Accuracy().compute(predictions=[1, 2, 3], references=[1, 2, 4])["accuracy"]
    0.6666666666666666
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_CLASS, _CLASS)

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.equal(predictions, references)))}


class TopKAccuracy(_Score):
    """Share of references that are among their predictions: of each sample a list of class indices.

    >>> TopKAccuracy().compute(predictions=[[1, 2], [3, 4]], references=[2, 5])["accuracy"]
    0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(datasets.List(_CLASS), _CLASS)

    def _compute(self, *, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
        found = [reference in guesses for guesses, reference in zip(predictions, references, strict=True)]
        return {"accuracy": float(np.mean(found))}


class BalancedAccuracy(_Score):
    """Mean over the classes that occur of the share of their samples that is right (Brodersen et al. 2010).

    >>> BalancedAccuracy().compute(predictions=[0, 0, 0, 1], references=[0, 0, 0, 0])["balanced_accuracy"]
    0.75
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_CLASS, _CLASS)

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        labels, totals = np.unique(references, return_inverse=True, return_counts=True)[1:]
        right = np.bincount(labels, weights=np.array(predictions) == np.array(references))
        return {"balanced_accuracy": float(np.mean(right / totals))}


class MacroF1(_Score):
    """Mean of F1 over the classes that occur, in predictions or in references.

    >>> MacroF1().compute(predictions=[0, 1, 1], references=[0, 0, 1])["macro_f1"]
    0.6666666666666666
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_CLASS, _CLASS)

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        classes, numbered = np.unique(np.stack([predictions, references]), return_inverse=True)
        guesses, labels = numbered.reshape(2, -1)
        right = np.bincount(labels[guesses == labels], minlength=len(classes))
        # F1 = 2 TP / (2 TP + FP + FN), whose denominator counts the guesses and the samples of a class.
        return {"macro_f1": float(np.mean(2 * right / np.bincount(numbered.flatten())))}


class BinaryF1(_Score):
    """F1 of class 1, the positive one, as GLUE has it for pairs that mean the same.

    >>> BinaryF1().compute(predictions=[0, 1, 1], references=[0, 0, 1])["f1"]
    0.6666666666666666
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_CLASS, _CLASS)

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"f1": _f1(np.array(predictions) == 1, np.array(references) == 1)}


class MultiLabelMacroF1(_Score):
    """Mean of F1 over labels, of which a sample can have several: of each a list of 0 or 1 for every label.

    >>> MultiLabelMacroF1().compute(predictions=[[1, 0], [1, 1]], references=[[1, 0], [0, 1]])["macro_f1"]
    0.8333333333333333
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(datasets.List(_CLASS), datasets.List(_CLASS))

    def _compute(self, *, predictions: list[list[int]], references: list[list[int]]) -> dict[str, float]:
        columns = zip(np.array(predictions).T == 1, np.array(references).T == 1, strict=True)
        return {"macro_f1": float(np.mean([_f1(*column) for column in columns]))}


class MatthewsCorrelation(_Score):
    """Correlation between two classifications, of any number of classes (Gorodkin 2004, equation 8); 0 for a constant.

    >>> MatthewsCorrelation().compute(predictions=[0, 1, 1, 0], references=[0, 1, 1, 1])["matthews_correlation"]
    0.5773502691896258
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_CLASS, _CLASS)

    def _compute(self, *, predictions: list[int], references: list[int]) -> dict[str, float]:
        classes = np.union1d(predictions, references)
        guesses, labels = (
            np.equal.outer(np.array(values), classes).astype(float) for values in (predictions, references)
        )
        return {"matthews_correlation": _correlation(guesses, labels)}


class PearsonCorrelation(_Score):
    """Linear correlation of predicted numbers with true ones; 0 where either are all the same.

    >>> PearsonCorrelation().compute(predictions=[1.0, 2.0, 3.0], references=[2.0, 4.0, 6.0])["pearson"]
    1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_NUMBER, _NUMBER)

    def _compute(self, *, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"pearson": _correlation(np.array(predictions)[:, None], np.array(references)[:, None])}


class SpearmanCorrelation(_Score):
    """Linear correlation of the ranks of predicted numbers with those of true ones; 0 where either are all the same.

    >>> SpearmanCorrelation().compute(predictions=[1.0, 2.0, 9.0], references=[2.0, 4.0, 6.0])["spearman"]
    1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_NUMBER, _NUMBER)

    def _compute(self, *, predictions: list[float], references: list[float]) -> dict[str, float]:
        return {"spearman": _correlation(_ranks(np.array(predictions))[:, None], _ranks(np.array(references))[:, None])}


class AreaUnderRoc(_Score):
    """How likely a positive sample has a higher prediction than a negative one, mean over labels that have both.

    Predictions and references are lists of a number for every label: any score, and 0 or 1.

    >>> AreaUnderRoc().compute(predictions=[[0.1], [0.4], [0.35]], references=[[0], [0], [1]])["auc"]
    0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(datasets.List(_NUMBER), datasets.List(_CLASS))

    def _compute(self, *, predictions: list[list[float]], references: list[list[int]]) -> dict[str, float]:
        columns = zip(np.array(predictions).T, np.array(references).T == 1, strict=True)
        areas = [_area(scores, is_positive) for scores, is_positive in columns if 0 < is_positive.mean() < 1]
        return {"auc": float(np.mean(areas)) if areas else float("nan")}


class EntityF1(_Score):
    """F1 of named entities, all types together: an entity is right if its type and both of its ends are.

    Predictions and references are, for each text, its words' tags: O, or B- or I- and a type. As conlleval does, an I-
    that follows no tag of its type begins an entity.

    >>> EntityF1().compute(predictions=[["B-PER", "I-PER", "O"]], references=[["B-PER", "O", "O"]])["entity_f1"]
    0.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_TAGS, _TAGS)

    def _compute(self, *, predictions: list[list[str]], references: list[list[str]]) -> dict[str, float]:
        found, true = (
            {(text, *entity) for text, tags in enumerate(all_tags) for entity in entities(tags)}
            for all_tags in (predictions, references)
        )
        return {"entity_f1": 2 * len(found & true) / max(1, len(found) + len(true))}


def entities(tags: list[str]) -> list[tuple[str, int, int]]:
    """Type, first word and end of each entity that the tags of a text name, see `EntityF1`."""
    found: list[tuple[str, int, int]] = []
    begun: tuple[str, int] | None = None
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        goes_on = begun is not None and prefix == "I" and kind == begun[0]
        if begun is not None and not goes_on:
            found.append((*begun, place))
            begun = None
        if prefix in ("B", "I") and not goes_on:
            begun = (kind, place)
    return found


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """Of two arrays of booleans; 0 where nothing is true and nothing predicted."""
    return float(2 * np.sum(predicted & true) / max(1, np.sum(predicted) + np.sum(true)))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of two arrays (N, K): the summed covariances of their columns by the root of both sums of variances."""
    if not (np.ptp(one, axis=0).any() and np.ptp(other, axis=0).any()):
        return 0.0
    one, other = one - one.mean(0), other - other.mean(0)
    return float(np.sum(one * other) / np.sqrt(np.sum(one**2) * np.sum(other**2)))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Place of each in sorted order, from 1; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _area(scores: np.ndarray, is_positive: np.ndarray) -> float:
    """Of the Mann-Whitney statistic: how many positives are above how many negatives, ties half."""
    number = int(is_positive.sum())
    above = float(_ranks(scores)[is_positive].sum()) - number * (number + 1) / 2
    return above / (number * (len(scores) - number))


class ExactMatch(_Score):
    """Share of answers that are the expected text, blanks around it and capitals aside.

    >>> ExactMatch().compute(predictions=["A cat", "dog"], references=["a cat", "a dog"])["exact_match"]
    0.5
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_TEXT, _TEXT)

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:
        plain = zip(*([text.strip().casefold() for text in texts] for texts in (predictions, references)), strict=True)
        return {"exact_match": float(np.mean([given == expected for given, expected in plain]))}


class RougeL(_Score):
    """Mean F-measure of the longest common subsequence of words (Lin 2004, section 3), by torchmetrics.

    Words are what is between other characters than letters and digits, of any script, in small letters.

    >>> round(RougeL().compute(predictions=["the cat sat"], references=["the cat sat down"])["rouge_l"], 4)
    0.8571
    >>> RougeL().compute(predictions=["Это кошка, naïve"], references=["это кошка: naïve"])["rouge_l"]
    1.0
    """

    def _info(self) -> evaluate.MetricInfo:
        return self._of(_TEXT, _TEXT)

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, float]:
        from torchmetrics.functional.text import rouge_score

        def normalized(text: str) -> str:
            return " ".join(re.findall(r"\w+", text.lower()))

        options: dict[str, Any] = {"normalizer": normalized, "tokenizer": str.split}
        found = rouge_score(predictions, references, rouge_keys=("rougeL",), **options)
        return {"rouge_l": float(found["rougeL_fmeasure"])}
