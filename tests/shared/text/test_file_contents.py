"""A file is read once while nobody touches it, and a change is never missed for what was remembered."""

import os
from pathlib import Path
from typing import Any

import pytest

from shared.text import file_contents
from shared.text.file_contents import contents_of


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the files that are opened from now on; what is remembered lies in a folder of its own."""
    names: list[str] = []

    def noting(path: Path, *mode: str, **options: Any) -> Any:
        names.append(path.name)
        return open(path, *mode, **options)

    monkeypatch.setattr(Path, "open", noting)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(file_contents, "_SETTLED_SECONDS", -1.0)
    return names


def write(folder: Path, number: int) -> list[Path]:
    files = [folder / f"{index}.txt" for index in range(number)]
    for file in files:
        file.write_bytes(file.name.encode() * 100)
    return files


def texts_among(names: list[str]) -> list[str]:
    found = [name for name in names if name.endswith(".txt")]
    names.clear()
    return found


def test_files_are_read_once_and_again_when_they_are_touched(opened: list[str], tmp_path: Path) -> None:
    files = write(tmp_path, 3)
    opened.clear()
    first = contents_of(files)
    assert texts_among(opened) == ["0.txt", "1.txt", "2.txt"]
    assert contents_of(files) == first
    assert texts_among(opened) == []
    before = files[1].stat()
    files[1].write_bytes(b"9.txt" * 100)  # as long, and by its time as old
    os.utime(files[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    opened.clear()
    changed = contents_of(files)
    assert texts_among(opened) == ["1.txt"]
    assert [old == new for old, new in zip(first, changed, strict=True)] == [True, False, True]


def test_a_file_that_was_just_written_is_not_remembered(
    opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk's clock may not tell the next change from this one."""
    monkeypatch.setattr(file_contents, "_SETTLED_SECONDS", 60.0)
    files = write(tmp_path, 1)
    for _ in range(2):
        opened.clear()
        contents_of(files)
        assert texts_among(opened) == ["0.txt"]


@pytest.mark.parametrize("is_damaged", [True, False])
def test_without_what_was_remembered_files_are_read(opened: list[str], tmp_path: Path, is_damaged: bool) -> None:
    files = write(tmp_path, 1)
    first = contents_of(files)
    [memory] = (tmp_path / "home").rglob("*.json")
    memory.unlink()
    if is_damaged:
        memory.write_text('{"half": ')
    else:
        memory.parent.rmdir()
        memory.parent.write_text("no folder")
    opened.clear()
    assert contents_of(files) == first
    assert texts_among(opened) == ["0.txt"]
