"""Training that is stopped twice is that of one start, to the bit, in every page: k + k + k = 3k."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from shared.command_line import RunStopped
from tests.recipes.pages import PAGES
from tests.recipes.runs import assert_same, metric, run

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

    def start(run_dir: Path) -> None:
        run(page, tests.config_of(page, *fixtures, run_dir, **fields))

    start(tmp_path / "whole")
    train_update, updates = page.train_update, iter(range(6))

    def stopped_update(*values: Any, **options: Any) -> Any:
        if next(updates) in (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_update(*values, **options)

    monkeypatch.setattr(page, "train_update", stopped_update)
    for step in (2, 4):
        with pytest.raises(RunStopped, match=f"saved at step {step} of 6"):
            start(tmp_path / "stopped")
    start(tmp_path / "stopped")
    assert metric(tmp_path / "stopped", "step") == [1, 2, 3, 4, 5, 6]
    assert_same(tmp_path / "stopped", tmp_path / "whole")
