"""Files below a folder, and the splits that their names tell.

Hidden files and folders are passed over. Links are followed, each folder once, so that a cycle ends. A folder has
splits only where its whole layout says so: each file lies in a folder called train, validation or test, or has such a
name. One file called train among others is not a split, nor is a class of images called so.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

SPLIT_WORDS = {  # those of the `datasets` library
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
EVALUATION_SPLITS = ("validation", "val", "dev", "test")  # whose names, or names that so begin, are to evaluate on
_SPLIT_NAME = re.compile(rf"({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?![a-z])(.*)")
_SHARD = re.compile(r"-\d+-of-\d+$")
_ABOUT = {"readme", "license", "licence", "licenses", "copying", "notice", "changelog", "citation", "authors"}


def find_files(folder: Path, is_wanted: Callable[[Path], object]) -> list[Path]:
    """The files below `folder` that are wanted, sorted."""
    return sorted(file for file in _walk(folder, set()) if is_wanted(file))


def is_about_the_data(file: Path) -> bool:
    """Whether a file is a README, a license or the like, which no folder of texts means as data."""
    return file.name.partition(".")[0].lower() in _ABOUT


def part_by_split(folder: Path, files: Sequence[Path], *, by_file_name: bool) -> dict[str, list[Path]]:
    """The files of each split; all are of train where the layout says no splits.

    A split is called train, validation or test, or as its files are: test_unseen.jsonl. What follows a number, or the
    shard in train-00000-of-00002.parquet, is not a part of the name.

    Args:
        folder: that was searched.
        files: found in it.
        by_file_name: whether names of files tell splits; else those of folders alone.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        *folders, name = file.relative_to(folder).parts
        known = [SPLIT_WORDS[part.lower()] for part in folders if part.lower() in SPLIT_WORDS]
        split = known[0] if known else _split_of(name) if by_file_name else ""
        splits.setdefault(split, []).append(file)
    if "" in splits:
        return {"train": list(files)}
    return {split: splits[split] for split in sorted(splits, key=_place_of)}


def split_named(asked: str, splits: Sequence[str]) -> str:
    """The split that is asked for by its name or, as dev or val, by another word for it; "" = there is none."""
    usual = SPLIT_WORDS.get(asked.lower(), "")
    return asked if asked in splits else usual if usual in splits else ""


def split_to_evaluate_on(splits: Sequence[str], apart_from: str = "") -> str:
    """The first of `EVALUATION_SPLITS` that is there, or begins the name of one, but `apart_from`; "" = none."""
    names = [name for name in splits if name != apart_from]
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
    stem = _SHARD.sub("", name.partition(".")[0]).lower()
    match = _SPLIT_NAME.fullmatch(stem)
    if not match:
        return ""
    split = SPLIT_WORDS[match[1]]
    is_numbered = not re.search("[a-z]", match[2])
    return split if is_numbered or split == "train" else stem


def _walk(folder: Path, above: set[tuple[int, int]]) -> Iterator[Path]:
    """Files below a folder; `above` holds the folders that were entered, by device and inode."""
    status = folder.stat()
    if (status.st_dev, status.st_ino) in above:
        return
    above.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as entries:
        visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in visible:
        if entry.is_dir():
            yield from _walk(Path(entry.path), above)
        elif entry.is_file():
            yield Path(entry.path)
