"""Where text comes from: local files, folders of them, or a Hub data set; one string a document.

Formats: .parquet; .jsonl (one object a line); .txt. The last two also as .gz, .xz and .zst. A .txt file holds
documents between lines that say `<|endoftext|>`; without such a line in its first 16 MB it is read as documents of
about 64 KiB cut at line ends, so that a book of any size needs no more memory than a page. A byte-order mark tells
UTF-8, UTF-16 or UTF-32, and is no text; without one text is UTF-8, and bytes that are not are kept (PEP 383 surrogates)
and come back exactly from the tokenizer. A folder may have splits, see `shared/data/local_files.py`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from shared.command_line import UsageError, expect, one_line
from shared.data import left_out
from shared.data.hub_data import is_hub_id, resolve
from shared.data.local_files import (
    find_files,
    is_about_the_data,
    part_by_split,
    split_named,
    split_to_evaluate_on,
)
from shared.data.text_lines import read_lines
from shared.fields import Corpus
from shared.text.file_contents import contents_of

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
COMPRESSION_SUFFIXES = (".gz", ".xz", ".zst")
DOCUMENT_SEPARATOR = "<|endoftext|>"
UNSEPARATED_CHARACTERS = 1 << 16
_SEPARATOR_WITHIN = 1 << 24  # characters of a .txt in which a separator must come, or it counts as one without
_TXT_VERSION = 2  # of how a .txt is cut
_CORPUS_OPTION = re.compile(r":([a-z_]+)=")
_SAMPLED_RECORDS = 100  # that tell which columns hold text, where the format does not say
_SAMPLES = Path(__file__).parents[1] / "samples"
_SOURCES = {"prose": ("messages", "novels"), "novels": ("novels",), "dictionary": ("dictionary",)}
SAMPLES = {
    f"{name}{ending}": {
        source: tuple(_SAMPLES / folder / f"{split}.parquet" for folder in _SOURCES[source]) for source in sources
    }
    for name, sources in {
        "sample": ("prose", "dictionary"),
        "prose": ("prose",),
        "books": ("novels", "dictionary"),
        "dictionary": ("dictionary",),
    }.items()
    for ending, split in (("", "train"), ("_eval", "eval"))
}


class Texts(Protocol):
    """Any iterable of documents that has a fingerprint."""

    @property
    def fingerprint(self) -> str:
        """Changes when the documents do."""

    def __iter__(self) -> Iterator[str]: ...


@dataclasses.dataclass(frozen=True)
class LocalTexts:
    """Documents of local files, in the order of the files and of the records in them."""

    name: str
    files: tuple[Path, ...]
    text_column: str
    split: str = ""

    @property
    def place(self) -> str:
        """What tells these documents from others of the same name, where they are counted."""
        return f"{self.name} {self.split} {self.text_column}"

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or resized, or when its content changes.

        Content alone tells, so that a copy, a new clone or a file on another disk is the same; of a large file places
        of it are looked at, so a change that keeps its size may not be seen. See `contents_of`.
        """
        names = [file.name for file in self.files]
        versions: list[object] = list(zip(names, contents_of(self.files), strict=True))
        # How these are cut: at blank lines since version 2.
        versions += [_TXT_VERSION] if any(_format_of(file) == ".txt" for file in self.files) else []
        return hashlib.sha256(repr((versions, self.text_column)).encode()).hexdigest()[:16]

    def share(self, rank: int, world_size: int) -> "LocalTexts":
        """The documents of a task, in whole files: those of the tasks one behind the other are all, in their order."""
        ends = [len(self.files) * number // world_size for number in (rank, rank + 1)]
        return dataclasses.replace(self, files=self.files[slice(*ends)])

    def __iter__(self) -> Iterator[str]:
        yield from _counting_empty(
            self.place, (text for file in self.files for text in _read_file(file, self.text_column))
        )


@dataclasses.dataclass(frozen=True)
class HubTexts:
    """Documents of a Hub data set that has been downloaded, memory-mapped from its Arrow files."""

    name: str
    dataset: Any
    text_column: str

    @property
    def place(self) -> str:
        """See `LocalTexts`."""
        return f"{self.name} {self.dataset.split} {self.text_column}"

    @property
    def fingerprint(self) -> str:
        """The fingerprint that `datasets` derives from the data set's files, configuration and split."""
        return hashlib.sha256(f"{self.dataset._fingerprint} {self.text_column}".encode()).hexdigest()[:16]

    def share(self, rank: int, world_size: int) -> "HubTexts":
        """See `LocalTexts`; a record is of any task."""
        return dataclasses.replace(self, dataset=self.dataset.shard(world_size, rank, contiguous=True))

    def __iter__(self) -> Iterator[str]:
        records = self.dataset.select_columns([self.text_column])
        yield from _counting_empty(self.place, (record[self.text_column] or "" for record in records))


def _counting_empty(place: str, texts: Iterable[str]) -> Iterator[str]:
    """Those that are not empty; how many are is counted at the end."""
    num_empty = 0
    for text in texts:
        if text:
            yield text
        num_empty += not text
    left_out.note("empty_documents", num_empty, where=place)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The first so many characters of a corpus, the last document cut."""

    texts: Any  # of them
    characters: int

    @property
    def place(self) -> str:
        """See `LocalTexts`."""
        return self.texts.place

    @property
    def fingerprint(self) -> str:
        """Changes when the corpus or the number of characters does."""
        return f"{self.texts.fingerprint} first {self.characters}"

    def __iter__(self) -> Iterator[str]:
        left = self.characters
        for text in self.texts:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


def open_texts(
    data: str, *, config: str, split: str, text_column: str, field: str = "data_split"
) -> LocalTexts | HubTexts:
    """Find and check a corpus without reading all of it.

    Args:
        data: one of `SAMPLES`, a file, a folder, or a Hub id.
        config: configuration of a Hub data set; "" = its only one.
        split: of a Hub data set, or of a folder that has splits.
        text_column: column of the text; "" = the only column that holds text, or the one called text.
        field: that names the split, for the message.

    Raises:
        UsageError: nothing is there, nothing is in it, or the column is not there.
    """
    files = local_files(data, split, field)
    if not files:
        texts: LocalTexts | HubTexts = _open_hub_texts(data, config=config, split=split, text_column=text_column)
    else:
        # The first file that holds a record tells the columns; a .txt file has none.
        columns = next(filter(None, map(_columns_of, files)), None)
        texts = LocalTexts(data, files, pick_text_column(data, columns, text_column) if columns else "", split)
    if next(iter(texts), None) is None:
        raise UsageError(f"data: {data!r}: expected at least one document, got none")
    return texts


def open_corpora(data: str, *, config: str, split: str, text_column: str) -> list[LocalTexts | HubTexts]:
    """`open_texts` for each of several comma-separated corpora, see `list_corpora`."""
    return [open_texts(**corpus) for corpus in list_corpora(data, config=config, split=split, text_column=text_column)]


def list_corpora(data: str, *, config: str, split: str, text_column: str) -> list[dict[str, str]]:
    """The arguments of `open_texts` for each of several comma-separated corpora.

    Args:
        data: names; one may be followed by what it has of its own, `wikimedia/wikipedia:config=20231101.en,my_books`.
        config: of those that say nothing else.
        split: likewise.
        text_column: likewise.

    Raises:
        UsageError: a name is followed by something else.
    """
    corpora = []
    for entry in entries_of(data):
        is_file = os.path.exists(os.path.expanduser(entry))  # whose name may look like options
        name, *options = [entry] if is_file else _CORPUS_OPTION.split(entry)
        own = dict(zip(options[::2], options[1::2], strict=True))
        shared = {"config": config, "split": split, "text_column": text_column}
        expect(own.keys() <= shared.keys(), "data", entry, "NAME, or NAME:KEY=VALUE with " + ", ".join(shared))
        corpora.append({"data": name, **shared, **own})
    return corpora


def entries_of(data: str) -> list[str]:
    """What stands between commas; but a file or folder that is there under the whole text is one, commas or not."""
    is_one = os.path.exists(os.path.expanduser(data))
    return [data] if is_one else [entry.strip() for entry in data.split(",")]


def open_held_out(corpus: Corpus) -> tuple[list[LocalTexts | HubTexts], float]:
    """The corpora to evaluate on, and the share of the training documents to hold out, 0 where there are such corpora.

    The sources of the embedded text are corpora of their own. Where each corpus is a folder with a split to evaluate
    on, these are.

    Raises:
        UsageError: see `open_texts`.
    """
    columns = {"config": corpus.data_config, "text_column": corpus.text_column}
    if corpus.eval_data:
        of_eval = list_corpora(corpus.eval_data, split=corpus.eval_split, **columns)
        return [open_texts(**of_one, field="eval_split") for of_one in of_eval], 0.0
    corpora = list_corpora(corpus.data, split=corpus.data_split, **columns)
    names = [of_one["data"] for of_one in corpora]
    if set(names) <= SAMPLES.keys():
        sources = {source: files for name in names for source, files in SAMPLES[f"{name}_eval"].items()}
        return [LocalTexts(name, files, corpus.text_column or "text") for name, files in sources.items()], 0.0
    paths = [Path(os.path.expanduser(name)) for name in names]
    splits = [list(list_splits(path)) if path.is_dir() else [] for path in paths]
    evals = [split_to_evaluate_on(there, of_one["split"]) for there, of_one in zip(splits, corpora, strict=True)]
    if all(evals):
        return [open_texts(**{**of_one, "split": split}) for of_one, split in zip(corpora, evals, strict=True)], 0.0
    return [], corpus.eval_fraction


def short_names(names: Sequence[str]) -> list[str]:
    """What metrics call each of several corpora: the last part of its name without suffixes, numbered where equal."""
    short: list[str] = []
    for name in names:
        part = Path(name).name.split(".")[0] or name
        numbered = (f"{part}_{number}" for number in itertools.count(2))
        short.append(next(candidate for candidate in itertools.chain([part], numbered) if candidate not in short))
    return short


def local_files(data: str, split: str, field: str = "data_split") -> tuple[Path, ...]:
    """The readable files of a sample, file or folder; none if there is no such thing, then it may be a Hub id.

    Raises:
        UsageError: see `list_splits`; or a folder with splits has another one alone.
    """
    if data in SAMPLES:
        return tuple(itertools.chain.from_iterable(SAMPLES[data].values()))
    path = Path(os.path.expanduser(data))
    if not data or not os.path.exists(path):
        return ()
    splits = list_splits(path)
    name = split_named(split, list(splits)) if len(splits) > 1 else next(iter(splits))
    if not name:
        raise UsageError(f"{field}: {split!r}: expected one of the splits of {data!r}: {', '.join(splits)}")
    left_out.note_splits(data, {other: len(files) for other, files in splits.items()}, read=name)
    return tuple(splits[name])


def list_splits(path: Path) -> dict[str, list[Path]]:
    """The readable files of each split at `path`, a file or a folder, in sorted order; all are of one, if it has none.

    A README, a license and the like are not among them.

    Raises:
        UsageError: the file's format is not known, or the folder holds no file of a known one.
    """
    known = " ".join(TEXT_SUFFIXES) + ", the first two also with " + " ".join(COMPRESSION_SUFFIXES)
    if path.is_file():
        if not _format_of(path):
            raise UsageError(f"data: {str(path)!r}: expected a file that ends in one of {known}")
        return {"train": [path]}
    found = find_files(path, lambda name: _format_of(Path(name)))
    about = [file for file in found if is_about_the_data(file.name)]
    files = [file for file in found if not is_about_the_data(file.name)]
    left_out.note("texts_about_the_data", len(about), where=str(path), more=f"such as {next(iter(about), '')}")
    if not files:
        raise UsageError(f"data: {str(path)!r}: expected a folder with files that end in one of {known}")
    return part_by_split(path, files, by_file_name=True)


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
    likely = "text" if "text" in candidates or len(candidates) != 1 else candidates[0]
    column = text_column or likely
    if column not in candidates:
        there = ", ".join(candidates) or f"none of its columns is, they are {', '.join(columns)}"
        raise UsageError(f"text_column: {text_column!r}: expected a column of {data!r} that holds text: {there}")
    return column


def text_columns(records: Iterable[dict[str, Any]]) -> dict[str, bool]:
    """Column name -> whether it holds text, as far as the first records tell.

    Where none holds text alone those that hold some do, so that what reads them can name the record that is odd.
    """
    types: dict[str, set[type]] = {}
    for record in itertools.islice(records, _SAMPLED_RECORDS):
        for name, value in record.items():
            types.setdefault(name, set()).add(type(value))
    alone = {name: found <= {str, type(None)} for name, found in types.items()}
    return alone if any(alone.values()) else {name: str in found for name, found in types.items()}


def _format_of(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSION_SUFFIXES:
        return suffixes[-2] if len(suffixes) > 1 and suffixes[-2] in (".txt", ".jsonl") else ""
    return suffixes[-1] if suffixes and suffixes[-1] in TEXT_SUFFIXES else ""


def _columns_of(file: Path) -> dict[str, bool]:
    if _format_of(file) == ".parquet":
        from pyarrow.types import is_dictionary

        schema = _parquet(file).schema_arrow
        # Of a dictionary (pandas' category) what it holds.
        kinds = {field.name: field.type.value_type if is_dictionary(field.type) else field.type for field in schema}
        found = {name: str(kind) in ("string", "large_string", "string_view") for name, kind in kinds.items()}
        # Another file may have text where this one has nulls alone.
        return found if any(found.values()) else {name: str(kind) == "null" for name, kind in kinds.items()}
    return text_columns(record for _, record in _records(file)) if _format_of(file) == ".jsonl" else {}


def _read_file(file: Path, text_column: str) -> Iterator[str]:
    readers = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_txt}
    return readers[_format_of(file)](file, text_column)


def _read_parquet(file: Path, text_column: str) -> Iterator[str]:
    import pyarrow

    is_empty = str(_parquet(file).schema_arrow.field(text_column).type) == "null"
    pick_text_column(str(file), {**_columns_of(file), **({text_column: True} if is_empty else {})}, text_column)
    try:
        for batch in _parquet(file).iter_batches(batch_size=64, columns=[text_column]):
            # As bytes: Arrow does not check that text is UTF-8.
            column = batch.column(0)
            if isinstance(column, pyarrow.DictionaryArray):
                column = column.dictionary_decode()
            for data in column.cast("large_binary").to_pylist():
                yield (data or b"").decode("utf-8", "surrogateescape")
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"data: {str(file)!r}: expected a readable file, got {one_line(error)}") from error


def _read_jsonl(file: Path, text_column: str) -> Iterator[str]:
    for number, record in _records(file):
        if text_column not in record:
            raise UsageError(f"text_column: {text_column!r}: expected one of {list(record)} in {file}:{number}")
        text = record[text_column]
        if not isinstance(text, str | None):
            found = type(text).__name__
            raise UsageError(f"text_column: {text_column!r}: expected text in {file}:{number}, got {found}")
        yield text or ""


def _read_txt(file: Path, text_column: str) -> Iterator[str]:
    del text_column  # a text file has no columns
    lines: list[str] = []
    size, after_blank, separated = 0, 0, _begins_separated(file)
    for line, is_separator in _txt_lines(file):
        if not is_separator:
            lines.append(line)
            size += len(line)
            if 2 * size >= UNSEPARATED_CHARACTERS and not line.strip():
                after_blank = len(lines)
        if lines and (is_separator or (not separated and size >= UNSEPARATED_CHARACTERS)):
            end = len(lines) if is_separator else after_blank or len(lines)
            yield "".join(lines[:end])
            lines = lines[end:]
            size, after_blank = sum(map(len, lines)), 0
    if lines:
        yield "".join(lines)


def _begins_separated(file: Path) -> bool:
    size = 0
    for line, is_separator in _txt_lines(file):
        size += len(line)
        if is_separator or size > _SEPARATOR_WITHIN:
            return is_separator
    return False


def _txt_lines(file: Path) -> Iterator[tuple[str, bool]]:
    """Lines, long ones in several parts, and whether each is a separator."""
    begins = True
    for line in read_lines(file, UNSEPARATED_CHARACTERS):
        yield line, begins and line.strip() == DOCUMENT_SEPARATOR
        begins = line.endswith("\n")


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank."""
    for number, line in enumerate(read_lines(file), 1):
        if line.strip():
            yield number, _record(file, number, line)


def _record(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"data: {file}:{number}: expected a JSON object, got {one_line(error)}") from error
    if not isinstance(record, dict):
        raise UsageError(f"data: {file}:{number}: expected a JSON object, got {type(record).__name__}")
    return record


def _parquet(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file.open("rb"))  # Arrow takes no names that are not UTF-8
    except (OSError, pyarrow.ArrowException) as error:
        raise UsageError(f"data: {str(file)!r}: expected a Parquet file, got {one_line(error)}") from error


def _open_hub_texts(data: str, *, config: str, split: str, text_column: str) -> HubTexts:
    with hub_errors(data):
        import datasets

        name, configuration, commit = resolve(data, config)
        dataset = datasets.load_dataset(name, configuration, split=split, revision=commit)
    columns = {
        name: getattr(feature, "dtype", "") in ("string", "large_string") for name, feature in dataset.features.items()
    }
    return HubTexts(name=data, dataset=dataset, text_column=pick_text_column(data, columns, text_column))


@contextlib.contextmanager
def hub_errors(data: str, field: str = "data") -> Iterator[None]:
    """Turn what goes wrong with the Hub data set `data` into a `UsageError`, a name that is no Hub id first of all."""
    if not is_hub_id(data):
        raise UsageError(
            f"{field}: {data!r}: expected embedded data, a file or folder that exists, or a Hub data set id"
        )
    try:
        yield
    except Exception as error:  # its many network, cache and format errors have no common class
        expected = "a file or folder that exists, or a Hub data set that can be read"
        raise UsageError(f"{field}: {data!r}: expected {expected}: {one_line(error)}") from error
