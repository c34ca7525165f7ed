"""Images in WebDataset tars: files of one sample stand one behind the other and differ in what follows a dot.

    0001.jpg, 0001.cls, 0001.txt, 0001.json

The image is the column image, or called after its suffix where all have the same; of several in a sample it is the
first whose name has no other dot. .cls is a class, a whole number or a name; .txt a caption; the keys of .json are
columns of their own. Files of a sample are alike up to the first dot, or where names number samples behind it
(photo.0001.jpg) up to the last. `datasets` reads such tars too, but only where all samples have the files of the first
five, and names have no other dot.
"""

import dataclasses
import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.command_line import UsageError, expect, one_line
from shared.data import left_out
from shared.images.folders import IMAGE_SUFFIXES

_FORMAT_VERSION = 1  # of what is stored of a tar
_EMPTY = ""
_WHOLE = re.compile(r"-?\d+")


def open_tars(files: Sequence[Path], *, streaming: bool) -> Any:
    """Samples of tars as `datasets` has them; those without an image, and further images, are left out and counted.

    Args:
        files: the tars.
        streaming: whether to read them as they are asked for, with the columns of the first, instead of storing all.

    Raises:
        UsageError: a tar is damaged, or no sample has an image.
    """
    import datasets

    names = [str(file) for file in files]
    features = _features_of(names[:1] if streaming else names)
    types = tuple((name, getattr(feature, "dtype", "")) for name, feature in features.items())
    arguments = {"files": names, "types": types}  # the library shards what is a list
    if streaming:
        return datasets.IterableDataset.from_generator(_records, features, gen_kwargs=arguments)
    versions = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = repr((_FORMAT_VERSION, versions, str(features))).encode("utf-8", "surrogateescape")
    fingerprint = hashlib.sha256(key).hexdigest()[:16]
    return datasets.Dataset.from_generator(_records, features, gen_kwargs=arguments, fingerprint=fingerprint)


def _features_of(files: Sequence[str]) -> Any:
    """The columns of all samples, first the image; each with the type that holds all of its values."""
    import datasets

    kinds: dict[str, set[str]] = {}
    suffixes: set[str] = set()
    num_without = num_further = 0
    for sample in _samples(files, with_images=False):
        num_without += not sample.suffix
        num_further += max(0, sample.num_images - 1)
        if not sample.suffix:
            continue
        suffixes.add(sample.suffix)
        for column, value in sample.columns.items():
            kinds.setdefault(column, set()).add(_kind_of(value))
    if not suffixes:
        raise UsageError(f"data: {files[0]!r}: expected samples with an image, found none in it")
    where = f"tars from {files[0]} on"
    left_out.note("samples_without_an_image", num_without, where=where)
    left_out.note("further_images_of_samples", num_further, where=where)
    image = suffixes.pop() if len(suffixes) == 1 else "image"
    types = {column: _type_of(found - {_EMPTY}) for column, found in kinds.items() if column != image}
    return datasets.Features({image: datasets.Image(), **types})


def _kind_of(value: Any) -> str:
    """The type of a value, or of what a list holds; "" = of nothing."""
    if isinstance(value, list):
        inner = {_kind_of(item) for item in value}
        return f"list of {inner.pop()}" if len(inner) == 1 else "list of " if not inner else "other"
    return "" if value is None else type(value).__name__


def _type_of(kinds: set[str]) -> Any:
    """What holds values of these kinds: of one kind as they are, of several as texts."""
    import datasets

    for inner, dtype in (("int", "int64"), ("str", "string")):
        if kinds - {"list of "} == {f"list of {inner}"}:
            return datasets.List(datasets.Value(dtype))
    numbers = "int64" if kinds == {"int"} else "float64"
    is_number = bool(kinds) and kinds <= {"int", "float"}
    return datasets.Value(numbers if is_number else "bool" if kinds == {"bool"} else "string")


def _records(files: Sequence[str], types: Sequence[tuple[str, str]]) -> Iterator[dict[str, Any]]:
    """Of each sample the columns, the first of which is the image, as their types ask."""
    (image, _), *others = types
    for sample in _samples(files, with_images=True):
        if not sample.suffix:
            continue
        record: dict[str, Any] = {image: {"path": sample.name, "bytes": sample.data}}
        for column, dtype in others:
            record[column] = _fitted(sample.columns.get(column), dtype, column, sample)
        yield record


