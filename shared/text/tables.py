"""Records with columns, in splits: local files of one format, or a Hub data set."""

import contextlib
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.command_line import UsageError, expect, one_line
from shared.data import left_out
from shared.data.csv_rows import read_csv
from shared.data.hub_data import resolve
from shared.data.local_files import find_files, part_by_split, split_to_evaluate_on
from shared.data.parquet import with_rows
from shared.data.text_lines import encoding_of
from shared.text.documents import hub_errors

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".xz", ".zst")


def split_names(data: str, config: str, field: str = "data") -> list[str]:
    """The splits of a data set.

    Args:
        data: a .jsonl, .json, .csv, .tsv or .parquet file, also compressed, which has train alone; a folder of them
            that may have splits, see `shared/data/local_files.py`; or a Hub id.
        config: configuration of a Hub data set; "" = its only one.
        field: that names it, for the message.

    Raises:
        UsageError: it is not there, or has no such file.
    """
    import datasets

    path = Path(os.path.expanduser(data))
    if path.exists():
        expect(not config, "data_config", config, f'"" for {data!r}, which is no Hub data set')
        return list(_local(path, field))
    with hub_errors(data, field):
        name, configuration, commit = resolve(data, config)
        return datasets.get_dataset_split_names(name, configuration, revision=commit)


def load_split(data: str, config: str, split: str, field: str = "data") -> Any:
    """One split as `datasets` has it; other files are not read, but of a Hub data set.

    Args:
        data: see `split_names`.
        config: likewise.
        split: one of those names.
        field: that names the data, for the message.

    Returns:
        Of .csv and .tsv files all cells are texts; an empty one is None.

    Raises:
        UsageError: it cannot be read.
    """
    import datasets

    path = Path(os.path.expanduser(data))
    if not path.exists():
        with hub_errors(data, field):
            name, configuration, commit = resolve(data, config)
            return datasets.load_dataset(name, configuration, split=split, revision=commit)
    splits = _local(path, field)
    files = splits[split]
    left_out.note_splits(data, {other: len(there) for other, there in splits.items()}, read=split)
    builder = _builder_of(files[0])
    if builder == "csv":
        return _from_csv(files, field)
    if builder == "json":
        _check_encoding(files, field)
    features = None
    try:
        if builder == "parquet":
            files, features = with_rows(files)
        # The library takes names for patterns, and follows no links where it searches for one.
        names = [glob.escape(os.path.realpath(file)) for file in files]
        # Under a name of our own, since the library refuses some that files have.
        return datasets.load_dataset(builder, data_files={"train": names}, split="train", features=features)
    except Exception as error:  # what JSON, CSV, Parquet and decompression raise has no common class
        reason = one_line(error.__cause__ or error)
        reason = "there is no record in them" if "StopIteration" in reason or "no data" in reason else reason
        shown = ", ".join(file.name for file in files[:5])
        raise UsageError(f"{field}: {data!r}: expected files that can be read, {shown}: {reason}") from error


def _from_csv(files: Sequence[Path], field: str) -> Any:
    """The rows of all files, in memory."""
    import datasets

    columns: dict[str, list[str | None]] = {}
    for file in files:
        for row in read_csv(file, field):
            columns = columns or {name: [] for name in row}
            expected = f"the columns of {files[0].name}: {', '.join(columns)}"
            expect(columns.keys() == row.keys(), field, str(file), expected)
            for name, cell in row.items():
                columns[name].append(cell)
    expect(bool(columns), field, str(files[0]), "files that can be read, there is no record in them")
    features = datasets.Features({name: datasets.Value("large_string") for name in columns})
    return datasets.Dataset.from_dict(columns, features)


def _check_encoding(files: Sequence[Path], field: str) -> None:
    for file in (file for file in files if file.suffix.lower() not in _COMPRESSED):
        with file.open("rb") as stream:
            encoding, _ = encoding_of(file, stream.read(1 << 12), field)
        expect(encoding.startswith("utf-8"), field, str(file), f"JSON in UTF-8, got {encoding}")


@contextlib.contextmanager
def in_utf8(data: str, field: str = "data") -> Iterator[None]:
    """Make one `UsageError` of text that is not UTF-8, which is found when the block reads it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(f"{field}: {data!r}: expected text in UTF-8: {one_line(error)}") from error


def _local(path: Path, field: str) -> dict[str, list[Path]]:
    """The files of each split of a file or a folder."""
    files = [path] if path.is_file() else find_files(path, lambda name: _builder_of(Path(name)))
    kinds = {file: _builder_of(file) for file in files if _builder_of(file)}
    known = " ".join(_BUILDERS)
    expect(bool(kinds), field, str(path), f"a file, or a folder of files, that end in one of {known}")
    names = ", ".join(sorted(file.name for file in kinds)[:5])
    expect(len(set(kinds.values())) == 1, field, str(path), f"files of one format, got {names}")
    return {"train": [path]} if path.is_file() else part_by_split(path, list(kinds), by_file_name=True)


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
    return split_to_evaluate_on(split_names(data, config, field), test_split)
