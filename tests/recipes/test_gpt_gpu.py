"""On one NVIDIA GPU, as `pytest -m gpu`: bfloat16, compiled, exact resume, and documents that do not see each other."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shared.optim.muon import orthogonalize
from shared.text import tokenization
from shared.text.packing import fill_row
from tests import launching
from tests.conftest import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
RECIPE = ROOT / "recipes" / "gpt" / "pretrain.py"
FLAGS = (
    *("--hidden_size=128", "--num_layers=2", "--num_heads=2", "--seq_length=128", "--vocab_size=512"),
    *("--global_batch_size=16", "--max_steps=60", "--warmup_steps=5", "--log_every=1"),
)


def train(corpus: Path, run_dir: Path, *flags: str, config: str = "single_gpu") -> list[dict[str, float]]:
    """Run the recipe with a file of accelerate_configs/; the metrics it leaves."""
    arguments = (RECIPE, f"--data={corpus}", f"--output_dir={run_dir}", *FLAGS, *flags)
    status, output = launching.launch(config, *arguments, launcher=())
    assert status == 0, output
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "flags", [(), ("--compile",), ("--attention=flex_attention", "--compile"), ("--optimizer=adamw",)]
)
def test_bfloat16_learns_and_is_exported_in_float32(corpus: Path, tmp_path: Path, flags: str) -> None:
    metrics = train(corpus, tmp_path / "run", *flags.split())
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"] - 2
    assert metrics[-1]["perf/mfu"] > 0
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert not [name for name in saved if "_orig_mod" in name]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["precision"] == "bf16"
    assert "NVIDIA" in record["hardware"]


def test_float16_learns_with_a_scaled_loss(corpus: Path, tmp_path: Path) -> None:
    metrics = train(corpus, tmp_path / "run", config="single_gpu_fp16")
    assert metrics[-1]["train/loss"] < metrics[0]["train/loss"] - 2
    assert metrics[-1]["train/skipped_updates"] < 20
    assert json.loads((tmp_path / "run" / "run.json").read_text())["precision"] == "fp16"


def test_resuming_is_exact_with_deterministic_kernels(corpus: Path, tmp_path: Path) -> None:
    options = ("--deterministic", "--save_every=20", "--keep_checkpoints=9", "--dropout=0.1")
    whole = train(corpus, tmp_path / "whole", *options)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000020"
    resumed = train(corpus, tmp_path / "resumed", *options, f"--resume={checkpoint}")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    losses = {entry["step"]: entry["train/loss"] for entry in whole}
    assert [entry["train/loss"] for entry in resumed] == [losses[entry["step"]] for entry in resumed]


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("architecture", ["nanochat", "gpt2", "llama"])
def test_documents_in_a_row_do_not_see_each_other(gpt: ModuleType, architecture: str, attention: str) -> None:
    tokenizer = tokenization.train_byte_level_bpe(["the cat sees the dog " * 50], vocab_size=300, seq_length=256)
    sizes = {"hidden_size": 128, "num_layers": 2, "num_heads": 2, "seq_length": 256}
    model = (
        gpt.build_model(gpt.Config(**sizes, architecture=architecture, attention=attention), tokenizer).cuda().eval()
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # at the default some heads are zero and see nothing
    draw = torch.Generator().manual_seed(0)
    documents = [torch.randint(280, (length,), generator=draw).numpy() for length in (90, 101, 60)]

    def logits(stretches: list[Any]) -> torch.Tensor:
        row = {name: torch.from_numpy(values)[None].cuda() for name, values in fill_row(stretches, 256, 0).items()}
        with torch.no_grad():
            return gpt.forward(model, row)[0]

    packed, at = logits(documents), 0
    for document in documents:
        length = len(document) - 1
        torch.testing.assert_close(packed[at : at + length], logits([document])[:length], rtol=0, atol=1e-3)
        at += length


def test_muon_orthogonalises_in_bfloat16() -> None:
    matrices = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0)).cuda()
    moved = orthogonalize(matrices)
    assert moved.dtype == torch.bfloat16
    values = torch.linalg.svdvals(moved.float())
    assert values.min() > 0.5
    assert values.max() < 1.4