def _fitted(value: Any, dtype: str, column: str, sample: "_Sample") -> Any:
    """A value as its column's type asks: a text where that holds several kinds.

    Raises:
        UsageError: it is of another kind than those that the columns were found from, as in a stream.
    """
    if dtype == "string":
        return value if isinstance(value, str | None) else json.dumps(value, ensure_ascii=False)
    fits = {"int64": ("", "int"), "float64": ("", "int", "float"), "bool": ("", "bool")}.get(dtype)
    is_right = fits is None or _kind_of(value) in fits
    expect(is_right, "data", sample.name, f"a value of type {dtype} in {column}, as in the first tar, got {value!r}")
    return value


@dataclasses.dataclass
class _Sample:
    """The files of one key: of the image suffix ("" = there is none yet), name and bytes, and the other columns."""

    key: str
    suffix: str = ""
    name: str = ""
    data: bytes = b""
    is_plain: bool = False
    num_images: int = 0
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)


def _samples(files: Sequence[str], *, with_images: bool) -> Iterator[_Sample]:
    """All samples, the bytes of their images only `with_images`."""
    for file in files:
        sample = None
        for key, suffix, name, read in _members(file):
            if sample is None or key != sample.key:
                yield from [sample] if sample else []
                sample = _Sample(key)
            last, is_plain = suffix.rpartition(".")[2], "." not in suffix
            if f".{last}" not in IMAGE_SUFFIXES:
                sample.columns |= _columns_of(file, name, suffix, read)
                continue
            sample.num_images += 1
            if not sample.suffix or (is_plain and not sample.is_plain):
                sample.suffix, sample.name, sample.is_plain = last, name, is_plain
                sample.data = read() if with_images else b""
        yield from [sample] if sample else []


def _members(file: str) -> Iterator[tuple[str, str, str, Callable[[], bytes]]]:
    """Of each file in a tar that is not hidden: its sample's key, its suffix, its name, and what reads it."""
    try:
        with tarfile.open(file) as tar:
            members = [member for member in tar if member.isfile() and not Path(member.name).name.startswith(".")]
            _check_end(file, tar)
            part = _parted_at_last if _number_behind_a_dot([member.name for member in members]) else _parted_at_first
            for member in members:
                content = tar.extractfile(member)
                assert content is not None, "a file has content"
                yield *part(member.name), member.name, content.read
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = one_line(error)
        raise UsageError(f"data: {file!r}: expected a tar that can be read: {reason}") from error


def _check_end(file: str, tar: tarfile.TarFile) -> None:
    """Raise `UsageError` where the library took a damaged header for the end."""
    assert tar.fileobj is not None, "it is open"
    tar.fileobj.seek(tar.offset)
    is_end = not any(tar.fileobj.read(tarfile.BLOCKSIZE))
    expect(is_end, "data", file, f"a tar that can be read: the header at byte {tar.offset} is damaged")


def _number_behind_a_dot(names: Sequence[str]) -> bool:
    """Whether what stands between the first and the last dot tells samples apart: more of it than there are keys."""
    parted = [_parted_at_first(name) for name in names]
    keys, between = {key for key, _ in parted}, {suffix.rpartition(".")[0] for _, suffix in parted}
    return len(between - {""}) > len(keys)


def _parted_at_first(name: str) -> tuple[str, str]:
    """Key and suffix: 0001.seg.png is of 0001."""
    folder, _, base = name.rpartition("/")
    key, _, suffix = base.partition(".")
    return f"{folder}/{key}", suffix.lower()


def _parted_at_last(name: str) -> tuple[str, str]:
    """Key and suffix: photo.0001.jpg is of photo.0001."""
    key, _, suffix = name.rpartition(".")
    return key, suffix.lower()


def _columns_of(file: str, name: str, suffix: str, read: Callable[[], bytes]) -> dict[str, Any]:
    """What a file that is no image says of its sample; nothing where it is of no known kind."""
    if suffix not in ("cls", "txt", "text", "caption", "json"):
        return {}
    try:
        text = read().decode("utf-8-sig").strip()
        content = json.loads(text) if suffix == "json" else text
    except ValueError as error:
        raise UsageError(f"data: {file!r}: expected UTF-8, and JSON in .json, in {name}: {error}") from error
    if suffix == "json":
        return content if isinstance(content, dict) else {"json": content}
    return {suffix: int(text) if suffix == "cls" and _WHOLE.fullmatch(text) else text}
