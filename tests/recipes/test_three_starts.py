"""Training that is stopped or killed is that of one start, to the bit, in every page, and a bad gradient is skipped."""

import itertools
import math
import os
import random
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.command_line import RunStopped, TooManyNonFiniteUpdates
from shared.fields import to_yaml
from shared.run.checkpoints import list_checkpoints
from tests.launching import preloaded_python
from tests.recipes import killed_runs
from tests.recipes.pages import PAGES
from tests.recipes.runs import assert_same, metric, metrics_of, run

RUNS = [*((name, False) for name in PAGES), ("gpt", True), ("resnet", True)]
# Each in another save: of the start that is killed there the first or the second.
KILLS = ("before_save:1", "after_state:2", "before_manifest:3", "mid_prune:4", "before_rename:5", "after_rename:6")
Configuration = Callable[..., Any]
pytestmark = pytest.mark.slow


def page_of(request: pytest.FixtureRequest, name: str) -> tuple[Any, Configuration]:
    """A page, and its configuration of six updates in a run folder."""
    tests, data = PAGES[name]
    page, fixtures = request.getfixturevalue(name), [request.getfixturevalue(fixture) for fixture in data]
    usual = {"max_steps": 6, "warmup_steps": 1, "log_every": 1, "eval_every": 3, "save_every": 0, "num_workers": 0}
    return page, lambda run_dir, **fields: tests.config_of(page, *fixtures, run_dir, **{**usual, **fields})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, Configuration, bool], Path]:
    """The run that nothing happened to, by page, made once."""
    made: dict[tuple[str, bool], Path] = {}

    def run_of(page: Any, configuration: Configuration, streams: bool = False) -> Path:
        key = (page.__name__, streams)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "run"
            run(page, configuration(made[key], **({"streaming": True} if streams else {})))
        return made[key]

    return run_of


@pytest.mark.parametrize(("name", "streams"), RUNS)
def test_two_stops_change_nothing(
    name: str, streams: bool, request: pytest.FixtureRequest, whole: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """k + k + k = 3k, with any number of data workers; once the run is done, the same command trains nothing."""
    page, configuration = page_of(request, name)
    reference = whole(page, configuration, streams)
    train_update, updates, run_dir = page.train_update, iter(range(6)), tmp_path / "stopped"

    def stopped_update(*values: Any, **options: Any) -> Any:
        if next(updates) in (1, 3):
            os.kill(os.getpid(), signal.SIGTERM)
        return train_update(*values, **options)

    def start(number: int) -> None:
        run(page, configuration(run_dir, **({"streaming": True} if streams else {"num_workers": number})))

    monkeypatch.setattr(page, "train_update", stopped_update)
    for step, workers in ((2, 2), (4, 0)):
        with pytest.raises(RunStopped, match=f"saved at step {step} of 6"):
            start(workers)
    for workers in (1, 0):  # the second finds the run done; an update more would be the seventh, of which there is none
        start(workers)
        assert metric(run_dir, "step") == [1, 2, 3, 4, 5, 6]
        assert_same(run_dir, reference)


@pytest.mark.parametrize("name", PAGES)
def test_kills_change_nothing(name: str, request: pytest.FixtureRequest, whole: Any, tmp_path: Path) -> None:
    """SIGKILL at each of six points of a save, one after the other, and in another run at ten random times."""
    page, configuration = page_of(request, name)
    draw = random.Random(name)
    kills = {"points": KILLS, "times": [f"{draw.uniform(0.05, 0.8):.2f}" for _ in range(10)]}
    processes = {}
    for kind, of_kind in kills.items():
        file = tmp_path / f"{kind}.yaml"
        file.write_text(to_yaml(configuration(tmp_path / kind, save_every=1)))
        command = [*preloaded_python(), str(Path(killed_runs.__file__)), str(page.__file__), str(file), *of_kind]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes[kind] = subprocess.Popen(command, cwd="/", **pipes)
    reference = whole(page, configuration)
    for kind, process in processes.items():
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        ends = re.findall(r"^(\S+) (-?\d+)$", output, re.MULTILINE)
        assert [kill for kill, _ in ends] == [*kills[kind], "end"]
        assert_same(tmp_path / kind, reference)
        assert len(list_checkpoints(tmp_path / kind)) in (2, 3)  # three after a kill before the last was pruned
        assert not list((tmp_path / kind / "checkpoints").glob(".tmp*"))


@pytest.mark.parametrize("name", PAGES)
def test_updates_without_a_finite_gradient_are_skipped_and_end_a_run(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second update is bad, then all from the fourth on: one is skipped, and three in a row end the run, saved."""
    page, configuration = page_of(request, name)
    clip_and_step, updates = page.clip_and_step, itertools.count()

    def of_bad_gradients(accelerator: Any, model: Any, *values: Any) -> Any:
        number = next(updates)
        if number not in (0, 2):
            gradient = next(parameter.grad for parameter in model.parameters() if parameter.grad is not None)
            gradient[(0,) * gradient.ndim] = math.inf if number % 2 else math.nan
        return clip_and_step(accelerator, model, *values)

    monkeypatch.setattr(page, "clip_and_step", of_bad_gradients)
    fields = {"max_steps": 12, "save_every": 1, "keep_checkpoints": 12, "eval_every": 0, "max_bad_updates": 2}
    with pytest.raises(TooManyNonFiniteUpdates, match="3 updates in a row"):  # two, and what came meanwhile
        run(page, configuration(tmp_path / "run", **fields))
    assert [entry["train/skipped_updates"] for entry in metrics_of(tmp_path / "run")] == [0, 1, 1, 2, 3, 4]
    saved = {
        int(found.name[5:]): load_file(found / "model.safetensors") for found in list_checkpoints(tmp_path / "run")
    }

    def is_same(step: int, other: int) -> bool:
        names = [name for name in saved[step] if not name.endswith("num_batches_tracked")]  # which nothing reads
        return all(torch.equal(saved[step][name], saved[other][name]) for name in names)

    assert [is_same(step, step + 1) for step in range(1, 6)] == [True, False, True, True, True]
