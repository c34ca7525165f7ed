"""What a classifier answers for held-out images: how often it is right, and which classes it takes for others."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from shared.data.batches import IGNORED, to_device
from shared.data.updates import load_updates
from shared.images.crops import CenterCrops
from shared.metrics import figures
from shared.metrics.confusions import count_confusions, describe_confusions
from shared.metrics.scores import Accuracy, TopKAccuracy
from shared.runtime.collectives import equal_share, gather_objects

USAGE = """from transformers import pipeline

print(pipeline("image-classification", "path/of/this/folder")("image.jpg"))"""
_MISTAKES = {"The surest mistakes": "surest_mistakes.png"}
_MATRIX = {"Confusion matrix": "confusion_matrix.png"}
_MATRIX_CLASSES = 1000  # more could not be told apart in it, and its size grows with their square
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

    def describe_confusions(self, class_names: Sequence[str]) -> str:
        """See `confusions.describe_confusions`."""
        return describe_confusions(self.labels, self.guesses[:, 0], class_names)


def load_held_out(accelerator: Any, crops: CenterCrops, num_workers: int) -> Iterator[dict[str, Tensor]]:
    """This process's batches of the images to evaluate on, on its device, behind a bar if they take their time.

    All processes get equally many, for all must run equally often; one too many holds a single image without a label.

    Args:
        accelerator: knows the processes.
        crops: the images.
        num_workers: see `load_updates`.
    """
    steps = equal_share(accelerator, len(crops))
    batches = load_updates(crops, steps, num_workers, accelerator.device)
    is_quiet = not accelerator.is_main_process or None  # None: where there is no terminal
    for batch in tqdm(batches, total=len(steps), desc="evaluating", delay=2, leave=False, disable=is_quiet):
        yield to_device(batch, accelerator.device)


def answers_of(probabilities: Tensor, batch: dict[str, Tensor]) -> Answers:
    """The answers to one batch.

    Args:
        probabilities: (B, C), of the classes.
        batch: indices (B,) and labels (B,), -100 where there is none; such images are left out.
    """
    kept = batch["labels"] != IGNORED
    best = probabilities[kept].topk(min(_TOP, probabilities.shape[1]))
    found = (batch["indices"][kept], batch["labels"][kept], best.indices, best.values[:, 0].cpu().double())
    return Answers(*(values.cpu().numpy() for values in found))


def join_answers(parts: Iterable[Answers]) -> Answers:
    """The answers to several batches as one."""
    return Answers(*(np.concatenate(columns) for columns in zip(*map(astuple, parts), strict=True)))


def gather_answers(
    accelerator: Any, found: list[Answers], loss: float, num_images: int
) -> tuple[dict[str, float], Answers]:
    """What all processes found. Every process calls this.

    Args:
        accelerator: knows the processes.
        found: answers to this process's batches.
        loss: of this process's images, summed.
        num_images: on all processes; those without an answer have no label.

    Returns:
        eval/loss, the mean, eval/top1, eval/top5 and eval/skipped; and the answer to each image.
    """
    gathered = gather_objects(accelerator, (loss, found))
    answers = join_answers(part for _, parts in gathered for part in parts)
    number = len(answers.labels)
    metrics = {"eval/loss": sum(of_process for of_process, _ in gathered) / number, "eval/top1": answers.top1()}
    return {**metrics, "eval/top5": answers.top5(), "eval/skipped": num_images - number}, answers


def surest_mistakes(answers: Answers, number: int) -> np.ndarray:
    """Places of at most `number` wrong first guesses, those with the highest probability first."""
    wrong = np.flatnonzero(answers.labels != answers.guesses[:, 0])
    return wrong[np.argsort(-answers.probabilities[wrong], kind="stable")][:number]


def draw_answers(answers: Answers, class_names: Sequence[str], crops: CenterCrops, folder: Path) -> dict[str, str]:
    """Draw the confusion matrix, of at most 1,000 classes, and the surest mistakes.

    Args:
        answers: to every image.
        class_names: of the data set.
        crops: where the images are read.
        folder: gets the files.

    Returns:
        See `drawn_figures`.
    """
    if len(class_names) <= _MATRIX_CLASSES:
        counts = count_confusions(answers.labels, answers.guesses[:, 0], len(class_names))
        figures.confusion_matrix(counts, class_names, folder / "confusion_matrix.png")
    titles, shown = [], []
    for place in surest_mistakes(answers, _NUM_SHOWN).tolist():
        guess, label = class_names[answers.guesses[place, 0]], class_names[answers.labels[place]]
        titles.append(f"{guess} ({answers.probabilities[place]:.0%})\nis {label}")
        shown.append(crops.read(int(answers.indices[place]))["pixel_values"])
    figures.image_grid(shown, titles, folder / "surest_mistakes.png")
    return drawn_figures(len(class_names))


def drawn_figures(num_classes: int) -> dict[str, str]:
    """Of each image that `draw_answers` draws its heading and its file's name."""
    return (_MATRIX if num_classes <= _MATRIX_CLASSES else {}) | _MISTAKES


def make_card(
    accelerator: Any, answers: Answers, class_names: Sequence[str], crops: CenterCrops, folder: Path
) -> dict[str, Any]:
    """What a classifier's card shows, as `run.training_run.Run.finish` takes it; the main process draws.

    Args:
        accelerator: knows which process that is.
        answers: see `draw_answers`.
        class_names: likewise.
        crops: likewise.
        folder: likewise.

    Returns:
        pipeline_tag, usage, samples and figures, of which other processes have none.
    """
    drawn = draw_answers(answers, class_names, crops, folder) if accelerator.is_main_process else {}
    said = {"usage": USAGE, "samples": answers.describe_confusions(class_names)}
    return {"pipeline_tag": "image-classification", **said, "figures": drawn}


def draw_batch(batch: dict[str, Tensor], class_names: Sequence[str]) -> Path:
    """Draw the first images of a batch, each under its class, into a PNG in a new folder for temporary files.

    Args:
        batch: pixel_values uint8 (B, S, S, 3) and labels int64 (B,), or (B, C) of 0 and 1.
        class_names: of the data set.
    """
    path = Path(tempfile.mkdtemp(prefix="dry_run_")) / "images.png"
    labels = batch["labels"][:_NUM_SHOWN]
    chosen = labels[:, None].tolist() if labels.ndim == 1 else [row.nonzero()[:, 0].tolist() for row in labels]
    names = [", ".join(class_names[label] for label in of_image) for of_image in chosen]
    figures.image_grid(list(batch["pixel_values"][:_NUM_SHOWN].numpy()), names, path)
    return path
