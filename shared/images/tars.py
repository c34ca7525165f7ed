"""Images in WebDataset tars: files of one sample stand one behind the other and differ in what follows a dot.

    0001.jpg, 0001.cls, 0001.txt, 0001.json

The image is the column image, or called after its suffix where all have the same; .cls is a class, a whole number or a
name; .txt a caption; the keys of .json are columns of their own. `datasets` reads such tars too, but only where all
samples have the files of the first five, and names have no other dot.
"""

import dataclasses
import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from shared.command_line import UsageError
from shared.images.folders import IMAGE_SUFFIXES

_WHOLE = re.compile(r"-?\d+")


def open_tars(files: Sequence[Path], *, streaming: bool) -> Any:
    """Samples of tars as `datasets` has them; those without an image are left out.

    Args:
        files: the tars.
        streaming: whether to read them as they are asked for, with the columns of the first, instead of storing all.

    Raises:
        UsageError: a tar is damaged, or no sample has an image.
    """
    import datasets

    names = [str(file) for file in files]
    features = _features_of(names[:1] if streaming else names)
    texts = tuple(name for name, feature in features.items() if getattr(feature, "dtype", "") == "string")
    arguments = {"files": names, "columns": tuple(features), "texts": texts}  # the library shards what is a list
    if streaming:
        return datasets.IterableDataset.from_generator(_records, features, gen_kwargs=arguments)
    versions = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    fingerprint = hashlib.sha256(repr((versions, sorted(features))).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return datasets.Dataset.from_generator(_records, features, gen_kwargs=arguments, fingerprint=fingerprint)


def _features_of(files: Sequence[str]) -> Any:
    """The columns of all samples, first the image; each with the type that holds all of its values."""
    import datasets

    kinds: dict[str, set[type]] = {}
    suffixes: set[str] = set()
    for sample in _samples(files, with_images=False):
        suffixes.add(sample.suffix)
        for column, value in sample.columns.items():
            kinds.setdefault(column, set()).add(type(value))
    if not suffixes:
        raise UsageError(f"data: {files[0]!r}: expected samples with an image, found none in it")
    image = suffixes.pop() if len(suffixes) == 1 else "image"
    types = {column: _type_of(found - {type(None)}) for column, found in kinds.items() if column != image}
    return datasets.Features({image: datasets.Image(), **types})


def _type_of(kinds: set[type]) -> Any:
    import datasets

    numbers = "int64" if kinds == {int} else "float64"
    return datasets.Value(numbers if kinds and kinds <= {int, float} else "string")


def _records(files: Sequence[str], columns: Sequence[str], texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Of each sample the columns, the first of which is the image; in `texts` every value is a text."""
    image, *others = columns
    for sample in _samples(files, with_images=True):
        record: dict[str, Any] = {image: {"path": sample.name, "bytes": sample.data}}
        for column in others:
            value = sample.columns.get(column)
            is_other = column in texts and not isinstance(value, str | None)
            record[column] = json.dumps(value, ensure_ascii=False) if is_other else value
        yield record


@dataclasses.dataclass
class _Sample:
    """The files of one key: of the image suffix ("" = there is none yet), name and bytes, and the other columns."""

    key: str
    suffix: str = ""
    name: str = ""
    data: bytes = b""
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)


def _samples(files: Sequence[str], *, with_images: bool) -> Iterator[_Sample]:
    """The samples that have an image, its bytes only `with_images`."""
    for file in files:
        sample = _Sample("")
        for name, read in _members(file):
            key, suffix = _parted(name, sample.key)
            if key != sample.key:
                yield from [sample] if sample.suffix else []
                sample = _Sample(key)
            is_image = f".{suffix}" in IMAGE_SUFFIXES
            if is_image and not sample.suffix:
                sample.suffix, sample.name, sample.data = suffix, name, read() if with_images else b""
            elif not is_image:
                sample.columns |= _columns_of(file, name, suffix, read)
        yield from [sample] if sample.suffix else []


def _members(file: str) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Of each file in a tar that is not hidden its name, and what reads it."""
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                if member.isfile() and not Path(member.name).name.startswith("."):
                    content = tar.extractfile(member)
                    assert content is not None, "a file has content"
                    yield member.name, content.read
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"data: {file!r}: expected a tar that can be read: {reason}") from error


def _parted(name: str, current: str) -> tuple[str, str]:
    """Key and suffix of a file: parted at its first dot if that goes on with the current sample, else at its last.

    So 0001.seg.png is of 0001, and photo.0001.jpg a sample of its own.
    """
    folder, _, base = name.rpartition("/")
    first, last = base.partition("."), base.rpartition(".")
    key, suffix = (first[0], first[2]) if f"{folder}/{first[0]}" == current else (last[0], last[2])
    return f"{folder}/{key}", suffix.lower()


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
