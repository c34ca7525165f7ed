"""Data sets on the Hub: whether `--data` can name one, and which of its commits this program reads."""

import re
from collections.abc import Mapping

# Endings of the files that recipes read, which no Hub id has.
_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet", ".gz", ".xz", ".zst", ".tar", ".jpg", ".jpeg", ".png", ".webp")
# By what `--data` says: the commits that a run began with, and those that were read. Of the process, as `left_out` is.
_pinned: dict[str, str] = {}
_read: dict[str, str] = {}


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, [OWNER/]NAME[@REVISION], and not that of a path to a file."""
    is_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?", name, re.ASCII)
    return bool(is_id) and not name.lower().endswith(_FILE_SUFFIXES)


def pin(commits: Mapping[str, str]) -> None:
    """Begin a run: read these data sets at these commits, and note anew what is read.

    Args:
        commits: what `commits` said when the run began; empty = it begins now.
    """
    _pinned.clear()
    _pinned.update(commits)
    _read.clear()


def commits() -> dict[str, str]:
    """The commit of each data set that was read so far, by what `--data` said."""
    return dict(_read)


def resolve(data: str, config: str) -> tuple[str, str | None, str | None]:
    """What `datasets` takes for a data set: its id, its configuration, and the commit to read.

    That is the pinned one, or the newest of the branch, tag or commit behind an @, or else of the main branch. Without
    a network it is the newest that was read before.
    """
    import datasets

    name, _, revision = data.partition("@")
    builder = datasets.load_dataset_builder(name, config or None, revision=_pinned.get(data) or revision or None)
    if not re.fullmatch("[0-9a-f]{40}", str(builder.hash)):  # no Hub that counts commits
        return name, config or None, revision or None
    _read[data] = str(builder.hash)
    return name, config or None, _read[data]
