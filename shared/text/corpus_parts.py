"""A cache of a corpus in the making: parts of bounded size, which one process or many tasks write and one merges.

    FOLDER/00003-of-00064/00000/NAME.bin     part 0 of task 3: arrays of successive texts, one behind the other
                               /part.json    how many texts these are, and the types of the arrays
                         /end.json           the task has no more parts; how many documents had no text
          /KEY/SPLIT/NAME.bin                what is merged so far, the cache KEY to be
          /KEY.json                          how many parts that is, and how long the files are

A part is complete or absent. Who was killed goes on behind the parts that are there: their texts are read again, and
passed over, but not encoded again. A part is removed once it is merged, so the disk holds the cache and a part.

Where a file system has no locks that all nodes share, several may do the same at once: they write equal bytes to equal
places, and who finds that a part is gone waits for the cache.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.command_line import expect
from shared.data import left_out
from shared.runtime.atomic_folder import one_at_a_time, one_builder, remove_abandoned, written_aside

logger = logging.getLogger(__name__)

# Of text: a kill loses half a minute of a core, merging holds 60 MB in memory, and a terabyte has no more than 32,000.
PART_CHARACTERS = 1 << 25
_MERGES_A_PART_SECONDS = 60.0  # within which whoever merges has done another part


class Encoded(NamedTuple):
    """What some successive texts become.

    Attributes:
        num_texts: how many.
        num_characters: of all of them.
        arrays: name of a file -> what they append to it.
    """

    num_texts: int
    num_characters: int
    arrays: dict[str, np.ndarray]


Encode = Callable[[Iterable[str]], Generator[Encoded, None, None]]  # texts, none of them empty, in order


@dataclasses.dataclass(frozen=True)
class EncodeShare:
    """A step of a datatrove pipeline, its first and only one: each task writes the parts of its share of a corpus.

    Attributes:
        parts: folder of the parts, which all tasks see.
        texts: the corpus, `documents.LocalTexts` or `HubTexts`; it is read here, since the cache is named after it.
        encode: see `write_parts`.
    """

    parts: Path
    texts: Any
    encode: Encode = dataclasses.field(repr=False)

    def __call__(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Write what is missing of a task's parts.

        Raises:
            UsageError: another step stands before this one, whose documents would not be those of the corpus.
        """
        expect(
            data is None, "pipeline", type(self).__name__, "the first step; what others leave must be written before"
        )
        write_parts(self.parts, rank, world_size, self.texts.share(rank, world_size), self.encode)


@contextlib.contextmanager
def one_encoder(cache: Path, parts: Path) -> Iterator[bool]:
    """Whether this process is to make a cache from `parts`; the others wait until it is there.

    What killed processes left of other caches is removed once nobody wrote into it for six hours, but for what several
    tasks made: that is not done in passing.

    Raises:
        UsageError: nothing can be written there.
    """
    remove_abandoned(path for path in cache.parent.glob("parts-*") if path.is_dir() and _num_tasks(path) == 1)
    with one_builder(cache, parts) as builds:
        try:
            yield builds
        except FileNotFoundError:
            if not _is_made_by_another(cache, parts):
                raise
        finally:
            if builds and (cache.exists() or not any(parts.rglob("*.bin"))):  # all is merged, or no part was complete
                shutil.rmtree(parts, ignore_errors=True)


def _is_made_by_another(cache: Path, parts: Path) -> bool:
    """Wait for the cache as long as somebody merges."""
    seen, until = None, 0.0
    while not cache.exists():
        state = _read_json(parts / f"{cache.name}.json")
        if state != seen:
            seen, until = state, time.monotonic() + _MERGES_A_PART_SECONDS
        elif time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def write_all_parts(folder: Path, documents: Any, encode: Encode, cache: Path) -> int:
    """Write what is missing of all parts of a corpus, and return the number of tasks that they are of, 1 by default.

    Args:
        folder: of the parts; where some are merged already into another cache, all are made anew.
        documents: the corpus.
        encode: see `write_parts`.
        cache: that is to be made of them.
    """
    merges = [path.stem for path in folder.glob("*.json")]
    if merges and (merges != [cache.name] or not (folder / cache.name).is_dir()):
        shutil.rmtree(folder)
    tasks = _num_tasks(folder)
    missing = tasks - len(list(folder.glob(f"*-of-{tasks:05d}/end.json")))
    if tasks > 1 and missing:
        logger.warning("%s: parts of %s of %s tasks are not complete, tokenising these here", folder, missing, tasks)
    for rank in range(tasks):
        write_parts(folder, rank, tasks, documents if tasks == 1 else documents.share(rank, tasks), encode)
    return tasks


