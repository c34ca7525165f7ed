"""Where labelled pictures come from: class folders, Parquet, WebDataset tars, or a Hub data set, read by index.

All of them go through `datasets`, which finds splits by the names of files and folders (train, validation or val,
test). The class of a picture is the name of its folder, a `ClassLabel` or text column, or the number in a tar's .cls.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError, expect
from shared.decoding import BadPicture, EncodedPicture
from shared.documents import is_hub_id
from shared.randomness import derive_seed, shuffled_indices

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SAMPLE = Path(__file__).parent / "data" / "fashion"
VALIDATION_SPLITS = ("validation", "val", "test")  # where none is named, the first of these that is there
HELD_OUT_SEED = 0  # of the pictures held out, so that runs of any seed compare
_SAMPLED_PICTURES = 64


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures and their classes.

    Args:
        dataset: of `datasets`; its picture column is not decoded.
        image_column: name of that column.
        labels: int64 (N,), the class of each.
        class_names: by class.
        indices: int64 (N,), the row of each in `dataset`.
    """

    dataset: Any
    image_column: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        """The bytes of a file; empty if it cannot be read."""
        image = self.dataset[int(self.indices[index])][self.image_column]
        if image["bytes"] is not None:
            return image["bytes"]
        try:
            return Path(image["path"]).read_bytes()
        except OSError:
            return b""

    def name(self, index: int) -> str:
        """Path of the file, or what the data set calls it, and its row."""
        row = int(self.indices[index])
        return f"{self.dataset[row][self.image_column]['path'] or 'unnamed'} (row {row})"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when classes, labels or, as far as some of the pictures tell, pictures do."""
        some = spread(len(self), _SAMPLED_PICTURES)
        parts = (self.class_names, self.labels.tobytes(), [self.read(index) for index in some])
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def subset(self, chosen: np.ndarray) -> "Pictures":
        """Those at the given positions."""
        return Pictures(self.dataset, self.image_column, self.labels[chosen], self.class_names, self.indices[chosen])


def spread(size: int, number: int) -> list[int]:
    """At most `number` positions, evenly over `range(size)`."""
    return np.unique(np.linspace(0, size - 1, min(size, number), dtype=np.int64)).tolist()


def open_pictures(data: str, *, config: str, split: str, image_column: str, label_column: str) -> Pictures:
    """Find and check labelled pictures without decoding them.

    Args:
        data: "sample", a .parquet or .tar file, a folder of them or of class folders, or a Hub id.
        config: configuration of a Hub data set; "" = its only one.
        split: such as train or validation.
        image_column: column of the pictures; "" = the only one that holds pictures.
        label_column: column of the classes; "" = the only `ClassLabel`, or the one called label or cls.

    Raises:
        UsageError: nothing is there, the split or a column is not there, a label is no class, or there are
            fewer than two classes.
    """
    import datasets

    dataset, picture, label = open_dataset(data, config, split, image_column, label_column, streaming=False)
    dataset = dataset.cast_column(picture, datasets.Image(decode=False))
    labels, class_names = _classes(dataset, label)
    kept = dataset.select_columns([picture])
    pictures = Pictures(kept, picture, labels, class_names, np.arange(len(labels), dtype=np.int64))
    _check_labels(data, pictures)
    check_classes(data, class_names)
    return pictures


def open_dataset(
    data: str, config: str, split: str, image_column: str, label_column: str, *, streaming: bool
) -> tuple[Any, str, str]:
    """A split as `datasets` has it, and the names of its columns of pictures and of classes; see `open_pictures`."""
    import datasets

    splits = list_splits(data, config)
    expect(split in splits, "data_split", split, f"one of {', '.join(splits)}, the splits of {data!r}")
    with _load_errors(data):
        dataset = datasets.load_dataset(**_builder(data, config), split=split, streaming=streaming)
    picture = _pick_picture(dataset, image_column)
    return dataset, picture, _pick_label(dataset, label_column, picture)


def list_splits(data: str, config: str) -> list[str]:
    """The splits of a data set, in the form of `open_pictures`, found without loading it."""
    import datasets

    with _load_errors(data):
        source = _builder(data, config)
        return datasets.get_dataset_split_names(source.pop("path"), source.pop("name", None), **source)


def validation_split(data: str, config: str) -> str:
    """The split to evaluate on; "" if the data set has none."""
    splits = list_splits(data, config)
    return next((split for split in VALIDATION_SPLITS if split in splits), "")


def hold_out(pictures: Pictures, fraction: float) -> tuple[Pictures, Pictures]:
    """Split each class at random, the same way at every call: all but `fraction` of its pictures, and these.

    Raises:
        UsageError: a class is too small to be in both.
    """
    is_held_out = np.zeros(len(pictures), dtype=bool)
    for label, name in enumerate(pictures.class_names):
        of_class = np.flatnonzero(pictures.labels == label)
        number = round(len(of_class) * fraction)
        expected = f"to leave pictures of each of the {len(pictures.class_names)} classes in both splits, not of {name}"
        expect(0 < number < len(of_class), "eval_fraction", fraction, expected)
        seed = derive_seed(HELD_OUT_SEED, "held out", label)
        is_held_out[of_class[shuffled_indices(np.arange(number), len(of_class), seed)]] = True
    return pictures.subset(np.flatnonzero(~is_held_out)), pictures.subset(np.flatnonzero(is_held_out))


def check_classes(data: str, class_names: Sequence[str]) -> None:
    """Refuse data of one class.

    Raises:
        UsageError: it names the class.
    """
    if len(class_names) < 2:
        got = f"{len(class_names)}: {', '.join(class_names)}"
        raise UsageError(f"data: {data!r}: expected at least two classes, got {got}")


def check_every_class(data: str, pictures: Pictures) -> None:
    """Refuse data to train on in which a class has no picture.

    Raises:
        UsageError: it names such classes.
    """
    names = pictures.class_names
    counts = np.bincount(pictures.labels, minlength=len(names))
    empty = [names[label] for label in np.flatnonzero(counts == 0)]
    if empty:
        raise UsageError(f"data: {data!r}: expected pictures of each class, got none of {', '.join(empty[:5])}")


def check_sides(data: str, pictures: Pictures, least: int) -> None:
    """Refuse a data set most of whose pictures are smaller than the crops, as far as some of them tell.

    A few small ones, as ImageNet has, are enlarged.

    Raises:
        UsageError: the median of the shorter sides is below `least` pixels, or none of these can be decoded.
    """
    sides = []
    for index in spread(len(pictures), _SAMPLED_PICTURES):
        with contextlib.suppress(BadPicture):
            picture = EncodedPicture(pictures.read(index))
            sides.append(min(picture.width, picture.height))
    expect(bool(sides), "data", data, "pictures that can be decoded, none of those tried could be")
    median = int(np.median(sides))
    expected = (
        f"pictures of at least {least} pixels, the size of the crops; the median of the shorter sides is {median}"
    )
    expect(median >= least, "data", data, expected)


def _builder(data: str, config: str) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset`, which picks a format of its own accord only where a folder holds one."""
    path = SAMPLE if data == "sample" else Path(os.path.expanduser(data))
    if not data or not path.exists():
        return {"path": data, "name": config or None}
    kind = _kind_of(data, path)
    if path.is_file():
        return {"path": kind, "data_files": {"train": str(path)}}
    return {"path": kind, "data_dir": str(path), **({"drop_labels": False} if kind == "imagefolder" else {})}


