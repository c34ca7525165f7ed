"""A folder is complete or absent, however its writing ends."""

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from shared.command_line import UsageError
from shared.runtime.atomic_folder import one_at_a_time, one_builder, remove_abandoned, written_aside


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


def test_where_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for block, field in ((written_aside, "cache_dir"), (one_at_a_time, "cache_dir")):
        with pytest.raises(UsageError, match=f"{field}: '.*/file/a': expected a folder that can be written.*Not a dir"):
            block(tmp_path / "file" / "a" / "b").__enter__()


def test_what_killed_runs_left_is_removed_once_nobody_wrote_for_long(tmp_path: Path) -> None:
    for name in (".a.old", ".a.new", ".a.written", ".b.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
        if not name.endswith("new"):
            for path in (tmp_path / name / "file", tmp_path / name):
                os.utime(path, (1, 1))
    (tmp_path / ".a.written" / "file").touch()  # a folder keeps its time when a file in it grows
    os.utime(tmp_path / ".a.written", (1, 1))
    (tmp_path / ".a.lock").touch()
    os.utime(tmp_path / ".a.lock", (1, 1))
    write(tmp_path / "a", "x")
    assert sorted(os.listdir(tmp_path)) == [".a.lock", ".a.new", ".a.written", ".b.old", "a"]


def test_abandoned_folders_are_removed_unless_their_lock_is_held(tmp_path: Path) -> None:
    for name in ("old", "new", "held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
        if name != "new":
            for path in (tmp_path / name / "file", tmp_path / name):
                os.utime(path, (1, 1))
    with one_at_a_time(tmp_path / "held"):
        remove_abandoned([*tmp_path.iterdir(), tmp_path / "absent"])
    assert sorted(os.listdir(tmp_path)) == [".held.lock", "held", "new"]


def build_once(folder: Path) -> None:
    with one_at_a_time(folder):
        if not folder.exists():
            (folder.parent / f"built_by_{os.getpid()}").touch()
            time.sleep(0.3)
            folder.mkdir()


def test_of_several_processes_one_builds_and_the_others_find(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_once, args=(tmp_path / "deep" / "a",)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len([name for name in os.listdir(tmp_path / "deep") if name.startswith("built_by")]) == 1


def make(folder: Path, seconds: float, fails: bool) -> None:
    with one_builder(folder) as builds:
        if builds:
            (folder.parent / f"began_{os.getpid()}").touch()
            time.sleep(seconds)
            if fails:
                raise ValueError
            write(folder, "x")


def test_of_several_builders_one_builds_also_after_one_that_failed(tmp_path: Path) -> None:
    context, folder = multiprocessing.get_context("fork"), tmp_path / "a"
    first = context.Process(target=make, args=(folder, 0.5, True))
    first.start()
    time.sleep(0.2)
    others = [context.Process(target=make, args=(folder, 0.5, False)) for _ in range(2)]
    for process in others:
        process.start()
    first.join(30)
    late = context.Process(target=make, args=(folder, 0.5, False))  # which finds no lock file, or a new one
    late.start()
    for process in (*others, late):
        process.join(30)
        assert process.exitcode == 0
    assert first.exitcode == 1
    assert sorted(name for name in os.listdir(tmp_path) if not name.startswith("began")) == ["a"]
    assert len(os.listdir(tmp_path)) == 3


def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    make(tmp_path / "a", 0, False)
    assert (tmp_path / "a" / "nested" / "file").read_text() == "x"
