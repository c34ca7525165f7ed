"""Texts, or pairs of them, and their labels: local files or a Hub data set, checked before anything is trained.

Labels are classes (a `ClassLabel` column, texts or whole numbers), numbers (floating-point), or a list of classes, one
for each of the words that the text column then holds.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shared.command_line import UsageError, expect
from shared.data.batches import IGNORED
from shared.data.local_files import split_named
from shared.data.subsets import few_of_each, held_out_of_each
from shared.text.tables import in_utf8, load_splits

SAMPLES = Path(__file__).parents[1] / "samples"

Problem = Literal["classes", "numbers", "tags"]


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledTexts:
    """N samples.

    Attributes:
        problem: what the labels are: classes, numbers, or tags of words.
        texts: of each sample the text, or its words where these have tags.
        pairs: of each its second text; None = there is only one.
        labels: int64 (N,) classes, float32 (N,) numbers, or of each sample the classes of its words.
        class_names: by class; () for numbers.
    """

    problem: Problem
    texts: Sequence[Any]
    pairs: Sequence[str] | None
    labels: Any
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        """Changes when a text, a label or a class does."""
        digest = hashlib.sha256(repr((self.problem, self.class_names)).encode())
        for text, pair, label in zip(self.texts, self.pairs or self.texts, list(self.labels), strict=True):
            digest.update(repr((text, pair, label)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()[:16]

    def named(self, labels: Sequence[np.ndarray]) -> list[Any]:
        """Labels or answers of texts, each (N,), as people read them: a class's name, a number, or names of tags."""
        if self.problem == "numbers":
            return [float(number) for [number] in labels]
        names = [[self.class_names[label] for label in of_text.tolist()] for of_text in labels]
        return names if self.problem == "tags" else [name for [name] in names]

    def subset(self, chosen: np.ndarray) -> "LabelledTexts":
        """Those at the given positions."""
        places = chosen.tolist()
        labels = [self.labels[place] for place in places] if self.problem == "tags" else self.labels[chosen]
        pairs = self.pairs and [self.pairs[place] for place in places]
        return dataclasses.replace(self, texts=[self.texts[place] for place in places], pairs=pairs, labels=labels)


def open_labelled(
    data: str,
    *,
    config: str,
    split: str,
    columns: Sequence[str],
    label_column: str,
    class_names: Sequence[str] | None,
    field: str = "data_split",
) -> LabelledTexts:
    """Read one split.

    Args:
        data: a file, a folder with files named after splits, or a Hub id.
        config: configuration of a Hub data set; "" = its only one.
        split: name of the split; a single file has train alone.
        columns: of the text, and of the second text if there is one.
        label_column: of the labels.
        class_names: those of the training data, whose numbers these labels are to have; None = this is the training
            data.
        field: that names the split, for the message.

    Raises:
        UsageError: something is not there, or not what it must be; it names column, row and what was expected.
    """
    splits = load_splits(data, config)
    name = split_named(split, list(splits))
    expect(bool(name), field, split, f"one of the splits of {data!r}: {', '.join(splits)}")
    table = splits[name]
    for field, column in (
        *zip(("text_column", "text_pair_column"), columns, strict=False),
        ("label_column", label_column),
    ):
        expect(column in table.column_names, field, column, f"a column of {data!r}: {', '.join(table.column_names)}")
    expect(len(table) > 0, "data", data, f"at least one sample in the split {split}")
    problem, names = _problem_of(table.features[label_column], table, label_column)
    with in_utf8(data):
        texts = [list(table[column]) for column in columns]
    for field, column, values in zip(("text_column", "text_pair_column"), columns, texts, strict=False):
        _check_texts(field, column, values, problem)
    where = f"in the split {split} of {data!r}"
    known = tuple(class_names) if class_names is not None else names
    if problem == "tags":
        _check_tags(texts[0], table[label_column], label_column)
    labels = _labels(problem, table.features[label_column], table[label_column], known, label_column, where)
    pairs = texts[1] if len(texts) > 1 else None
    opened = LabelledTexts(problem, texts[0], pairs, labels, known)
    if class_names is None and problem == "classes":
        _check_every_class(opened, label_column, where)
    return opened


