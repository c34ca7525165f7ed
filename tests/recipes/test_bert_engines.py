"""The recipe under every engine that two CPU processes can run, against one process; see test_gpt_engines.py.

Losses, gradient norms and weights are held to 1e-5 of one process's, resuming to the bit. Pairs have different numbers
of masked tokens, and micro-batches different lengths.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.launching import assert_no_traceback, launch, preloaded_python
from tests.recipes import engines, float64_updates
from tests.recipes.runs import Runs, assert_same, metric, weights
from tests.recipes.test_bert_pretrain import TINY as SIZES

TINY: dict[str, Any] = {**SIZES, "max_steps": 6, "save_every": 3}
# Two micro-batches a process, and clipping that AdamW cannot hide: see test_gpt_engines.py.
FIELDS = {
    "muon": TINY,
    "unclipped_muon": {**TINY, "max_grad_norm": 0.0, "per_device_batch_size": 2},  # DeepSpeed's
    "adamw": {**TINY, "optimizer": "adamw", "per_device_batch_size": 2, "max_grad_norm": 1e-5, "weight_decay": 0.1},
    "lamb": {**TINY, "optimizer": "lamb", "weight_decay": 0.01, "per_device_batch_size": 2},
}
ENGINES = engines.pairs("bert/pretrain.py")
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def runs(bert: ModuleType, sentences_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(bert, FIELDS, sentences_file, tmp_path_factory.mktemp("engines"))


METRICS = ("train/mlm_loss", "train/nsp_loss", "train/grad_norm", "eval/mlm_loss", "eval/nsp_loss")
ACCURACIES = ("eval/mlm_accuracy", "eval/nsp_accuracy")


def assert_close(run_dir: Path, other: Path) -> None:
    """Equal but for the order in which float32 numbers were added.

    The biases of keys add the same to all scores of a query: their gradient is 0 but for rounding, which Adam makes to
    steps of full size. What they are changes nothing. For DeepSpeed's Muon see test_gpt_engines.py; losses
    were measured to differ by 1.8e-4.
    """
    is_short = "unclipped_muon" in run_dir.name
    assert metric(run_dir, "step") == metric(other, "step")
    for name in METRICS:
        if not (is_short and name == "train/grad_norm"):
            assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=5e-4 if is_short else 1e-5), name
    for name in ACCURACIES:
        assert metric(run_dir, name) == metric(other, name), name
    for name, value in weights(run_dir).items():
        expected = weights(other)[name]
        if is_short and value.ndim == 2:
            assert (value - expected).norm() < 0.05 * expected.norm(), name
        elif not is_short and not name.endswith("key.bias"):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "optimizer"), ENGINES)
def test_engine_equals_one_process(runs: Runs, engine: str, optimizer: str) -> None:
    from transformers import AutoModelForPreTraining

    run_dir = runs.of_engine(engine, optimizer)
    assert_close(run_dir, runs.of_one_process(optimizer))
    exported = AutoModelForPreTraining.from_pretrained(run_dir).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in weights(run_dir).items())


@pytest.mark.slow
def test_float64_updates_are_equal(bert: ModuleType, tmp_path: Path) -> None:
    """One batch of 8, two micro-batches of 4, two processes, and two with two micro-batches: the same to 1e-10."""
    status, output = launch(
        "multi_cpu", Path(float64_updates.__file__), "bert", tmp_path, "4", "2", python=preloaded_python()
    )
    assert status == 0, output
    results = [float64_updates.train("bert", bert, micro_batch_size) for micro_batch_size in (8, 4)]
    results += [load_file(tmp_path / f"{micro_batch_size}.safetensors") for micro_batch_size in (4, 2)]
    assert results[0]["norm"] > 0.2  # twice what it is clipped to
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "optimizer"), engines.STOPPED["bert/pretrain.py"])
def test_stopping_and_going_on_is_exact(runs: Runs, tmp_path: Path, engine: str, optimizer: str) -> None:
    whole, run_dir = runs.of_engine(engine, optimizer), tmp_path / "run"
    fields = {**FIELDS[optimizer], "save_every": 0}
    status, output = runs.run(engine, run_dir, fields, SIGTERM_AT="2:1")
    assert status == 1, output  # of the launcher
    assert "stopped: saved at step 4 of 6" in output
    assert_no_traceback(output)
    status, output = runs.run(engine, run_dir, fields)
    assert status == 0, output
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_bad_update_on_one_process_is_skipped_on_all(runs: Runs, tmp_path: Path) -> None:
    status, output = runs.run("multi_cpu", tmp_path / "run", FIELDS["adamw"], POISON="2:1")
    assert status == 0, output
    assert metric(tmp_path / "run", "train/skipped_updates") == [0, 0, 1, 1, 1, 1]
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "message"),
    [("muon", "error: max_grad_norm: 1.0: expected 0"), ("lamb", "error: optimizer: 'lamb': expected adamw or muon")],
)
def test_what_deepspeed_cannot_do_is_refused(runs: Runs, tmp_path: Path, optimizer: str, message: str) -> None:
    status, output = runs.run("deepspeed_zero2", tmp_path / "run", FIELDS[optimizer])
    assert status == 1
    assert output.count(message) == 1
    assert_no_traceback(output)
    assert not (tmp_path / "run").exists()
