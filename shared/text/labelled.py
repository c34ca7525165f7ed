"""Texts, or pairs of them, and their labels: local files or a Hub data set, checked before anything is trained.

Labels are classes (a `ClassLabel` column, texts or whole numbers), numbers (floating-point), or a list of classes, one
for each of the words that the text column then holds. The first two can be asked for by name. Texts that look like
numbers with a point are neither by themselves.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shared.command_line import UsageError, expect
from shared.data.batches import IGNORED
from shared.data.local_files import split_named
from shared.data.subsets import few_of_each, held_out_of_each
from shared.text.tables import in_utf8, load_split, split_names

SAMPLES = Path(__file__).parents[1] / "samples"

Problem = Literal["classes", "numbers", "tags"]
LabelKind = Literal["auto", "classes", "numbers"]
_WHOLE = re.compile(r"-?(0|[1-9]\d*)")
_NUMBER = re.compile(r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?")  # 01 is a name
_POINTED = re.compile(r"[-+]?\d*[.,]\d+")


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledTexts:
    """N samples.

    Attributes:
        problem: what the labels are: classes, numbers, or tags of words.
        texts: of each sample the text, or its words where these have tags.
        pairs: of each its second text; None = there is only one.
        labels: int64 (N,) classes, float32 (N,) numbers, or of each sample the classes of its words.
        class_names: by class; () for numbers.
        rows: int64 (N,), which ones of their split they are.
    """

    problem: Problem
    texts: Sequence[Any]
    pairs: Sequence[str] | None
    labels: Any
    class_names: tuple[str, ...]
    rows: np.ndarray

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
        texts = [self.texts[place] for place in places]
        return dataclasses.replace(self, texts=texts, pairs=pairs, labels=labels, rows=self.rows[chosen])


def open_labelled(
    data: str,
    *,
    config: str,
    split: str,
    columns: Sequence[str],
    label_column: str,
    label_kind: LabelKind,
    like: LabelledTexts | None,
    field: str = "data_split",
) -> LabelledTexts:
    """Read one split.

    Args:
        data: a file, a folder with files named after splits, or a Hub id.
        config: configuration of a Hub data set; "" = its only one.
        split: name of the split; a single file has train alone.
        columns: of the text, and of the second text if there is one.
        label_column: of the labels.
        label_kind: what they are where they are no lists; auto = by themselves.
        like: the training data, whose kind of labels and numbers of classes these are to have; None = this is it.
        field: that names the split, for the message.

    Raises:
        UsageError: something is not there, or not what it must be; it names column, row and what was expected.
    """
    splits = split_names(data, config)
    name = split_named(split, splits)
    expect(bool(name), field, split, f"one of the splits of {data!r}: {', '.join(splits)}")
    table = load_split(data, config, name)
    for field, column in (
        *zip(("text_column", "text_pair_column"), columns, strict=False),
        ("label_column", label_column),
    ):
        expect(column in table.column_names, field, column, f"a column of {data!r}: {', '.join(table.column_names)}")
    expect(len(table) > 0, "data", data, f"at least one sample in the split {split}")
    where = f"in the split {split} of {data!r}"
    with in_utf8(data):
        texts = [list(table[column]) for column in columns]
    feature, labels = table.features[label_column], list(table[label_column])
    if not _lists_of(feature):
        labels = _read_labels(feature, labels, label_column, like.problem if like else label_kind, where)
    problem = _problem_of(feature, labels)
    if problem == "tags":
        has_words = isinstance(texts[0][0], list)
        expected = "one label for each text, or with them a text_column of lists of words; several labels are not known"
        expect(has_words, "label_column", label_column, f"{expected}, row 0 {where} has {labels[0]!r}")
    for field, column, values in zip(("text_column", "text_pair_column"), columns, texts, strict=False):
        _check_texts(field, column, values, problem)
    if problem == "tags":
        _check_tags(texts[0], labels, label_column)
    if like:
        expected = f"{like.problem} {where}, as in the training data, got {problem}"
        expect(problem == like.problem, "label_column", label_column, expected)
    known = like.class_names if like else _class_names(feature, labels) if problem != "numbers" else ()
    numbered = _numbered(problem, feature, labels, known, label_column, where)
    pairs, rows = texts[1] if len(texts) > 1 else None, np.arange(len(labels))
    opened = LabelledTexts(problem, texts[0], pairs, numbered, known, rows)
    if like is None and problem == "classes":
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


def _lists_of(feature: Any) -> Any:
    """What the lists of a column hold; None = it has no lists."""
    return getattr(feature, "feature", None)


def _read_labels(feature: Any, values: list[Any], column: str, kind: str, where: str) -> list[Any]:
    """Labels that are no lists, of one kind: names and whole numbers (classes), or floats (numbers).

    Raises:
        UsageError: a row has none or something else, or texts look like numbers and it is not said what they are.
    """
    names = getattr(feature, "names", None)
    for row, value in enumerate(values):
        is_there = value is not None and value == value and (not names or 0 <= value < len(names))
        expect(is_there, "label_column", column, f"a label in every row, row {row} {where} has {value!r}")
        is_right = isinstance(value, str | int | float)
        expect(is_right, "label_column", column, f"a name or a number in every row, row {row} {where} has {value!r}")
    values = [names[value] for value in values] if names else values
    if kind == "numbers":
        return [_to_number(value, row, column, where) for row, value in enumerate(values)]
    if kind == "classes" or names:
        return [_to_name(value) for value in values]
    texts = [value for value in values if isinstance(value, str)]
    for row, value in enumerate(values):
        is_alike = isinstance(value, str) == bool(texts)
        expected = f"names alone or numbers alone, or label_kind classes or numbers; row {row} {where} has {value!r}"
        expect(is_alike, "label_column", column, expected)
    if not texts:
        has_points = any(isinstance(value, float) for value in values)
        return [float(value) for value in values] if has_points else values
    if all(map(_WHOLE.fullmatch, texts)):  # as .csv files have them
        return [int(text) for text in texts]
    if all(map(_NUMBER.fullmatch, texts)):
        return [float(text) for text in texts]
    pointed = [text for text in texts if _POINTED.fullmatch(text)]
    others = [row for row, text in enumerate(texts) if not _NUMBER.fullmatch(text)]
    expected = f"numbers alone, as {pointed[:1]} is, or label_kind classes; row {others[0]} {where} has "
    expect(not pointed, "label_column", column, expected + repr(texts[others[0]]))
    return texts


def _to_number(value: Any, row: int, column: str, where: str) -> float:
    try:
        number = float(np.float32(value))
    except ValueError:
        number = math.nan
    expected = f"a finite number in every row, row {row} {where} has {value!r}"
    expect(math.isfinite(number), "label_column", column, expected)
    return number


def _to_name(value: Any) -> Any:
    """A class's name or whole number; a .csv column with points has 1.0 for 1."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else str(value)
    return int(value) if isinstance(value, str) and _WHOLE.fullmatch(value) else value


