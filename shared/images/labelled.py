"""Images and their classes: class folders, Parquet, WebDataset tars, or a Hub data set, read by index.

The class of an image is the name of its folder, a `ClassLabel` or text column, or the number in a tar's .cls. A column
of lists gives an image several labels, or none.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError, expect, whole_numbers
from shared.data.subsets import few_of_each, held_out_of_each
from shared.fields import Images
from shared.images.files import (
    ImageFiles,
    check_eight_bits,
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
        labels: int64 (N,), the class of each; or int64 (N, C), 1 for each of several labels that it has, else 0.
        class_names: by class.
    """

    files: ImageFiles
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def has_several(self) -> bool:
        """Whether an image can have several labels."""
        return self.labels.ndim == 2

    @property
    def counts(self) -> np.ndarray:
        """Images of each class, int64 (C,)."""
        return self.labels.sum(0) if self.has_several else np.bincount(self.labels, minlength=len(self.class_names))

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
    expect(not train.has_several, "label_column", label_column, "a column with one class an image, not lists of them")
    check_classes(source, train.class_names)
    check_every_class(source, train)
    eval_split = images.eval_split or validation_split(source, images.data_config)
    if eval_split:
        held_out = open_images(source, config=images.data_config, split=eval_split, **columns)
        held_out = number_alike(held_out, train.class_names, eval_split, has_several=False)
    else:
        train, held_out = hold_out(train, images.eval_fraction)
    check_sides(source, train.files, largest)
    return train, held_out


def open_images(
    data: str, *, config: str, split: str, image_column: str, label_column: str, field: str = "data_split"
) -> LabelledImages:
    """Find and check labelled images without decoding them.

    Args:
        data: see `files.open_files`.
        config: likewise.
        split: likewise.
        image_column: likewise.
        label_column: column of the classes; "" = the only `ClassLabel`, or the one called label or cls.
        field: that names the split, for the message.

    Raises:
        UsageError: nothing is there, the split or a column is not there, a label is no class, or images have 16 bits a
            pixel.
    """
    dataset, image = open_split(data, config, split, image_column, streaming=False, field=field)
    labels, class_names = _classes(dataset, pick_label(dataset, label_column, image))
    rows = np.arange(len(labels), dtype=np.int64)
    files = ImageFiles(without_decoding(dataset.select_columns([image]), image), image, rows)
    images = LabelledImages(files, labels, class_names)
    _check_labels(data, images)
    check_eight_bits(data, files)
    return images


def hold_out(images: LabelledImages, fraction: float) -> tuple[LabelledImages, LabelledImages]:
    """Split each class at random, the same way at every call: all but `fraction` of its images, and these.

    Raises:
        UsageError: a class is too small to be in both.
    """
    # With several labels, of all images together.
    is_held_out = held_out_of_each(np.zeros(len(images), np.int64) if images.has_several else images.labels, fraction)
    lacking = [name for name, count in zip(images.class_names, images.counts, strict=True) if count < 2]
    few = ", ".join(lacking[:5])
    expected = f"two images of each of the {len(images.class_names)} classes, one for each side, not fewer of {few}"
    expect(not lacking or images.has_several, "eval_fraction", fraction, expected)
    return images.subset(np.flatnonzero(~is_held_out)), images.subset(np.flatnonzero(is_held_out))


def few_of_each_class(images: LabelledImages, number: int, seed: int) -> LabelledImages:
    """So many images of each class, all where there are fewer; a smaller number's are among a larger one's.

    Args:
        images: to choose from.
        number: of each class.
        seed: of the choice.

    Raises:
        UsageError: an image can have several labels.
    """
    expect(not images.has_several, "labels_per_class", number, "0 for images with several labels")
    return images.subset(few_of_each(images.labels, number, seed))


def of_classes(images: LabelledImages, field: str, text: str) -> LabelledImages:
    """The images of some classes alone, which are numbered anew in the order in which they are named.

    Args:
        images: to choose from.
        field: name for the message.
        text: numbers of the classes, with commas.

    Raises:
        UsageError: it names something else, a class twice or only one, or an image can have several labels.
    """
    expect(not images.has_several, field, text, '"" for images with several labels')
    numbers, names = whole_numbers(field, text, least=0), images.class_names
    is_right = len(set(numbers)) == len(numbers) > 1 and max(numbers) < len(names)
    expect(is_right, field, text, f"different classes, at least two, of those from 0 to {len(names) - 1}")
    new = np.full(len(names), -1)
    new[numbers] = np.arange(len(numbers))
    chosen = images.subset(np.flatnonzero(new[images.labels] >= 0))
    return LabelledImages(chosen.files, new[chosen.labels], tuple(names[number] for number in numbers))


