"""What a classifier answers for held-out images: how often it is right, and which classes it takes for others."""

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from shared.data.batches import IGNORED
from shared.images.crops import CenterCrops
from shared.metrics import figures
from shared.metrics.accuracy import Accuracy, TopKAccuracy

_NUM_DESCRIBED = 16
_NUM_SHOWN = 16
_TOP = 5


@dataclass(frozen=True)
class Answers:
    """Of N images.

    Attributes:
        indices: of the images in their data set, int64 (N,).
        labels: their classes, int64 (N,).
        guesses: the five classes that are most likely, or all, the most likely first, int64 (N, 5).
        probabilities: of the first guess, float64 (N,).
    """

    indices: np.ndarray
    labels: np.ndarray
    guesses: np.ndarray
    probabilities: np.ndarray

    def top1(self) -> float:
        """Share of the images whose first guess is right."""
        return Accuracy().compute(predictions=self.guesses[:, 0], references=self.labels)["accuracy"]

    def top5(self) -> float:
        """Share of the images whose class is among the five guesses."""
        return TopKAccuracy().compute(predictions=self.guesses, references=self.labels)["accuracy"]


def answers_of(probabilities: Tensor, batch: dict[str, Tensor]) -> Answers:
    """The answers to one batch.

    Args:
        probabilities: (B, C), of the classes.
        batch: indices (B,) and labels (B,), -100 where there is none; such images are left out.
    """
    kept = batch["labels"] != IGNORED
    best = probabilities[kept].double().topk(min(_TOP, probabilities.shape[1]))
    found = (batch["indices"][kept], batch["labels"][kept], best.indices, best.values[:, 0])
    return Answers(*(values.cpu().numpy() for values in found))


def join_answers(parts: Iterable[Answers]) -> Answers:
    """The answers to several batches as one."""
    return Answers(*(np.concatenate(columns) for columns in zip(*map(astuple, parts), strict=True)))


def count_confusions(labels: np.ndarray, guesses: np.ndarray, num_classes: int) -> np.ndarray:
    """How often each class (rows) was taken for each (columns), int64 (C, C), from int64 (N,) of both."""
    return np.bincount(labels * num_classes + guesses, minlength=num_classes**2).reshape(num_classes, num_classes)


def describe_confusions(answers: Answers, class_names: Sequence[str]) -> str:
    """The pairs of classes that are confused most often, a line each."""
    counts = count_confusions(answers.labels, answers.guesses[:, 0], len(class_names))
    totals = counts.sum(1)
    np.fill_diagonal(counts, 0)
    most = np.argsort(-counts, axis=None, kind="stable")[:_NUM_DESCRIBED].tolist()
    pairs = [divmod(place, len(class_names)) for place in most if counts.flat[place]]
    lines = [f"{class_names[a]} taken for {class_names[b]}: {counts[a, b]} of {totals[a]}" for a, b in pairs]
    return "\n".join(lines) or "no mistake"


def surest_mistakes(answers: Answers, number: int) -> np.ndarray:
    """Places of at most `number` wrong first guesses, those with the highest probability first."""
    wrong = np.flatnonzero(answers.labels != answers.guesses[:, 0])
    return wrong[np.argsort(-answers.probabilities[wrong], kind="stable")][:number]


def draw_answers(answers: Answers, class_names: Sequence[str], crops: CenterCrops, folder: Path) -> dict[str, str]:
    """Draw the confusion matrix and the surest mistakes.

    Args:
        answers: to every image.
        class_names: of the data set.
        crops: where the images are read.
        folder: gets the two files.

    Returns:
        Of each image its heading and its file's name, for the card.
    """
    counts = count_confusions(answers.labels, answers.guesses[:, 0], len(class_names))
    figures.confusion_matrix(counts, class_names, folder / "confusion_matrix.png")
    titles, shown = [], []
    for place in surest_mistakes(answers, _NUM_SHOWN).tolist():
        guess, label = class_names[answers.guesses[place, 0]], class_names[answers.labels[place]]
        titles.append(f"{guess} ({answers.probabilities[place]:.0%})\nis {label}")
        shown.append(crops.read(int(answers.indices[place]))["pixel_values"])
    figures.image_grid(shown, titles, folder / "surest_mistakes.png")
    return {"Confusion matrix": "confusion_matrix.png", "The surest mistakes": "surest_mistakes.png"}
