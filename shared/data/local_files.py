"""Files below a folder, and the splits that their names tell.

Hidden files and folders are passed over. Links are followed, each folder once, real ones first, so that a cycle ends. A
folder has splits only where its whole layout says so: each file lies in a folder called train, validation or test, or
has such a name. One file called train among others is not a split, nor is a class of images called so; where some files
are of training, others to evaluate on, and others of neither, the data is refused.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from shared.command_line import expect
from shared.data import left_out

logger = logging.getLogger(__name__)

SPLIT_WORDS = {  # those of the `datasets` library
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
EVALUATION_SPLITS = ("validation", "val", "dev", "test")  # whose names, or names that so begin, are to evaluate on
_SPLIT_NAME = re.compile(rf"({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])(.*)")
_LIKE_A_SPLIT = re.compile(r"(?<![a-z])(train|training|val|valid|validation|test)(?![a-z])")
_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$")
_ABOUT_SUFFIXES = ("", ".txt", ".md", ".rst")
_ABOUT = {"readme", "license", "licence", "licenses", "copying", "notice", "changelog", "citation", "authors"}


def find_files(folder: Path, is_wanted: Callable[[str], object]) -> list[Path]:
    """The files below `folder` whose names are wanted, sorted; others, and what leads nowhere, are counted."""
    entered: set[tuple[int, int]] = set()
    found: list[str] = []
    broken: list[str] = []
    waiting = [str(folder)]  # real folders, then linked ones
    while waiting:
        links: list[str] = []
        for start in waiting:
            _walk(start, entered, found, links, broken)
        waiting = sorted(links)
    wanted: list[str] = []
    others: list[str] = []
    for file in sorted(found):
        name = os.path.basename(file)
        if is_wanted(name):
            wanted.append(file)
        elif not is_about_the_data(name):
            others.append(file)
    for what, files in (("files_of_other_kinds", others), ("broken_links_and_locked_folders", sorted(broken))):
        left_out.note(what, len(files), where=str(folder), more=f"such as {next(iter(files), '')}")
    return list(map(Path, wanted))  # Path is slow


def is_about_the_data(name: str) -> bool:
    """Whether the name is that of a README, a license or the like, which no folder of texts means as data."""
    stem, *suffixes = name.lower().split(".")
    return stem in _ABOUT and ".".join(["", *suffixes[:1]]) in _ABOUT_SUFFIXES


def part_by_split(folder: Path, files: Sequence[Path], *, by_file_name: bool) -> dict[str, list[Path]]:
    """The files of each split; all are of train where the layout says no splits.

    A split is called train, validation or test, or as its files are: test_unseen.jsonl. A number behind the word, or
    the shard in train-00000-of-00002.parquet, is no part of the name; where no file is plainly of train, all whose
    names begin so are.

    Args:
        folder: that was searched.
        files: found in it.
        by_file_name: whether names of files tell splits; else those of folders alone.

    Raises:
        UsageError: some files are to train on, others to evaluate on, and others neither.
    """
    splits: dict[str, list[Path]] = {}
    start = len(folder.parts)
    for file in files:
        known = [SPLIT_WORDS[part] for part in map(str.lower, file.parts[start:-1]) if part in SPLIT_WORDS]
        split = known[0] if known else _split_of(file.name) if by_file_name else ""
        splits.setdefault(split, []).append(file)
    others = splits.pop("", [])
    kinds = {_place_of(split)[0] for split in splits}
    if others:
        example = next(iter(splits.values()))[0] if splits else others[0]
        expected = f"each file or none to be of a split: {example.relative_to(folder)} is of one, "
        expect(len(kinds) < 2, "data", str(folder), f"{expected}{others[0].relative_to(folder)} is of none")
        names = [file.relative_to(folder) if by_file_name else file.relative_to(folder).parent for file in others]
        likely = next((name for name in names if _LIKE_A_SPLIT.search(str(name).lower())), None)
        if likely and not splits:
            logger.warning("%s has one split: names such as %s tell none", folder, likely)
        return {"train": list(files)}
    if "train" not in splits:
        parts = [split for split in splits if _place_of(split)[0] == 0]
        splits |= {"train": sorted(file for split in parts for file in splits.pop(split))} if parts else {}
    return {split: splits[split] for split in sorted(splits, key=_place_of)}


def usual_name(split: str) -> str:
    """What a split is called where it is called by another word for it, such as dev."""
    return SPLIT_WORDS.get(split.lower(), split)


def split_named(asked: str, splits: Sequence[str]) -> str:
    """The split that is asked for by its name or, as dev or val, by another word for it; "" = there is none."""
    alike = (split for split in splits if usual_name(split) == usual_name(asked))
    return asked if asked in splits else next(alike, "")


def split_to_evaluate_on(splits: Sequence[str], apart_from: str = "") -> str:
    """The first of `EVALUATION_SPLITS` that is there, or begins the name of one, but `apart_from`; "" = none."""
    names = [name for name in splits if name != split_named(apart_from, splits)]
    for kind in EVALUATION_SPLITS:
        if alike := [name for name in names if name.startswith(kind)]:
            return kind if kind in alike else alike[0]
    return ""


def _place_of(split: str) -> tuple[int, str]:
    """Splits to train on come first, then those to choose by, then those to test on."""
    match = _SPLIT_NAME.match(split)
    assert match, "a split's name begins with a word for one"
    return ("train", "validation", "test").index(SPLIT_WORDS[match[1]]), split


def _split_of(name: str) -> str:
    """The split that a file's name tells; "" = none."""
    stem = _SHARD.sub("", name.partition(".")[0].lower())
    match = _SPLIT_NAME.fullmatch(stem)
    if not match:
        return ""
    return stem if re.search("[a-z]", match[2]) else SPLIT_WORDS[match[1]]


def _walk(start: str, entered: set[tuple[int, int]], found: list[str], links: list[str], broken: list[str]) -> None:
    """Add the files below `start` to `found`, folders that are links to `links`, and to `broken` what leads nowhere."""
    folders = [start]
    while folders:
        folder = folders.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in entered:
                continue
            entered.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            broken.append(f"{folder} ({error.strerror})")
            continue
        for entry in visible:
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError as error:  # a link to itself
                broken.append(f"{entry.path} ({error.strerror})")
                continue
            if is_folder:
                (links if entry.is_symlink() else folders).append(entry.path)
            elif is_file:
                found.append(entry.path)
            else:
                broken.append(f"{entry.path} ({'it is not there' if entry.is_symlink() else 'it is no file'})")
