"""A folder is complete or absent, however its writing ends."""

import os
from pathlib import Path

import pytest

from shared.atomic_folder import written_aside


def write(folder: Path, content: str) -> None:
    with written_aside(folder) as aside:
        (aside / "nested").mkdir()
        (aside / "nested" / "file").write_text(content)
        assert aside.name.startswith(".")
        assert aside.parent == folder.parent


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with written_aside(folder) as aside:
        (aside / "file").write_text("x")
        assert not folder.exists()
    assert os.listdir(folder) == ["file"]
    assert os.listdir(folder.parent) == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with written_aside(tmp_path / "a") as aside:
            (aside / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_the_slower_of_two_runs_keeps_what_the_faster_one_wrote(tmp_path: Path) -> None:
    with written_aside(tmp_path / "a") as aside:
        (aside / "file").write_text("slow")
        write(tmp_path / "a", "fast")
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a" / "nested" / "file").read_text() == "fast"


def test_a_rename_that_fails_for_another_reason_is_said(tmp_path: Path) -> None:
    def vanish() -> None:
        with written_aside(tmp_path / "a") as aside:
            aside.rmdir()

    with pytest.raises(FileNotFoundError):
        vanish()


def test_what_killed_runs_left_is_removed_after_a_week(tmp_path: Path) -> None:
    for name in (".a.old", ".a.new", ".b.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
        if name.endswith("old"):
            os.utime(tmp_path / name, (1, 1))
    write(tmp_path / "a", "x")
    assert sorted(os.listdir(tmp_path)) == [".a.new", ".b.old", "a"]
