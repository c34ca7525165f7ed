"""A signal ends the evaluation of any page, and what is written in the end is what one run writes; the best is kept."""

import contextlib
import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from shared.command_line import RunStopped
from shared.run.training_run import Run
from tests.recipes.pages import PAGES
from tests.recipes.runs import assert_same, assert_same_weights, metrics_of, run

ROWS = 5  # that pre-training evaluates


@pytest.fixture(params=[pytest.param(name, marks=() if name == "resnet" else pytest.mark.slow) for name in PAGES])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModuleType, Any, Any]:
    """Module of a page, and configurations of two runs that log and evaluate after two updates and after three."""
    tests, data = PAGES[request.param]
    module, given = request.getfixturevalue(request.param), [request.getfixturevalue(name) for name in data]
    fields: dict[str, Any] = {"max_steps": 3, "warmup_steps": 1, "log_every": 2, "eval_every": 2, "save_every": 0}
    fields |= {"best_metric": "loss", "per_device_batch_size": 2}
    if "eval_rows" in module.Config.__dataclass_fields__:
        fields["eval_rows"] = ROWS
    return module, *(tests.config_of(module, *given, tmp_path / name, **fields) for name in ("whole", "run"))


def test_a_signal_ends_an_evaluation_which_is_done_when_the_run_goes_on(
    page: tuple[ModuleType, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the first batch of the first evaluation, and then in that of the last one."""
    module, whole, cfg = page
    folder, real, state = Path(cfg.output_dir), module.until_stopped, {"evaluations": 0, "signal_in": 0, "batches": 0}
    run(module, whole)

    @contextlib.contextmanager
    def counted(self: Run, metrics: dict[str, float]) -> Iterator[None]:
        state["evaluations"] += 1
        with evaluation(self, metrics):
            yield

    def with_signal(accelerator: Any, batches: Iterable[Any]) -> Iterator[Any]:
        for batch in real(accelerator, batches):
            if state["evaluations"] == state["signal_in"]:
                assert state["batches"] == 0, "a batch came after the signal"
                state["batches"] += 1
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    evaluation = Run.evaluation
    monkeypatch.setattr(Run, "evaluation", counted)
    monkeypatch.setattr(module, "until_stopped", with_signal)
    for signal_in, step, written in ((1, 2, []), (2, 3, [2])):  # of this start's evaluations, the owed one first
        state.update(evaluations=0, signal_in=signal_in, batches=0)
        with pytest.raises(RunStopped, match=f"saved at step {step} of 3, which is evaluated"):
            run(module, cfg)
        entries = metrics_of(folder) if (folder / "metrics.jsonl").exists() else []
        assert [entry["step"] for entry in entries] == written
    state["signal_in"] = 0
    run(module, cfg)
    assert_same(folder, Path(whole.output_dir))
    one, other = (json.loads((Path(some.output_dir) / "run.json").read_text()) for some in (cfg, whole))
    assert one["evaluation"] == other["evaluation"]
    if "eval_rows" in module.Config.__dataclass_fields__:
        losses = {entry["step"]: entry["eval/loss"] for entry in metrics_of(folder)}
        assert one["best"] == other["best"]
        assert (one["best"]["folder"], one["best"]["step"]) == ("best", min(losses, key=losses.__getitem__))
        assert one["best"]["evaluation"]["eval/loss"] == min(losses.values())
        assert_same_weights(folder / "best", Path(whole.output_dir) / "best")
        assert "`best/` holds the model after update" in (folder / "README.md").read_text()
