"""Images and their classes: class folders, Parquet, WebDataset tars, or a Hub data set, read by index.

The class of an image is the name of its folder, a `ClassLabel` or text column, or the number in a tar's .cls.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError, expect
from shared.data.randomness import derive_seed, shuffled_indices
from shared.data.subsets import few_of_each
from shared.fields import Images
from shared.images.files import (
    HELD_OUT_SEED,
    ImageFiles,
    check_sides,
    open_split,
    validation_split,
    without_decoding,
)

SAMPLE = Path(__file__).parents[1] / "samples" / "fashion"


@dataclass(frozen=True)
class LabelledImages:
    """Encoded images and their classes.

    Args:
        files: the images.
        labels: int64 (N,), the class of each.
        class_names: by class.
    """

    files: ImageFiles
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_images(self) -> int:
        """The same under the name that a stream has for it, which may not know it."""
        return len(self)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when classes, labels or, as far as some of the images tell, images do."""
        parts = (self.class_names, self.labels.tobytes(), self.files.fingerprint())
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def subset(self, chosen: np.ndarray) -> "LabelledImages":
        """Those at the given positions."""
        return LabelledImages(self.files.subset(chosen), self.labels[chosen], self.class_names)


def source_of(data: str) -> str:
    """The data set that the field `data` means: the embedded one for sample."""
    return str(SAMPLE) if data == "sample" else data


def open_splits(images: Images, label_column: str, largest: int) -> tuple[LabelledImages, LabelledImages]:
    """The images to train on and those to evaluate on, checked.

    Args:
        images: where they are.
        label_column: see `open_images`.
        largest: side in pixels of the largest crop that will be cut from them.

    Raises:
        UsageError: see `open_images`, `check_every_class`, `number_alike`, `hold_out` and `files.check_sides`.
    """
    source = source_of(images.data)
    columns = {"image_column": images.image_column, "label_column": label_column}
    train = open_images(source, config=images.data_config, split=images.data_split, **columns)
    check_every_class(source, train)
    eval_split = images.eval_split or validation_split(source, images.data_config)
    if eval_split:
        held_out = open_images(source, config=images.data_config, split=eval_split, **columns)
        held_out = number_alike(held_out, train.class_names, eval_split)
    else:
        train, held_out = hold_out(train, images.eval_fraction)
    check_sides(source, train.files, largest)
    return train, held_out


def open_images(data: str, *, config: str, split: str, image_column: str, label_column: str) -> LabelledImages:
    """Find and check labelled images without decoding them.

    Args:
        data: see `files.open_files`.
        config: likewise.
        split: likewise.
        image_column: likewise.
        label_column: column of the classes; "" = the only `ClassLabel`, or the one called label or cls.

    Raises:
        UsageError: nothing is there, the split or a column is not there, a label is no class, or there are
            fewer than two classes.
    """
    dataset, image = open_split(data, config, split, image_column, streaming=False)
    labels, class_names = _classes(dataset, pick_label(dataset, label_column, image))
    rows = np.arange(len(labels), dtype=np.int64)
    files = ImageFiles(without_decoding(dataset.select_columns([image]), image), image, rows)
    images = LabelledImages(files, labels, class_names)
    _check_labels(data, images)
    check_classes(data, class_names)
    return images


def hold_out(images: LabelledImages, fraction: float) -> tuple[LabelledImages, LabelledImages]:
    """Split each class at random, the same way at every call: all but `fraction` of its images, and these.

    Raises:
        UsageError: a class is too small to be in both.
    """
    is_held_out = np.zeros(len(images), dtype=bool)
    for label, name in enumerate(images.class_names):
        of_class = np.flatnonzero(images.labels == label)
        number = round(len(of_class) * fraction)
        expected = f"to leave images of each of the {len(images.class_names)} classes in both splits, not of {name}"
        expect(0 < number < len(of_class), "eval_fraction", fraction, expected)
        seed = derive_seed(HELD_OUT_SEED, "held out", label)
        is_held_out[of_class[shuffled_indices(np.arange(number), len(of_class), seed)]] = True
    return images.subset(np.flatnonzero(~is_held_out)), images.subset(np.flatnonzero(is_held_out))


def few_of_each_class(images: LabelledImages, number: int, seed: int) -> LabelledImages:
    """So many images of each class, all where there are fewer; a smaller number's are among a larger one's.

    Args:
        images: to choose from.
        number: of each class.
        seed: of the choice.
    """
    return images.subset(few_of_each(images.labels, number, seed))


def number_alike(images: LabelledImages, class_names: Sequence[str], split: str) -> LabelledImages:
    """Images to evaluate on with the classes of training, of which they may lack some.

    Where classes are texts, a split knows only those that it has.

    Args:
        images: to evaluate on.
        class_names: of training.
        split: that the images come from, for the message.

    Raises:
        UsageError: a class is none of training's.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = [name for name in images.class_names if name not in numbers]
    expected = f"the {len(numbers)} classes of training or some of them, not {', '.join(unknown[:5])}"
    expect(not unknown, "eval_split", split, expected)
    renumbered = np.array([numbers[name] for name in images.class_names], dtype=np.int64)
    return LabelledImages(images.files, renumbered[images.labels], tuple(class_names))


def check_classes(data: str, class_names: Sequence[str]) -> None:
    """Refuse data of one class.

    Raises:
        UsageError: it names the class.
    """
    if len(class_names) < 2:
        got = f"{len(class_names)}: {', '.join(class_names)}"
        raise UsageError(f"data: {data!r}: expected at least two classes, got {got}")


def check_every_class(data: str, images: LabelledImages) -> None:
    """Refuse data to train on in which a class has no image.

    Raises:
        UsageError: it names such classes.
    """
    names = images.class_names
    counts = np.bincount(images.labels, minlength=len(names))
    empty = [names[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        raise UsageError(f"data: {data!r}: expected images of each class, got none of {', '.join(empty[:5])}")


def pick_label(dataset: Any, asked: str, image: str) -> str:
    """The column of the classes, see `open_images`."""
    import datasets

    others = {name: feature for name, feature in dataset.features.items() if name != image}
    labels = [name for name, feature in others.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in ("label", "cls") if name in others]
    column = asked or next(iter(labels if len(labels) == 1 else usual), "")
    there = ", ".join(others) or "no column but the images"
    expect(column in others, "label_column", asked, f"the column of the classes, there are: {there}")
    return column


def _classes(dataset: Any, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class of each image, and the names; those of a column without a list of classes are its values, sorted."""
    feature, values = dataset.features[column], dataset.with_format(None)[column]
    names = getattr(feature, "names", None)
    values = list(values)
    if names is None:
        found = sorted(set(values), key=lambda value: (str(type(value)), value))
        known = {value: number for number, value in enumerate(found)}
        return np.array([known[value] for value in values], dtype=np.int64), tuple(map(str, found))
    return np.array([-1 if value is None else value for value in values], dtype=np.int64), tuple(names)


def _check_labels(data: str, images: LabelledImages) -> None:
    names, labels = images.class_names, images.labels
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        where = f"label {labels[wrong[0]]} of {images.files.name(int(wrong[0]))}"
        raise UsageError(
            f"data: {data!r}: expected labels from 0 to {len(names) - 1}, got {where}, {len(wrong)} in all"
        )
