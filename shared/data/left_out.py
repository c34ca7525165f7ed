"""What of the data is not used, counted by all openers, said by every run.

    left_out.note("images_without_a_caption", 3, where="my/images", more="such as row 17")   # an opener
    left_out.counts()                                                # a page: {"images_without_a_caption": 3}

Counts are of this process, which opens all of the data, and are logged when they are noted. To look at the same place
again counts once.
"""

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

_numbers: dict[tuple[str, str], int] = {}  # of what and where
_splits: dict[str, dict[str, int]] = {}  # of each place, the files of each split that was not read yet


def note(what: str, number: int, *, where: str, more: str = "") -> None:
    """Count what is left out of a place, in the stead of what was counted there before; 0 takes that back.

    Args:
        what: in the plural, with underscores.
        number: how many.
        where: file, folder, data set, or a part of it.
        more: one of them, or a share, for the log.
    """
    if number and _numbers.get((what, where)) != number:
        shown = f"{number:,} {what.replace('_', ' ')}" + (f", {more}" if more else "")
        logger.warning("left out of %s: %s", where, shown)
    _numbers[what, where] = number


def note_splits(where: str, files: Mapping[str, int], *, read: str) -> None:
    """Count the files of a place in splits that nothing reads.

    Args:
        where: folder.
        files: of each of its splits, how many.
        read: the split that is read now.
    """
    unread = _splits.setdefault(where, dict(files))
    unread.pop(read, None)


def counts() -> dict[str, int]:
    """What was left out and how often, over all places; what never was is not there."""
    totals: dict[str, int] = {}
    for (what, _), number in sorted(_numbers.items()):
        totals[what] = totals.get(what, 0) + number
    totals["files_of_other_splits"] = sum(sum(files.values()) for files in _splits.values())
    return {what: number for what, number in totals.items() if number}


def of(where: str) -> dict[str, int]:
    """What was left out of a place, for what is made of it once."""
    return {what: number for (what, place), number in _numbers.items() if place == where and number}


def forget() -> None:
    """Count anew, as a run does that begins in a process that had another."""
    _numbers.clear()
    _splits.clear()
