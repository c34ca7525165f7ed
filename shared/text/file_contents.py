"""What tells a file's content: sampled once on a node, and remembered for as long as the file is not touched.

Processes that come later, and later runs, find what the first one read (`runtime.collectives.node_main_first` lets one
of a node go first).
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.runtime.cache_folder import cache_folder

_WHOLE = 1 << 26  # bytes of a file up to which all of it is read, the first time
_SAMPLED_BLOCKS, _BLOCK = 256, 1 << 14  # that are read of a larger one: 4 MB
_SETTLED_SECONDS = 2.0  # after a file's last change; another one right behind it may have the same time


def contents_of(files: Sequence[Path]) -> list[tuple[int, str]]:
    """Of each file its size and a SHA-256 sum: of all of it up to 64 MB, of a larger one of 256 places of it.

    A file that has the size, the times, the inode and the device of when it was last read is not read again. The time
    of the last change is among them, which every write sets and no program can set back.
    """
    names = [str(file.absolute()) for file in files]
    key = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:24]
    memory = cache_folder("") / "contents" / f"{key}.json"
    known = _recall(memory)
    found: dict[str, Any] = {}
    for name in names:
        state = _state_of(name)
        if known.get(name, {}).get("state") == state:
            found[name] = known[name]
            continue
        began = time.time()
        digest = _sum_of(Path(name), state["size"])
        is_settled = began - state["changed"] / 1e9 > _SETTLED_SECONDS and _state_of(name) == state
        found[name] = {"state": state if is_settled else {}, "size": state["size"], "sum": digest}
    if found != known:
        _remember(memory, found)
    return [(found[name]["size"], found[name]["sum"]) for name in names]


def _state_of(name: str) -> dict[str, int]:
    about = os.stat(name)
    times = {"written": about.st_mtime_ns, "changed": about.st_ctime_ns}
    return {"size": about.st_size, **times, "inode": about.st_ino, "device": about.st_dev}


def _sum_of(file: Path, size: int) -> str:
    with file.open("rb") as stream:
        if size <= _WHOLE:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        for place in range(_SAMPLED_BLOCKS):
            stream.seek((size - _BLOCK) * place // (_SAMPLED_BLOCKS - 1))
            digest.update(stream.read(_BLOCK))
        return digest.hexdigest()


def _recall(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or another run of an older version wrote it
        return {}
    return known if isinstance(known, dict) and all(isinstance(one, dict) for one in known.values()) else {}


def _remember(memory: Path, found: dict[str, Any]) -> None:
    """Without room or rights nothing is remembered, and the files are read again next time."""
    aside = memory.with_name(f".{memory.name}.{os.uname().nodename}.{os.getpid()}")
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(found), encoding="utf-8")
        aside.replace(memory)
    with contextlib.suppress(OSError):
        aside.unlink(missing_ok=True)
