"""The report of a finished run is made from what the run recorded."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator

from shared.run.hub import HubPusher
from shared.run.log import RunLog
from shared.run.report import finish_run, write_report


def test_report_holds_what_the_run_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "my_run"
    run_dir.mkdir()
    record = {"init": "scratch", "data": "sample", "command": ["pretrain.py"], "git_commit": "", "parameters": 1234}
    (run_dir / "run.json").write_text(json.dumps({**record, "hardware": "2 cores", "versions": {"torch": "2"}}))
    log = RunLog(Accelerator(cpu=True), run_dir, 0, 2)
    log.write(1, {"train/loss": 4.0})
    log.write(2, {"train/loss": 3.0, "eval/loss": 3.25, "eval/bits_per_byte": 1.5})
    results = {"steps": 2, "training_seconds": 61.0, "training_flops": 2e9}
    figures = {"Mistakes": "mistakes.png"}
    write_report(log, run_dir, "text-generation", "print('load me')", results, "once upon a time", figures, None)
    written = json.loads((run_dir / "run.json").read_text())
    assert written["data"] == "sample"
    assert {name: written[name] for name in results} == results
    assert (run_dir / "figures" / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (run_dir / "README.md").read_text()
    for part in (
        "my_run",
        "1,234 parameters",
        "2 updates",
        "| `eval/bits_per_byte` | 1.5000 |",
        "once upon a time",
        "figures/mistakes.png",
    ):
        assert part in card
    printed = capsys.readouterr().out
    assert "once upon a time" in printed
    assert "eval/loss 3.2500  eval/bits_per_byte 1.5000" in printed


def test_the_card_quotes_the_evaluation_of_what_was_exported(tmp_path: Path) -> None:
    """Which is not the last one where the best model is kept."""
    record = {"init": "scratch", "data": "sample", "command": ["finetune.py"], "git_commit": "", "parameters": 1234}
    (tmp_path / "run.json").write_text(json.dumps({**record, "hardware": "2 cores", "versions": {"torch": "2"}}))
    log = RunLog(Accelerator(cpu=True), tmp_path, 0, 2)
    log.write(2, {"train/loss": 3.0, "eval/accuracy": 0.25})
    results = {"steps": 2, "training_seconds": 61.0, "training_flops": 2e9}
    write_report(log, tmp_path, "text-classification", "", results, "", {}, {"eval/accuracy": 0.75})
    card = (tmp_path / "README.md").read_text()
    assert "| `eval/accuracy` | 0.7500 |" in card
    assert "0.25" not in card


def test_the_end_of_a_run_is_pushed_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a pusher that cannot reach its Hub: the run ends all the same, and prints the command that pushes again."""
    run_dir = tmp_path / "my_run"
    run_dir.mkdir()
    record = {"init": "scratch", "data": "sample", "command": ["pretrain.py"], "git_commit": "", "parameters": 1234}
    (run_dir / "run.json").write_text(json.dumps({**record, "hardware": "2 cores", "versions": {"torch": "2"}}))
    log = RunLog(Accelerator(cpu=True), run_dir, 0, 2)
    log.write(2, {"train/loss": 3.0, "eval/loss": 3.25})
    results = {"steps": 2, "training_seconds": 61.0, "training_flops": 2e9}
    shown = {"pipeline_tag": "fill-mask", "usage": "", "results": results, "samples": "a [mask]", "figures": {}}
    shown |= {"evaluation": None}
    finish_run(log, HubPusher("", True), run_dir, **shown, is_main_process=True)
    assert "to push again" not in capsys.readouterr().out
    finish_run(log, HubPusher("me/offline", True), run_dir, **shown, is_main_process=True)
    assert "to push again: hf upload me/offline" in capsys.readouterr().out
    (run_dir / "README.md").unlink()
    finish_run(log, HubPusher("", True), run_dir, **shown, is_main_process=False)
    assert not (run_dir / "README.md").exists()
