"""metrics.jsonl has no step twice and none missing, whatever interrupted the run before."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from shared.run.log import RunLog


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def entries(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in entries(folder)]


def log_steps(accelerator: Accelerator, folder: Path, first: int, last: int) -> None:
    log = RunLog(accelerator, folder, first, 20)
    for step in range(first + 1, last + 1):
        log.write(step, {"train/loss": 10.0 - step} if step % 2 == 0 else {})
    log.close()


def test_entries_have_their_step_and_metrics(accelerator, tmp_path):
    log_steps(accelerator, tmp_path, 0, 6)
    assert entries(tmp_path) == [{"step": step, "train/loss": 10.0 - step} for step in (2, 4, 6)]


@pytest.mark.parametrize(("logged", "resumed_at"), [(7, 6), (7, 5), (8, 3), (8, 0), (6, 6), (0, 0)])
def test_resuming_neither_repeats_nor_misses_a_step(accelerator, tmp_path, logged, resumed_at):
    log_steps(accelerator, tmp_path, 0, logged)
    log_steps(accelerator, tmp_path, resumed_at, 10)
    assert steps(tmp_path) == [2, 4, 6, 8, 10]


def test_any_number_of_interruptions(accelerator, tmp_path):
    for first, last in ((0, 5), (4, 9), (6, 7), (6, 13), (12, 12), (10, 20)):
        log_steps(accelerator, tmp_path, first, last)
        with (tmp_path / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 99, "train/lo')
    log_steps(accelerator, tmp_path, 20, 20)
    assert steps(tmp_path) == list(range(2, 21, 2))


@pytest.mark.parametrize("half", ['{"step": 6', '{"step": 6, "train/loss": 1.', "{", '{"step": 6, "a": 1.5'])
def test_half_a_last_line_is_dropped(accelerator, tmp_path, half):
    log_steps(accelerator, tmp_path, 0, 4)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write(half)
    log = RunLog(accelerator, tmp_path, 10, 20)
    assert [entry["step"] for entry in log.read()] == [2, 4]
    assert steps(tmp_path) == [2, 4]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_new_run_has_no_entries(accelerator, tmp_path):
    log = RunLog(accelerator, tmp_path, 0, 20)
    assert log.read() == []
    assert log.last_evaluation() == {}
    assert not (tmp_path / "metrics.jsonl").exists()


def test_numbers_that_json_has_no_word_for(accelerator, tmp_path):
    log = RunLog(accelerator, tmp_path, 0, 20)
    log.write(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/skipped_updates": 1})
    assert entries(tmp_path) == [{"step": 1, "train/loss": None, "train/grad_norm": None, "train/skipped_updates": 1}]
    [entry] = log.read()
    assert math.isnan(entry["train/loss"])
    RunLog(accelerator, tmp_path, 1, 20)
    assert entries(tmp_path)[0]["train/loss"] is None


def test_the_last_evaluation(accelerator, tmp_path):
    log = RunLog(accelerator, tmp_path, 0, 20)
    log.write(1, {"train/loss": 3.0})
    assert log.last_evaluation() == {}
    log.write(2, {"train/loss": 2.0, "eval/loss": 2.5, "eval/perplexity": 12.2})
    log.write(3, {"train/loss": 1.5})
    assert log.last_evaluation() == {"eval/loss": 2.5, "eval/perplexity": 12.2}
    log.write(4, {"eval/loss": 2.25})
    assert log.last_evaluation() == {"eval/loss": 2.25}
    assert RunLog(accelerator, tmp_path, 3, 20).last_evaluation() == {"eval/loss": 2.5, "eval/perplexity": 12.2}


def test_lines_without_a_terminal(accelerator, tmp_path, capsys):
    log = RunLog(accelerator, tmp_path, 0, 20)
    log.write(10, {"train/loss": 1.23456, "perf/tokens_per_second": 12345.6, "perf/mfu": 0.1234})
    log.write(11, {})
    log.say("done")
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("step 10/20  loss 1.235  tokens_per_second 12,346  mfu 12.3%  left 0:0")
    assert (second, err) == ("done", "")


def test_the_two_losses_of_a_line_are_told_apart(accelerator, tmp_path, capsys):
    RunLog(accelerator, tmp_path, 0, 20).write(10, {"train/loss": 1.5, "eval/loss": 2.5})
    assert "  loss 1.5  eval/loss 2.5  left" in capsys.readouterr().out
