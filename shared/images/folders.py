"""Images in folders: the class of each by the name of its folder, or what a metadata file beside them says of each.

    DATA/cat/1.png                              classes, no splits
    DATA/train/cat/1.png, DATA/test/cat/2.png   classes, and splits (see shared/data/local_files.py)
    DATA/metadata.jsonl, DATA/1.png             columns by file_name, a path from its folder on; also .csv, .parquet

`datasets` reads such folders too, but takes words in names of files for splits, leaves out folders whose names begin
with two underscores, follows no links, and cannot find names with brackets.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.command_line import UsageError, expect
from shared.data.local_files import SPLIT_WORDS, find_files, part_by_split

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

logger = logging.getLogger(__name__)


def is_image(file: Path) -> bool:
    """Whether a file's name is that of an image."""
    return file.suffix.lower() in IMAGE_SUFFIXES


def split_images(folder: Path) -> dict[str, list[Path]]:
    """The images of each split."""
    return part_by_split(folder, find_files(folder, is_image), by_file_name=False)


def open_image_folder(data: str, split: str) -> Any:
    """One split as `datasets` has it: the column image, with paths, and label or those of the metadata.

    Images of which the metadata says nothing are left out, and counted.

    Raises:
        UsageError: a metadata file cannot be read, or names no image that is there.
    """
    import datasets

    folder = Path(data).expanduser()
    splits = split_images(folder)
    metadata = find_files(folder, lambda file: file.name in METADATA_FILES)
    if metadata:
        return _with_metadata(data, splits[split], metadata)
    has_splits = all(any(map(_is_split, _folders(folder, file))) for files in splits.values() for file in files)
    classes = {file: _class_of(_folders(folder, file), has_splits) for files in splits.values() for file in files}
    columns: dict[str, Any] = {"image": [_image(str(file)) for file in splits[split]]}
    features: dict[str, Any] = {"image": datasets.Image()}
    if all(classes.values()):
        names = sorted(set(classes.values()))
        number_of = {name: number for number, name in enumerate(names)}
        columns["label"] = [number_of[classes[file]] for file in splits[split]]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def _image(file: str) -> dict[str, Any]:
    """As `datasets` has it; Arrow holds no name that is not UTF-8, so what lies in such a file is read now."""
    try:
        file.encode("utf-8")
    except UnicodeEncodeError:
        name = file.encode("utf-8", "backslashreplace").decode("utf-8")
        return {"path": name, "bytes": Path(file).read_bytes()}
    return {"path": file, "bytes": None}


def _folders(folder: Path, file: Path) -> tuple[str, ...]:
    """Names of the folders between both."""
    return file.relative_to(folder).parts[:-1]


def _is_split(name: str) -> bool:
    return name.lower() in SPLIT_WORDS


def _class_of(folders: tuple[str, ...], has_splits: bool) -> str:
    """The name of the folder that an image lies in; "" where that is the whole data or a split."""
    behind_split = next(place for place, name in enumerate(folders, 1) if _is_split(name)) if has_splits else 0
    return folders[-1] if len(folders) > behind_split else ""


def _with_metadata(data: str, files: Sequence[Path], metadata: Sequence[Path]) -> Any:
    """The images that the metadata names, and what it says of them."""
    import datasets

    rows: dict[str, dict[str, Any]] = {}
    for file in metadata:
        for row, record in enumerate(_records(data, file)):
            name = record.pop("file_name", None)
            is_name = isinstance(name, str) and bool(name)
            expect(is_name, "data", data, f"the name of an image, file_name, in row {row} of {file.name}, got {name!r}")
            rows[str(file.parent / name)] = record
    there = set(map(str, files))
    known = [name for name in rows if name in there]
    expect(bool(known), "data", data, f"images that {metadata[0].name} names, there is none of {sorted(rows)[:1]}")
    number = len(files) - len(known)
    if number:
        first = next(str(file) for file in files if str(file) not in rows)
        logger.warning("%d of %d images are in no metadata and left out, the first is %s", number, len(files), first)
    columns = sorted({column for name in known for column in rows[name]})
    try:
        table = {column: [rows[name].get(column) for name in known] for column in columns}
        images = datasets.Dataset.from_dict({"image": [_image(name) for name in known], **table})
        return images.cast_column("image", datasets.Image())
    except Exception as error:  # Arrow's and the library's errors about values of several kinds have no common class
        reason = " ".join(str(error).split())
        raise UsageError(f"data: {data!r}: expected columns of one kind in {metadata[0].name}: {reason}") from error


def _records(data: str, file: Path) -> list[dict[str, Any]]:
    """The rows of a metadata file."""
    import pandas
    import pyarrow.parquet

    try:
        if file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8-sig").splitlines()
            return [dict(json.loads(line)) for line in lines if line.strip()]
        if file.suffix == ".csv":
            table = pandas.read_csv(file, dtype={"file_name": str}, keep_default_na=False, na_values=[""])
            return [{key: None if value != value else value for key, value in row.items()} for row in _rows_of(table)]
        return pyarrow.parquet.read_table(file).to_pylist()
    except Exception as error:  # JSON's, pandas', Arrow's and decoding errors have no common class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"data: {data!r}: expected rows that can be read in {file.name}: {reason}") from error


def _rows_of(table: Any) -> list[dict[str, Any]]:
    return table.astype(object).to_dict("records")
