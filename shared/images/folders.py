"""Images in folders: the class of each by the name of its folder, or what a metadata file beside them says of each.

    DATA/cat/1.png                              classes, no splits
    DATA/train/cat/1.png, DATA/test/cat/2.png   classes, and splits (see shared/data/local_files.py)
    DATA/metadata.jsonl, DATA/1.png             columns by file_name, a path from its folder on; also .csv, .parquet

`datasets` reads such folders too, but takes words in names of files for splits, leaves out folders whose names begin
with two underscores, follows no links, and cannot find names with brackets.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.command_line import UsageError, expect, one_line
from shared.data import left_out
from shared.data.csv_rows import read_csv
from shared.data.local_files import SPLIT_WORDS, part_by_split
from shared.data.text_lines import read_lines

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

_WHOLE = re.compile(r"-?(0|[1-9]\d*)")


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_metadata(name: str) -> bool:
    """Whether a file's name is that of metadata."""
    return name.lower() in METADATA_FILES


def open_image_folder(data: str, folder: Path, images: Sequence[Path], metadata: Sequence[Path], split: str) -> Any:
    """One split as `datasets` has it: the column image, with paths, and label or those of the metadata.

    Images of which the metadata says nothing are left out, and so are its rows without an image; both are counted.

    Args:
        data: name for messages.
        folder: that was searched.
        images: found in it.
        metadata: metadata files found in it.
        split: one of those by `part_by_split`.

    Raises:
        UsageError: a metadata file cannot be read, or names no image that is there.
    """
    import datasets

    splits = part_by_split(folder, images, by_file_name=False)
    if metadata:
        return _with_metadata(data, split, splits[split], images, metadata)
    start = len(folder.parts)
    has_splits = all(any(map(_is_split, file.parts[start:-1])) for file in images)
    classes = {file: _class_of(file.parts[start:-1], has_splits) for file in images}
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


def _is_split(name: str) -> bool:
    return name.lower() in SPLIT_WORDS


def _class_of(folders: tuple[str, ...], has_splits: bool) -> str:
    """The name of the folder that an image lies in; "" where that is the whole data or a split."""
    behind_split = next(place for place, name in enumerate(folders, 1) if _is_split(name)) if has_splits else 0
    return folders[-1] if len(folders) > behind_split else ""


def _with_metadata(
    data: str, split: str, files: Sequence[Path], everywhere: Sequence[Path], metadata: Sequence[Path]
) -> Any:
    """The images of a split that the metadata names, each as often as it does, and what it says of them."""
    import datasets

    of_split, anywhere = set(map(str, files)), set(map(str, everywhere))
    rows: list[tuple[str, dict[str, Any]]] = []
    named: dict[str, Path] = {}  # in which file
    num_without = 0
    for file in metadata:
        for row, record in enumerate(_records(data, file)):
            name = record.pop("file_name", None)
            is_name = isinstance(name, str) and bool(name)
            there = f"{name!r} beside {', '.join(record) or 'nothing'}"
            expect(is_name, "data", data, f"the name of an image, file_name, in row {row} of {file.name}, got {there}")
            expect("image" not in record, "data", data, f"no column called image in {file.name}, which is the image's")
            path = os.path.normpath(file.parent / name)
            num_without += path not in anywhere
            before = named.setdefault(path, file)
            expect(before == file, "data", data, f"{name} in one metadata file, it is in {before.name} and {file.name}")
            rows += [(path, record)] if path in of_split else []
    expected = f"images of {split} that {metadata[0].name} names, it names none of {files[0].name}, ..."
    expect(bool(rows), "data", data, expected)
    left_out.note("metadata_rows_without_an_image", num_without, where=data)
    known = {name for name, _ in rows}
    first = next((str(file) for file in files if str(file) not in known), "")
    left_out.note("images_without_metadata", len(files) - len(known), where=f"{data} {split}", more=f"such as {first}")
    columns = sorted({column for _, record in rows for column in record})
    try:
        table = {column: [record.get(column) for _, record in rows] for column in columns}
        images = datasets.Dataset.from_dict({"image": [_image(name) for name, _ in rows], **table})
        return images.cast_column("image", datasets.Image())
    except Exception as error:  # Arrow's and the library's errors about values of several kinds have no common class
        reason = one_line(error)
        raise UsageError(f"data: {data!r}: expected columns of one kind in {metadata[0].name}: {reason}") from error


def _records(data: str, file: Path) -> list[dict[str, Any]]:
    """The rows of a metadata file."""
    import pyarrow.parquet

    try:
        if file.suffix.lower() == ".parquet":
            return pyarrow.parquet.read_table(file).to_pylist()
        if file.suffix.lower() == ".csv":
            return _of_csv(list(read_csv(file)))
        records = [json.loads(line) for line in read_lines(file) if line.strip()]
        is_right = all(isinstance(record, dict) for record in records)
        expect(is_right, "data", data, f"a JSON object in each line of {file.name}")
        return records
    except UsageError:
        raise
    except Exception as error:  # errors of JSON, CSV, Arrow and decoding have no common class
        reason = one_line(error)
        raise UsageError(f"data: {data!r}: expected rows that can be read in {file.name}: {reason}") from error


def _of_csv(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole numbers where all cells of a column are."""
    names = list(rows[0]) if rows else []
    whole = {name for name in names if all(_WHOLE.fullmatch(row[name] or "") for row in rows)} - {"file_name"}
    return [{name: int(row[name]) if name in whole else row[name] for name in names} for row in rows]
