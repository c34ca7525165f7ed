"""Turns on the cores, with real processes."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

PROGRAM = """
import sys, time
from tests.core_turns import alone, sharing
kind, file = {"alone": alone, "sharing": sharing}[sys.argv[1]], sys.argv[2]
for _ in range(5):
    with kind():
        for edge in ("begin", "end"):
            with open(file, "a") as log:
                log.write(f"{sys.argv[1]} {edge}\\n")
            time.sleep(0.02)
"""


def test_what_runs_alone_runs_alone_and_gets_its_turn(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_TESTRUNUID", tmp_path.name)
    kinds = ["sharing", "sharing", "alone", "alone"]
    command = [sys.executable, "-c", PROGRAM]
    started = [subprocess.Popen([*command, kind, str(tmp_path / "log")], cwd=ROOT) for kind in kinds]
    assert [process.wait(timeout=60) for process in started] == [0] * 4
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 40
    for place, line in enumerate(lines):
        if line == "alone begin":
            assert lines[place + 1] == "alone end"
    running = 0
    for line in lines:
        running += {"sharing begin": 1, "sharing end": -1}.get(line, 0)
        assert running == 0 or line.startswith("sharing")
