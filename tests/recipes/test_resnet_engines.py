"""The recipe under every engine that two CPU processes can run, against one process; see test_gpt_engines.py.

Batch normalisation sees its micro-batch, so all runs have micro-batches of 4: one process takes two for an update, each
of two processes one. Losses, gradient norms, weights and running statistics are held to 1e-5 of one process's, resuming
to the bit.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.launching import assert_no_traceback
from tests.recipes import engines
from tests.recipes.runs import Runs, assert_same, metric, weights
from tests.recipes.test_resnet_pretrain import TINY as SIZES
from tests.recipes.test_resnet_pretrain_rsb import TINY as LONG_SIZES

TINY: dict[str, Any] = {**SIZES, "max_steps": 6, "save_every": 3, "per_device_batch_size": 4, "max_grad_norm": 0.5}
# A small rate, for Adam's part of LAMB makes a step of full size from a gradient that is zero but for rounding.
LONG = {**LONG_SIZES, "max_steps": 6, "save_every": 3, "per_device_batch_size": 4, "learning_rate": 0.005}
FIELDS = {"ema": TINY}
ENGINES = engines.pairs("resnet/pretrain.py")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def runs(resnet: ModuleType, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(resnet, FIELDS, shapes, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def long_runs(resnet_rsb: ModuleType, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(resnet_rsb, {"lamb": LONG}, shapes, tmp_path_factory.mktemp("long_engines"))


def assert_close(run_dir: Path, other: Path) -> None:
    """Equal but for the order in which float32 numbers were added."""
    assert metric(run_dir, "step") == metric(other, "step")
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-5), name
    for name in ("eval/top1", "eval/top5"):
        assert metric(run_dir, name) == metric(other, name), name
    for name, value in weights(run_dir).items():
        if not name.endswith("num_batches_tracked"):  # of the last update, on this process
            torch.testing.assert_close(value, weights(other)[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("engine", "kind"), [pytest.param(*engine, marks=pytest.mark.slow) for engine in ENGINES])
def test_engine_equals_one_process(runs: Runs, engine: str, kind: str) -> None:
    from transformers import AutoModelForImageClassification

    run_dir = runs.of_engine(engine, kind)
    assert_close(run_dir, runs.of_one_process(kind))
    exported = AutoModelForImageClassification.from_pretrained(run_dir).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in weights(run_dir).items())


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), engines.STOPPED["resnet/pretrain.py"])
def test_stopping_and_going_on_is_exact(runs: Runs, tmp_path: Path, engine: str, kind: str) -> None:
    whole, run_dir = runs.of_engine(engine, kind), tmp_path / "run"
    fields = {**FIELDS[kind], "save_every": 0}
    status, output = runs.run(engine, run_dir, fields, SIGTERM_AT="2:1")
    assert status == 1, output  # of the launcher
    assert "stopped: saved at step 4 of 6" in output
    assert_no_traceback(output)
    status, output = runs.run(engine, run_dir, fields)
    assert status == 0, output
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_bad_update_on_one_process_is_skipped_on_all(runs: Runs, tmp_path: Path) -> None:
    status, output = runs.run("multi_cpu", tmp_path / "run", FIELDS["ema"], POISON="2:1")
    assert status == 0, output
    assert metric(tmp_path / "run", "train/skipped_updates") == [0, 0, 1, 1, 1, 1]
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), engines.pairs("resnet/pretrain_rsb.py"))
def test_two_processes_equal_one_in_the_long_recipe(long_runs: Runs, engine: str, kind: str) -> None:
    """Mixing, RandAugment, repeated crops and skipped blocks are those of one process."""
    assert_close(long_runs.of_engine(engine, kind), long_runs.of_one_process(kind))


@pytest.mark.slow
def test_lamb_is_refused_where_matrices_are_flattened(long_runs: Runs, tmp_path: Path) -> None:
    status, output = long_runs.run("deepspeed_zero2", tmp_path / "run", LONG)
    assert status == 1
    assert output.count("expected DDP or FSDP2, for LAMB needs the norms of matrices") == 1
    assert_no_traceback(output)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
