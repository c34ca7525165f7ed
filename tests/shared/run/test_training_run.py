"""`Run` does what is due, in order, whatever the cadences, stops and bad gradients, on one process and on two."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.run.checkpoints import list_checkpoints
from tests.conftest import ROOT
from tests.launching import launch
from tests.shared.run import loops
from tests.shared.run.loops import drive, expected, random_case

NUMBER = 28
NUMBER_ON_TWO = 12


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One process, whose peak is not measured; the signal handlers that a run sets are taken back."""
    from accelerate import Accelerator

    monkeypatch.setattr("shared.run.training_run.peak", lambda _: 1e9)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield Accelerator(cpu=True)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_cases_have_all_ends_and_some_go_on() -> None:
    starts = [expected(random_case(seed)) for seed in range(NUMBER)]
    assert {start[-1][0] for case in starts for start in case} == {"finished", "RunStopped", "TooManyNonFiniteUpdates"}
    assert sum(len(case) > 1 for case in starts) >= 10
    assert any(event[0] == "push" for case in starts for start in case for event in start)
    ends = [(start[-1][0], start[-3 if start[-2][0] == "save" else -2][::2]) for case in starts for start in case]
    assert sum(end == ("RunStopped", ("write", False)) for end in ends) >= 10  # some of them in an evaluation


@pytest.mark.parametrize("seed", range(NUMBER))
def test_what_is_due_is_done_in_order(accelerator: Any, tmp_path: Path, seed: int) -> None:
    case, folder = random_case(seed), tmp_path / "run"
    starts = expected(case)
    for events in starts:
        assert drive(case, folder, accelerator, 0) == events
    check_files(folder, case, starts)


def check_files(folder: Path, case: loops.Case, starts: list[Any]) -> None:
    """No step is lost and none comes twice; entries and the newest checkpoint hold what they must."""
    written = [event[1] for start in starts for event in start if event[0] == "write" and event[2]]
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == written
    seconds = [entry["perf/training_seconds"] for entry in entries]
    assert seconds == sorted(seconds)
    for entry in entries:
        step = entry["step"]
        is_evaluated = step == case.max_steps or (case.eval_every and step % case.eval_every == 0)
        assert ("eval/loss" in entry) == bool(is_evaluated)
        if "train/loss" in entry:
            rates = {"train/skipped_updates", "perf/tokens_per_second", "perf/mfu", "perf/data_wait_fraction"}
            assert rates <= entry.keys()
            assert entry["train/skipped_updates"] == sum(bad < step for bad in case.bad)
    newest = [event[1] for start in starts for event in start if event[0] == "save"][-1]
    state = json.loads((list_checkpoints(folder)[0] / "state.json").read_text())
    assert (state["step"], state["state"]["number"]) == (newest, newest - 1)
    assert state["state"]["skipped"] == sum(bad < newest for bad in case.bad)


def test_a_finished_run_does_nothing_more(accelerator: Any, tmp_path: Path) -> None:
    case = loops.Case(3, 1, 0, 0, 0, 9, frozenset(), frozenset())
    drive(case, tmp_path / "run", accelerator, 0)
    assert drive(case, tmp_path / "run", accelerator, 0) == [("start", 3, 2), ("finished", 3)]


@pytest.mark.parametrize("forgotten", ["count_update", "write", "save"])
def test_a_loop_that_forgets_something_is_told(
    accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    case = loops.Case(2, 1, 0, 1, 0, 9, frozenset(), frozenset())
    if forgotten == "count_update":
        due = loops.Run.count_update
        monkeypatch.setattr(
            loops.Run, "count_update", lambda self, *a, **k: (due(self, *a, **k), due(self, *a, **k))[0]
        )
    else:
        monkeypatch.setattr(loops.Run, forgotten, lambda self, _: None)
    with pytest.raises(AssertionError, match=r"counted and written|is not there|are written before"):
        drive(case, tmp_path / "run", accelerator, 0)


@pytest.mark.slow
def test_two_processes_do_the_same_and_stop_together(tmp_path: Path) -> None:
    status, output = launch("multi_cpu", Path(loops.__file__), tmp_path, "1000", str(NUMBER_ON_TWO))
    assert status == 0, output
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    for index in range(NUMBER_ON_TWO):
        case = random_case(1000 + index)
        starts = [[list(event) for event in start] for start in expected(case, 2)]
        assert first[index] == second[index] == starts
        check_files(tmp_path / str(1000 + index), case, starts)


DIFFERING = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from shared.command_line import exit_codes
from shared.fields import RunControl
from shared.run.training_run import Run, start

with exit_codes():
    control = RunControl(output_dir=sys.argv[1], global_batch_size=2, max_steps=1, max_grad_norm=1.0)
    accelerator, _ = start(control)
    run = Run(control, accelerator)
    data = {{"data": "corpus.txt", "data_fingerprint": ["a" if os.environ["RANK"] == "0" else "b"]}}
    run.record(Path(__file__), data)
"""


@pytest.mark.slow
def test_nodes_with_other_data_are_refused(tmp_path: Path) -> None:
    """They would train on an order that nobody knows."""
    (tmp_path / "program.py").write_text(DIFFERING.format(root=str(ROOT)))
    status, output = launch("multi_cpu", tmp_path / "program.py", str(tmp_path / "run"))
    assert status == 1
    expected = "error: data: 'corpus.txt': expected the same data on all nodes, what process 1 found differs"
    assert output.count(expected) == 1
    assert not (tmp_path / "run" / "run.json").exists()