def _problem_of(feature: Any, labels: list[Any]) -> Problem:
    if _lists_of(feature):
        return "tags"
    return "numbers" if any(isinstance(label, float) for label in labels) else "classes"


def _class_names(feature: Any, labels: list[Any]) -> tuple[str, ...]:
    """The classes that a column knows, else those that it has, sorted."""
    names = getattr(_lists_of(feature) or feature, "names", None)
    if names:
        return tuple(names)
    found = {value for row in labels for value in row or []} if _lists_of(feature) else set(labels)
    return tuple(str(value) for value in sorted(found - {None}, key=lambda value: (isinstance(value, str), value)))


def _numbered(
    problem: Problem, feature: Any, labels: list[Any], names: tuple[str, ...], column: str, where: str
) -> Any:
    """The labels as `LabelledTexts` has them."""
    if problem == "numbers":
        return np.array(labels, dtype=np.float32)
    own = getattr(_lists_of(feature), "names", None)  # of tags, which are numbers still
    number_of = {name: number for number, name in enumerate(names)}

    def number(value: Any, row: int) -> int:
        name = own[value] if own and isinstance(value, int) and 0 <= value < len(own) else str(value)
        if value is None or name not in number_of:
            known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            expected = f"expected a class of the training data ({known})"
            raise UsageError(f"label_column: {column!r}: {expected}, row {row} {where} has {value!r}")
        return number_of[name]

    if problem == "classes":
        return np.array([number(value, row) for row, value in enumerate(labels)], dtype=np.int64)
    return [[IGNORED if value == IGNORED else number(value, row) for value in tags] for row, tags in enumerate(labels)]


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
