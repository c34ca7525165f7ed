"""Where text comes from: local files, folders of them, or a Hub data set; one string a document.

Formats: .parquet; .jsonl (one object a line); .txt. The last two also as .gz, .xz and .zst. A .txt file holds
documents between lines that say `<|endoftext|>`; without such lines it is read as documents of about 64 KiB cut at
line ends, so that a book of any size needs no more memory than a page. Bytes that are not UTF-8 are kept
(PEP 383 surrogates) and come back exactly from the tokenizer.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from shared.command_line import UsageError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")
DOCUMENT_SEPARATOR = "<|endoftext|>"
UNSEPARATED_CHARACTERS = 1 << 16
_SAMPLE = Path(__file__).parent / "data" / "prose"
SAMPLES = {"sample": _SAMPLE / "train.parquet", "sample_eval": _SAMPLE / "eval.parquet"}


@dataclasses.dataclass(frozen=True)
class LocalTexts:
    """Documents of local files, in the order of the files and of the records in them."""

    name: str
    files: tuple[Path, ...]
    text_column: str

    @property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, resized or written again."""
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return hashlib.sha256(repr((stats, self.text_column)).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            yield from _read_file(file, self.text_column)


@dataclasses.dataclass(frozen=True)
class HubTexts:
    """Documents of a Hub data set that has been downloaded, memory-mapped from its Arrow files."""

    name: str
    dataset: Any
    text_column: str

    @property
    def fingerprint(self) -> str:
        """The fingerprint that `datasets` derives from the data set's files, configuration and split."""
        return hashlib.sha256(f"{self.dataset._fingerprint} {self.text_column}".encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[str]:
        for record in self.dataset.select_columns([self.text_column]):
            if record[self.text_column]:
                yield record[self.text_column]


def open_texts(data: str, *, config: str, split: str, text_column: str) -> LocalTexts | HubTexts:
    """Find and check a corpus without reading all of it.

    Args:
        data: "sample", "sample_eval", a file, a folder, or a Hub id.
        config: configuration of a Hub data set; "" = its only one.
        split: split of a Hub data set.
        text_column: column of the text; "" = the only column that holds text, or the one called text.

    Raises:
        UsageError: nothing is there, nothing is in it, or the column is not there.
    """
    path = SAMPLES.get(data, Path(data).expanduser())
    if not path.exists():
        return _open_hub_texts(data, config=config, split=split, text_column=text_column)
    files = tuple(list_files(path))
    first = next((file for file in files if file.stat().st_size), None)
    if first is None:
        raise UsageError(f"data: {data!r}: expected at least one document, got only empty files")
    column = "" if _format_of(first) == ".txt" else pick_text_column(data, _columns_of(first), text_column)
    texts = LocalTexts(name=data, files=files, text_column=column)
    if next(iter(texts), None) is None:
        raise UsageError(f"data: {data!r}: expected at least one document, got none")
    return texts


def open_corpora(data: str, *, config: str, split: str, text_column: str) -> list[LocalTexts | HubTexts]:
    """`open_texts` for each of several comma-separated names."""
    names = [name.strip() for name in data.split(",")]
    return [open_texts(name, config=config, split=split, text_column=text_column) for name in names]


def list_files(path: Path) -> list[Path]:
    """The readable files at `path`, a file or a folder, in sorted order.

    Raises:
        UsageError: the file's format is not known, or the folder holds no file of a known one.
    """
    known = " ".join(TEXT_SUFFIXES) + ", the first two also with " + " ".join(COMPRESSION_SUFFIXES)
    if path.is_file():
        if not _format_of(path):
            raise UsageError(f"data: {str(path)!r}: expected a file that ends in one of {known}")
        return [path]
    hidden = (
        file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    files = sorted(file for file in hidden if file.is_file() and _format_of(file))
    if not files:
        raise UsageError(f"data: {str(path)!r}: expected a folder with files that end in one of {known}")
    return files


def pick_text_column(data: str, columns: dict[str, bool], text_column: str) -> str:
    """The column to read: the one asked for, the only one that holds text, or the one called text.

    Args:
        data: name for the message.
        columns: column name -> whether it holds text.
        text_column: what the user asked for; "" = find out.

    Raises:
        UsageError: it is not there, or several could be meant.
    """
    candidates = [name for name, holds_text in columns.items() if holds_text]
    if text_column:
        if text_column not in candidates:
            raise UsageError(f"text_column: {text_column!r}: expected one of {candidates} in {data!r}")
        return text_column
    if "text" in candidates or len(candidates) == 1:
        return "text" if "text" in candidates else candidates[0]
    raise UsageError(f"text_column: '': expected one of {candidates} in {data!r}, several or no columns hold text")


def _format_of(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in (".txt", ".jsonl") else ""
    return suffixes[-1] if suffixes and suffixes[-1] in TEXT_SUFFIXES else ""


def _columns_of(file: Path) -> dict[str, bool]:
    if _format_of(file) == ".parquet":
        schema = _parquet(file).schema_arrow
        return {field.name: str(field.type) in ("string", "large_string", "string_view") for field in schema}
    number, line = next(((n, line) for n, line in enumerate(_lines(file), 1) if line.strip()), (1, ""))
    if not line:
        return {}
    return {key: isinstance(value, str) for key, value in _record(file, number, line).items()}


def _read_file(file: Path, text_column: str) -> Iterator[str]:
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}
    return readers[_format_of(file)](file, text_column)


def _read_parquet(file: Path, text_column: str) -> Iterator[str]:
    parquet = _parquet(file)
    if text_column not in parquet.schema_arrow.names:
        raise UsageError(f"text_column: {text_column!r}: expected one of {parquet.schema_arrow.names} in {str(file)!r}")
    for batch in parquet.iter_batches(batch_size=64, columns=[text_column]):
        yield from filter(None, batch.column(0).to_pylist())


def _read_jsonl(file: Path, text_column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        record = _record(file, number, line)
        text = record.get(text_column)
        if text is not None and not isinstance(text, str):
            raise UsageError(
                f"text_column: {text_column!r}: expected text in {file}:{number}, got {type(text).__name__}"
            )
        if text is None and text_column not in record:
            raise UsageError(f"text_column: {text_column!r}: expected one of {list(record)} in {file}:{number}")
        if text:
            yield text


def _read_txt(file: Path, text_column: str) -> Iterator[str]:
    del text_column  # a text file has no columns
    lines: list[str] = []
    size, separated = 0, False
    for line in _lines(file):
        is_separator = line.strip() == DOCUMENT_SEPARATOR
        separated = separated or is_separator
        if not is_separator:
            lines.append(line)
            size += len(line)
        if lines and (is_separator or (not separated and size >= UNSEPARATED_CHARACTERS)):
            yield "".join(lines)
            lines, size = [], 0
    if lines:
        yield "".join(lines)


def _lines(file: Path) -> Iterator[str]:
    """Lines with their ends, every byte kept; a line longer than 1 MiB comes in several parts from a .txt only."""
    import fsspec

    limit = UNSEPARATED_CHARACTERS if _format_of(file) == ".txt" else -1
    try:
        with fsspec.open(str(file), "rb", compression="infer") as stream:
            reader = _text_reader(stream)
            while line := reader.readline(limit):
                yield line
    except (OSError, EOFError, ValueError, _zstd_error(), _lzma_error()) as error:
        raise UsageError(f"data: {str(file)!r}: expected a readable file, got {error}") from error


def _text_reader(stream: IO[bytes]) -> IO[str]:
    import io

    return io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="\n")


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError


def _lzma_error() -> type[Exception]:
    import lzma

    return lzma.LZMAError


def _record(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"data: {file}:{number}: expected a JSON object, got {error}") from error
    if not isinstance(record, dict):
        raise UsageError(f"data: {file}:{number}: expected a JSON object, got {type(record).__name__}")
    return record


def _parquet(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UsageError(f"data: {str(file)!r}: expected a Parquet file, got {' '.join(str(error).split())}") from error


def _open_hub_texts(data: str, *, config: str, split: str, text_column: str) -> HubTexts:
    if not is_hub_id(data):
        raise UsageError(f"data: {data!r}: expected sample, a file or folder that exists, or a Hub data set id")
    import datasets

    try:
        dataset = datasets.load_dataset(data, config or None, split=split)
    except Exception as error:  # its many network, cache and format errors have no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"data: {data!r}: no such file or folder, and no such Hub data set: {reason}") from error
    columns = {
        name: getattr(feature, "dtype", "") in ("string", "large_string") for name, feature in dataset.features.items()
    }
    return HubTexts(name=data, dataset=dataset, text_column=pick_text_column(data, columns, text_column))


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id (`name` or `owner/name`) and not that of a path to a file."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)) and not name.endswith(
        (*TEXT_SUFFIXES, *COMPRESSION_SUFFIXES)
    )