def hold_out(samples: LabelledTexts, fraction: float) -> tuple[LabelledTexts, LabelledTexts]:
    """Part samples in those to train on and a share to evaluate on, of each class where there are classes.

    Raises:
        UsageError: too few are left for one of both.
    """
    groups = samples.labels if samples.problem == "classes" else np.zeros(len(samples), dtype=np.int64)
    is_held_out = held_out_of_each(groups, fraction)
    expect(0 < is_held_out.sum() < len(samples), "eval_fraction", fraction, "a share that leaves samples on both sides")
    return samples.subset(np.flatnonzero(~is_held_out)), samples.subset(np.flatnonzero(is_held_out))


def few_of_each_class(samples: LabelledTexts, number: int, seed: int) -> LabelledTexts:
    """So many samples of each class, all where there are fewer; a smaller number's are among a larger one's.

    Args:
        samples: with classes.
        number: of each class.
        seed: of the choice.
    """
    return samples.subset(few_of_each(samples.labels, number, seed))


def _problem_of(feature: Any, table: Any, label_column: str) -> tuple[Problem, tuple[str, ...]]:
    """What the labels of the column are, and the names of their classes."""
    import datasets

    inner = getattr(feature, "feature", None)
    if inner is not None:
        if isinstance(inner, datasets.ClassLabel):
            return "tags", tuple(inner.names)
        return "tags", _names_of({value for row in table[label_column] for value in row or []})
    if isinstance(feature, datasets.ClassLabel):
        return "classes", tuple(feature.names)
    if feature.dtype.startswith("float"):
        return "numbers", ()
    return "classes", _names_of(set(table[label_column]))


def _names_of(values: set[Any]) -> tuple[str, ...]:
    return tuple(str(value) for value in sorted(values - {None}, key=lambda value: (isinstance(value, str), value)))


def _labels(
    problem: Problem, feature: Any, values: Sequence[Any], names: tuple[str, ...], column: str, where: str
) -> Any:
    """The labels as `LabelledTexts` has them."""
    if problem == "numbers":
        numbers = np.array([np.nan if value is None else value for value in values], dtype=np.float32)
        for row in np.flatnonzero(~np.isfinite(numbers))[:1].tolist():
            raise UsageError(f"label_column: {column!r}: expected a finite number, row {row} {where} has {values[row]}")
        return numbers
    own = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    number_of = {name: number for number, name in enumerate(names)}

    def number(value: Any, row: int) -> int:
        name = own[value] if own and isinstance(value, int) and 0 <= value < len(own) else str(value)
        if value is None or name not in number_of:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            expected = f"expected a class of the training data ({known})"
            raise UsageError(f"label_column: {column!r}: {expected}, row {row} {where} has {value!r}")
        return number_of[name]

    if problem == "classes":
        return np.array([number(value, row) for row, value in enumerate(values)], dtype=np.int64)
    return [
        [IGNORED if value == IGNORED else number(value, row) for value in labels] for row, labels in enumerate(values)
    ]


def _check_texts(field: str, column: str, values: Sequence[Any], problem: Problem) -> None:
    for row, value in enumerate(values):
        if problem == "tags" and field == "text_column":
            is_right = isinstance(value, list) and all(isinstance(word, str) for word in value)
            expect(is_right, field, column, f"a list of words in every row, row {row} has {type(value).__name__}")
        else:
            expect(isinstance(value, str), field, column, f"a text in every row, row {row} has {value!r}")


def _check_tags(texts: Sequence[Any], labels: Sequence[Any], column: str) -> None:
    for row, (words, tags) in enumerate(zip(texts, labels, strict=True)):
        expected = f"a label for each of the {len(words)} words of row {row}"
        expect(tags is not None and len(tags) == len(words), "label_column", column, expected)


def _check_every_class(samples: LabelledTexts, column: str, where: str) -> None:
    counts = np.bincount(samples.labels, minlength=len(samples.class_names))
    missing = ", ".join(samples.class_names[label] for label in np.flatnonzero(counts == 0)[:5].tolist())
    expect(not missing, "label_column", column, f"a sample of every class {where}, there is none of {missing}")
    expect(len(samples.class_names) > 1, "label_column", column, f"two classes at least {where}")