def number_alike(
    images: LabelledImages, class_names: Sequence[str], split: str, field: str = "eval_split", *, has_several: bool
) -> LabelledImages:
    """Images to evaluate on with the classes of training, of which they may lack some.

    Where classes are texts, a split knows only those that it has.

    Args:
        images: to evaluate on.
        class_names: of training.
        split: that the images come from, for the message.
        field: that names it, likewise.
        has_several: whether images of training can have several labels.

    Raises:
        UsageError: a class is none of training's, or one of both has lists of labels.
    """
    expected = f"{'lists of labels' if has_several else 'one label'} for each image, as in training"
    expect(images.has_several == has_several, field, split, expected)
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = [name for name in images.class_names if name not in numbers]
    expected = f"the {len(numbers)} classes of training or some of them, not {', '.join(unknown[:5])}"
    expect(not unknown, field, split, expected)
    renumbered = np.array([numbers[name] for name in images.class_names], dtype=np.int64)
    if not images.has_several:
        return LabelledImages(images.files, renumbered[images.labels], tuple(class_names))
    labels = np.zeros((len(images), len(class_names)), dtype=np.int64)
    labels[:, renumbered] = images.labels
    return LabelledImages(images.files, labels, tuple(class_names))


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
    empty = [images.class_names[label] for label in np.flatnonzero(images.counts == 0)]
    if empty:
        raise UsageError(f"data: {data!r}: expected images of each class, got none of {', '.join(empty[:5])}")


def pick_label(dataset: Any, asked: str, image: str) -> str:
    """The column of the classes, see `open_images`."""
    import datasets

    others = {name: feature for name, feature in dataset.features.items() if name != image}
    # Of lists, what they list.
    classes = {name: getattr(feature, "feature", feature) for name, feature in others.items()}
    labels = [name for name, feature in classes.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in ("label", "cls") if name in others]
    column = asked or next(iter(labels if len(labels) == 1 else usual), "")
    there = ", ".join(others) or "no column but the images"
    expect(column in others, "label_column", asked, f"the column of the classes, there are: {there}")
    is_flat = not isinstance(classes[column], dict)
    expect(is_flat, "label_column", column, "a column of classes or of lists of them, not of structures")
    return column


def _classes(dataset: Any, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class of each image, and the names; those of a column without a list of classes are its values, sorted."""
    feature, values = dataset.features[column], list(dataset.with_format(None)[column])
    if (listed := getattr(feature, "feature", None)) is not None:
        return _several_classes(values, getattr(listed, "names", None), column)
    names = getattr(feature, "names", None)
    if names is None:
        values = [None if value != value else value for value in values]  # of numbers, where one is missing
        found = sorted(set(values) - {None}, key=lambda value: (str(type(value)), value))
        known = {value: number for number, value in enumerate(found)}
        return np.array([known.get(value, -1) for value in values], dtype=np.int64), tuple(map(str, found))
    return np.array([-1 if value is None else value for value in values], dtype=np.int64), tuple(names)


def _several_classes(
    values: list[list[Any]], names: list[str] | None, column: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Which classes each image has, (N, C) of 0 and 1, and the names, as in `_classes`."""
    for row, listed in enumerate(values):
        is_right = listed is not None and all(listed.count(value) == 1 for value in listed)
        is_right = is_right and all(isinstance(value, str | int) for value in listed or [])
        expected = f"lists of the classes that an image has, each once, [] where it has none; row {row} has {listed}"
        expect(is_right, "label_column", column, expected)
    found = sorted({value for row in values for value in row}, key=lambda value: (str(type(value)), value))
    known = {number: number for number in range(len(names))} if names else {value: n for n, value in enumerate(found)}
    for row, value in ((row, value) for row, listed in enumerate(values) for value in listed):
        expect(value in known, "label_column", column, f"labels from 0 to {len(known) - 1}, row {row} has {value!r}")
    labels = np.zeros((len(values), len(known)), dtype=np.int64)
    for row, listed in enumerate(values):
        labels[row, [known[value] for value in listed]] = 1
    return labels, tuple(names or map(str, found))


def _check_labels(data: str, images: LabelledImages) -> None:
    names, labels = images.class_names, images.labels
    if images.has_several:
        return  # checked one by one
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        label, image = labels[wrong[0]], images.files.name(int(wrong[0]))
        got = f"{f'label {label}' if label != -1 else 'none'} of {image}, {len(wrong)} such images"
        raise UsageError(f"data: {data!r}: expected a label from 0 to {len(names) - 1} of each image, got {got}")
