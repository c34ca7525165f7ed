"""On one NVIDIA GPU, as `pytest -m gpu`: bfloat16, compiled, and exact resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import launching
from tests.conftest import ROOT
from tests.recipes.runs import assert_same_weights, metric, results_of, weights
from tests.recipes.test_text_to_image_pretrain import TINY as DIFFUSION_SIZES
from tests.recipes.test_text_to_image_pretrain_transformer import TINY as TRANSFORMER_SIZES
from tests.recipes.test_text_to_image_train_vae import TINY as SIZES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
PROGRAMS = ["train_vae", "pretrain", "pretrain_transformer"]
LONGER = {"max_steps": 60, "warmup_steps": 5, "ema_decay": 0.9}


@pytest.fixture
def fields(shapes: Path, latents: Path, tiny_vae: Path) -> dict[str, dict[str, Any]]:
    """Configurations by program."""
    return {
        "train_vae": {**SIZES, **LONGER, "data": shapes},
        "pretrain": {**DIFFUSION_SIZES, **LONGER, "data": latents, "vae": tiny_vae},
        "pretrain_transformer": {**TRANSFORMER_SIZES, **LONGER, "data": latents, "vae": tiny_vae},
    }


def train(program: str, fields: dict[str, Any], run_dir: Path, *flags: str) -> None:
    """Run a recipe with accelerate_configs/single_gpu.yaml."""
    recipe = ROOT / "recipes" / "text_to_image" / f"{program}.py"
    values = [f"--{name}={value}" for name, value in {**fields, "output_dir": run_dir}.items()]
    status, output = launching.launch("single_gpu", recipe, *values, *flags, launcher=())
    assert status == 0, output


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("flags", ["", "--compile", "--gradient_checkpointing"])
def test_bfloat16_learns_and_is_exported_in_float32(
    fields: dict[str, dict[str, Any]], tmp_path: Path, program: str, flags: str
) -> None:
    train(program, fields[program], tmp_path / "run", *flags.split())
    losses = metric(tmp_path / "run", "train/loss")
    assert sum(losses[-10:]) / 10 < 0.8 * losses[0]
    saved = weights(tmp_path / "run")
    assert {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()} == {torch.float32}
    assert not [name for name in saved if "_orig_mod" in name]


@pytest.mark.parametrize("program", PROGRAMS)
def test_resuming_is_exact_with_deterministic_kernels(
    fields: dict[str, dict[str, Any]], tmp_path: Path, program: str
) -> None:
    options = ("--deterministic", "--save_every=20", "--keep_checkpoints=9")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(program, fields[program], whole, *options)
    checkpoint = whole / "checkpoints" / "step_00000020"
    train(program, fields[program], resumed, *options, f"--resume={checkpoint}")
    assert results_of(resumed) == results_of(whole)[20:]
    assert_same_weights(resumed, whole)