def _kind_of(data: str, path: Path) -> str:
    """The builder for what is at `path`."""
    names = [path.name] if path.is_file() else (name for _, _, files in os.walk(path) for name in files)
    kinds = {".parquet": "parquet", ".tar": "webdataset"}
    if path.is_dir():
        kinds |= dict.fromkeys(PICTURE_SUFFIXES, "imagefolder")
    found = next(filter(None, (kinds.get(Path(name).suffix.lower()) for name in names if name[0] != ".")), None)
    if found is None:
        expected = "a .parquet or .tar file, or a folder of such files or of one folder of pictures for each class"
        raise UsageError(f"data: {data!r}: expected {expected}, found none in it")
    return found


@contextlib.contextmanager
def _load_errors(data: str) -> Iterator[None]:
    is_there = data == "sample" or (data and Path(os.path.expanduser(data)).exists())
    if not is_there and not is_hub_id(data):
        raise UsageError(f"data: {data!r}: expected sample, a file or folder that exists, or a Hub data set id")
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # network, cache and format errors have no common class
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise UsageError(f"data: {data!r}: expected a data set of pictures that can be read: {reason}") from error


def _pick_picture(dataset: Any, asked: str) -> str:
    import datasets

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    column = asked or (columns[0] if len(columns) == 1 else "")
    there = ", ".join(columns) or "none does"
    expect(column in columns, "image_column", asked, f"a column that holds pictures, of which there are: {there}")
    return column


def _pick_label(dataset: Any, asked: str, picture: str) -> str:
    import datasets

    others = {name: feature for name, feature in dataset.features.items() if name != picture}
    labels = [name for name, feature in others.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in ("label", "cls") if name in others]
    column = asked or next(iter(labels if len(labels) == 1 else usual), "")
    there = ", ".join(others) or "no column but the pictures"
    expect(column in others, "label_column", asked, f"the column of the classes, there are: {there}")
    return column


def _classes(dataset: Any, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class of each picture, and the names; those of a column without a list of classes are its values, sorted."""
    feature, values = dataset.features[column], dataset.with_format(None)[column]
    names = getattr(feature, "names", None)
    values = list(values)
    if names is None:
        found = sorted(set(values), key=lambda value: (str(type(value)), value))
        known = {value: number for number, value in enumerate(found)}
        return np.array([known[value] for value in values], dtype=np.int64), tuple(map(str, found))
    return np.array([-1 if value is None else value for value in values], dtype=np.int64), tuple(names)


def _check_labels(data: str, pictures: Pictures) -> None:
    names, labels = pictures.class_names, pictures.labels
    wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(wrong):
        where = f"label {labels[wrong[0]]} of {pictures.name(int(wrong[0]))}"
        raise UsageError(
            f"data: {data!r}: expected labels from 0 to {len(names) - 1}, got {where}, {len(wrong)} in all"
        )
