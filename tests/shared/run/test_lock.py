"""A run folder has one run at a time, and a dead one holds nothing."""

import errno
import fcntl
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.command_line import UsageError
from shared.run.lock import lock_folder
from tests.conftest import ROOT

HOLD = """
import sys, time
from pathlib import Path
from shared.run.lock import lock_folder
held = lock_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_folder_that_another_process_holds_is_refused_until_that_is_killed(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    expected = (
        f"output_dir: {str(tmp_path)!r}: expected a folder that no other run writes into, process {other.pid} on "
    )
    for _ in range(2):  # the second try finds it as the first did
        with pytest.raises(UsageError, match=re.escape(expected)):
            lock_folder(tmp_path, wait_seconds=0.0)
    other.kill()
    other.wait()
    held = lock_folder(tmp_path, wait_seconds=5.0)
    assert held


def test_a_closed_file_holds_nothing(tmp_path: Path) -> None:
    first = lock_folder(tmp_path)
    assert first
    first.close()
    command = [sys.executable, "-c", HOLD.replace("time.sleep(60)", ""), str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "held\n"


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert lock_folder(tmp_path) is None
    assert "cannot be locked (No locks available)" in caplog.text