def write_parts(folder: Path, rank: int, world_size: int, documents: Iterable[str], encode: Encode) -> None:
    """Write what is missing of a task's parts.

    Args:
        folder: of the parts of all tasks.
        rank: number of the task.
        world_size: number of tasks.
        documents: the task's, always the same.
        encode: gives what some texts after the other become, none without a text; all with the same names and types.
    """
    task = folder / f"{rank:05d}-of-{world_size:05d}"
    with one_at_a_time(task):
        if (task / "end.json").exists():
            return
        there = list(itertools.takewhile(Path.is_dir, (task / f"{number:05d}" for number in itertools.count())))
        num_encoded, number = sum(_read_json(part / "part.json")["texts"] for part in there), len(there)
        if there:
            logger.warning("%s texts were tokenised before, going on behind them", f"{num_encoded:,}")
        with contextlib.closing(encode(itertools.islice(filter(None, documents), num_encoded, None))) as batches:
            for first in batches:
                with written_aside(task / f"{number:05d}") as aside:
                    _write_part(aside, itertools.chain([first], batches))
                number += 1
        task.mkdir(exist_ok=True)
        num_empty = left_out.of(getattr(documents, "place", "")).get("empty_documents", 0)
        _write_json(task / "end.json", {"parts": number, "empty_documents": num_empty})


def _write_part(folder: Path, batches: Iterable[Encoded]) -> None:
    num_texts = num_characters = 0
    types: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, Any] = {}
        for batch in batches:
            for name, array in batch.arrays.items():
                if name not in files:
                    files[name] = stack.enter_context((folder / f"{name}.bin").open("wb"))
                    types[name] = array.dtype.name
                files[name].write(array.tobytes())
            num_texts += batch.num_texts
            num_characters += batch.num_characters
            if num_characters >= PART_CHARACTERS:
                break
    (folder / "part.json").write_text(json.dumps({"texts": num_texts, "types": types}))


class Merge:
    """Parts as one cache; it goes on where one that was killed was.

        merge = Merge(folder, tasks, cache, {"tokens": 0})
        for part in merge.parts():
            merge.state["tokens"] += len(part["tokens"])
            merge.append({"train/tokens": part["tokens"]})
        merge.finish(summary)

    Args:
        folder: of the parts, all of which are there, or merged into this cache already.
        tasks: that they are of.
        cache: to make.
        state: what the caller counts, at its beginning; JSON-able.

    Attributes:
        state: what is counted of the parts so far.
        empty_documents: of all tasks.
    """

    def __init__(self, folder: Path, tasks: int, cache: Path, state: dict[str, Any]) -> None:
        self._cache, self._merged, self._file = cache, folder / cache.name, folder / f"{cache.name}.json"
        self._saved: dict[str, Any] = _read_json(self._file) or {"parts": 0, "bytes": {}, "state": state}
        ends = {rank: _read_json(folder / f"{rank:05d}-of-{tasks:05d}" / "end.json") for rank in range(tasks)}
        self._parts = [
            folder / f"{rank:05d}-of-{tasks:05d}" / f"{number:05d}"
            for rank, end in ends.items()
            for number in range(end["parts"])
        ]
        self.empty_documents = sum(end["empty_documents"] for end in ends.values())
        self.state: dict[str, Any] = self._saved["state"]

    def parts(self) -> Iterator[dict[str, np.ndarray]]:
        """The arrays of each part that is not merged yet; `append` is called for each."""
        from tqdm import tqdm

        for part in tqdm(self._parts[self._saved["parts"] :], desc="merging", unit="part", delay=2):
            types = json.loads((part / "part.json").read_text())["types"]
            yield {name: np.fromfile(part / f"{name}.bin", dtype=type_) for name, type_ in types.items()}

    def append(self, arrays: dict[str, np.ndarray]) -> None:
        """Write what a part becomes, file -> array, always the same files; only then is the part removed."""
        for name, array in arrays.items():
            path, size = self._merged / f"{name}.bin", self._saved["bytes"].get(name, 0)
            if not self._saved["parts"]:
                path.parent.mkdir(parents=True, exist_ok=True)
            # At its place, not at the end: a merge that was killed may have written some of it.
            with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
                file.seek(size)
                file.write(np.ascontiguousarray(array).data)
                file.flush()
                os.fsync(file.fileno())
            self._saved["bytes"][name] = size + array.nbytes
        part = self._parts[self._saved["parts"]]
        self._saved["parts"] += 1
        _write_json(self._file, self._saved)
        shutil.rmtree(part)

    def finish(self, summary: dict[str, Any]) -> None:
        """Make the cache appear, with a summary.json."""
        _write_json(self._merged / "summary.json", summary)
        try:
            self._merged.rename(self._cache)
        except OSError:  # without locks another run may have been faster
            if not self._cache.exists():
                raise


def _num_tasks(folder: Path) -> int:
    """Of the tasks with parts there; where there are some of several numbers, the largest."""
    return max((int(task.name.split("-of-")[1]) for task in folder.glob("[0-9]*-of-*")), default=1)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def _write_json(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as file:
        file.write(json.dumps(content))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
