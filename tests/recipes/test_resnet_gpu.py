"""On one NVIDIA GPU, as `pytest -m gpu`: bfloat16, compiled, and exact resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launching
from tests.conftest import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
SIZES = ("--hidden_sizes=16,32", "--depths=1,1", "--embedding_size=16", "--max_steps=60", "--warmup_steps=5")
COMMON = (*SIZES, "--global_batch_size=16", "--log_every=1", "--eval_image_size=16")
FLAGS = {
    "pretrain": (*COMMON, "--image_size=12", "--final_image_size=16", "--learning_rate=0.2", "--ema_decay=0.9"),
    "pretrain_rsb": (*COMMON, "--image_size=16", "--learning_rate=0.02", "--stochastic_depth=0.1"),
}


def train(program: str, data: Path, run_dir: Path, *flags: str) -> list[dict[str, float]]:
    """Run a recipe with accelerate_configs/single_gpu.yaml; the metrics it leaves."""
    recipe = ROOT / "recipes" / "resnet" / f"{program}.py"
    arguments = (recipe, f"--data={data}", f"--output_dir={run_dir}", *FLAGS[program], *flags)
    status, output = launching.launch("single_gpu", *arguments, launcher=())
    assert status == 0, output
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("program", FLAGS)
@pytest.mark.parametrize("flags", ["", "--compile", "--streaming"])
def test_bfloat16_learns_and_is_exported_in_float32(shapes: Path, tmp_path: Path, program: str, flags: str) -> None:
    metrics = train(program, shapes, tmp_path / "run", *flags.split())
    losses = [entry["train/loss"] for entry in metrics]
    assert sum(losses[-10:]) / 10 < losses[0] - 0.05
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.float32}
    assert not [name for name in saved if "_orig_mod" in name]


@pytest.mark.parametrize("program", FLAGS)
def test_resuming_is_exact_with_deterministic_kernels(shapes: Path, tmp_path: Path, program: str) -> None:
    options = ("--deterministic", "--save_every=20", "--keep_checkpoints=9")
    whole = train(program, shapes, tmp_path / "whole", *options)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000020"
    resumed = train(program, shapes, tmp_path / "resumed", *options, f"--resume={checkpoint}")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = {entry["step"]: entry["train/loss"] for entry in whole}
    assert [entry["train/loss"] for entry in resumed] == [losses[entry["step"]] for entry in resumed]
