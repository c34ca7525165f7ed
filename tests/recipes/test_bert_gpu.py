"""On one NVIDIA GPU, as `pytest -m gpu`: bfloat16, compiled, and exact resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import launching
from tests.conftest import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
RECIPE = ROOT / "recipes" / "bert" / "pretrain.py"
FLAGS = (
    *("--hidden_size=128", "--num_layers=2", "--num_heads=2", "--vocab_size=100", "--eval_fraction=0.2"),
    *("--global_batch_size=16", "--max_steps=60", "--warmup_steps=5", "--log_every=1"),
)


def train(data: Path, run_dir: Path, *flags: str) -> list[dict[str, float]]:
    """Run the recipe with accelerate_configs/single_gpu.yaml; the metrics it leaves."""
    arguments = (RECIPE, f"--data={data}", f"--output_dir={run_dir}", *FLAGS, *flags)
    status, output = launching.launch("single_gpu", *arguments, launcher=())
    assert status == 0, output
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", ["", "--compile", "--architecture=bert --compile", "--optimizer=lamb"])
def test_bfloat16_learns_and_is_exported_in_float32(sentences_file: Path, tmp_path: Path, flags: str) -> None:
    metrics = train(sentences_file, tmp_path / "run", *flags.split())
    assert metrics[-1]["train/mlm_loss"] < metrics[0]["train/mlm_loss"] - 1
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert not [name for name in saved if "_orig_mod" in name]


def test_resuming_is_exact_with_deterministic_kernels(sentences_file: Path, tmp_path: Path) -> None:
    options = ("--deterministic", "--save_every=20", "--keep_checkpoints=9", "--dropout=0.1")
    whole = train(sentences_file, tmp_path / "whole", *options)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000020"
    resumed = train(sentences_file, tmp_path / "resumed", *options, f"--resume={checkpoint}")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = {entry["step"]: entry["train/loss"] for entry in whole}
    assert [entry["train/loss"] for entry in resumed] == [losses[entry["step"]] for entry in resumed]
