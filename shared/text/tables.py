"""Records with columns, in splits: local files of one format, or a Hub data set."""

import contextlib
import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.command_line import UsageError, expect
from shared.data.local_files import find_files, is_about_the_data, part_by_split, split_to_evaluate_on
from shared.text.documents import hub_errors

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".xz", ".zst")


def load_splits(data: str, config: str, field: str = "data") -> dict[str, Any]:
    """The splits of a data set, by name.

    Args:
        data: a .jsonl, .json, .csv, .tsv or .parquet file, also compressed, which has train alone; a folder of them
            that may have splits, see `shared/data/local_files.py`; or a Hub id.
        config: configuration of a Hub data set; "" = its only one.
        field: that names it, for the message.

    Raises:
        UsageError: it is not there, or cannot be read.
    """
    import datasets

    path = Path(data).expanduser()
    if path.is_dir() or path.is_file():
        files = _local(path)
        try:
            found = datasets.load_dataset(**files)
        except Exception as error:  # what JSON, CSV, Parquet and decompression raise has no common class
            reason = _one_line(error.__cause__ or error)
            reason = "there is no record in them" if "StopIteration" in reason or "no data" in reason else reason
            raise UsageError(f"{field}: {data!r}: expected files that can be read: {reason}") from error
    else:
        with hub_errors(data, field):
            found = datasets.load_dataset(data, config or None)
    return dict(found)


@contextlib.contextmanager
def in_utf8(data: str, field: str = "data") -> Iterator[None]:
    """Make one `UsageError` of text that is not UTF-8, which is found when the block reads it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{field}: {data!r}: expected text in UTF-8: {_one_line(error)}") from error


def _local(path: Path) -> dict[str, Any]:
    """What `datasets.load_dataset` takes for a file or a folder."""
    files = [path] if path.is_file() else find_files(path, lambda file: not is_about_the_data(file))
    kinds = {file: _builder_of(file) for file in files if _builder_of(file)}
    known = " ".join(_BUILDERS)
    expect(bool(kinds), "data", str(path), f"a file, or a folder of files, that end in one of {known}")
    expect(
        len(set(kinds.values())) == 1,
        "data",
        str(path),
        f"files of one format, got {', '.join(sorted({file.name for file in kinds}))}",
    )
    [builder] = set(kinds.values())
    of_splits = {"train": [path]} if path.is_file() else part_by_split(path, list(kinds), by_file_name=True)
    # The library takes names for patterns, and follows no links where it searches for one.
    splits = {split: [glob.escape(os.path.realpath(file)) for file in files] for split, files in of_splits.items()}
    options: dict[str, Any] = {"sep": "\t"} if any(".tsv" in file.suffixes for file in kinds) else {}
    return {"path": builder, "data_files": splits, **options}


def _builder_of(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes = suffixes[:-1]
    return _BUILDERS.get(suffixes[-1], "") if suffixes and not file.name.startswith(".") else ""


def validation_split(data: str, config: str, test_split: str = "", field: str = "data") -> str:
    """Name of the split to evaluate on, another one than `test_split`; "" = there is none.

    Raises:
        UsageError: the data set cannot be read.
    """
    return split_to_evaluate_on(list(load_splits(data, config, field)), test_split)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
