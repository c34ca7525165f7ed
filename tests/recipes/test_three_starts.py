"""Training that is stopped in an update and in an evaluation is that of one start, to the bit, in every page."""

import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.command_line import RunStopped
from tests.recipes.pages import PAGES
from tests.recipes.runs import assert_same, assert_same_weights, metrics_of, run

RUNS = [*((name, False) for name in PAGES), ("gpt", True), ("resnet", True)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "streams"), RUNS)
def test_two_stops_change_nothing(
    name: str, streams: bool, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests, data = PAGES[name]
    page, fixtures = request.getfixturevalue(name), [request.getfixturevalue(fixture) for fixture in data]
    fields: dict[str, Any] = {"max_steps": 6, "warmup_steps": 1, "log_every": 1, "eval_every": 3, "save_every": 0}
    fields |= {"streaming": True, "num_workers": 0} if streams else {}
    fields |= {"per_device_batch_size": 2, "best_metric": "loss"}  # several batches to evaluate
    quick = {"eval_rows": 5, "sample_steps": 1}
    fields |= {field: value for field, value in quick.items() if hasattr(page.Config, field)}

    def start(run_dir: Path) -> None:
        run(page, tests.config_of(page, *fixtures, run_dir, **fields))

    start(tmp_path / "whole")
    train_update, until_stopped, updates, evaluations = page.train_update, page.until_stopped, iter(range(6)), [1]

    def stopped_update(*values: Any, **options: Any) -> Any:
        if next(updates) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_update(*values, **options)

    def stopped_evaluation(accelerator: Any, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in until_stopped(accelerator, batches):
            if evaluations:
                os.kill(os.getpid(), signal.SIGTERM)
                evaluations.pop()
            yield batch

    monkeypatch.setattr(page, "train_update", stopped_update)
    monkeypatch.setattr(page, "until_stopped", stopped_evaluation)
    for said, written in (("step 2 of 6; the same", [1, 2]), ("step 3 of 6, which is evaluated", [1, 2])):
        with pytest.raises(RunStopped, match=f"saved at {said}"):
            start(tmp_path / "stopped")
        assert [entry["step"] for entry in metrics_of(tmp_path / "stopped")] == written
    start(tmp_path / "stopped")
    assert [entry["step"] for entry in metrics_of(tmp_path / "stopped")] == [1, 2, 3, 4, 5, 6]
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    if "finetune" not in name:
        check_best(tmp_path / "stopped", tmp_path / "whole")


def check_best(stopped: Path, whole: Path) -> None:
    """The best model lies beside the last, and record and card name it."""
    best, other = (json.loads((folder / "run.json").read_text())["best"] for folder in (stopped, whole))
    losses = {entry["step"]: entry["eval/loss"] for entry in metrics_of(whole) if "eval/loss" in entry}
    assert best == other
    assert (best["folder"], best["step"]) == ("best", min(losses, key=losses.__getitem__))
    assert best["evaluation"]["eval/loss"] == min(losses.values())
    assert_same_weights(stopped / "best", whole / "best")
    assert f"`best/` holds the model after update {best['step']}, of" in (stopped / "README.md").read_text()
