"""Every config's micro-batch fits a GPU of 80 GB, on as many as its header names, by the dry run's own arithmetic."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from shared import command_line as cli
from shared.optim.optimizers import state_bytes_per_parameter
from shared.performance import dry_run
from tests.conftest import ROOT, load_recipe

MEMORY = 80e9  # of an A100 or H100, in bytes
LEFT_FREE = 0.1  # for what the arithmetic leaves out: buffers of communication, intermediates, the allocator's waste
PROCESSES = {"single_gpu": 1, "multi_gpu": 8, "fsdp2": 8, "multi_node": 16}  # of accelerate_configs/
DEFAULTS = {"bert": "pretrain.py", "gpt": "pretrain.py", "resnet": "pretrain.py"}
CONFIGS = sorted((ROOT / "recipes").rglob("configs/*.yaml"))


def tokens(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def tokenizer_of(vocab_size: int, max_length: int) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "w0")
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_length, **special)


def bert(recipe: ModuleType, cfg: Any, size: int) -> tuple[Any, dict[str, Any]]:
    masked = round((cfg.seq_length - 3) * cfg.mask_fraction)
    batch = {name: tokens(size, cfg.seq_length) for name in ("input_ids", "token_type_ids", "attention_mask")}
    batch |= {name: tokens(size, masked) for name in ("masked_positions", "labels")}
    model = recipe.build_model(replace(cfg, init="scratch"), tokenizer_of(30522, 512))
    return model, {**batch, "next_sentence_label": tokens(size)}


def gpt(recipe: ModuleType, cfg: Any, size: int) -> tuple[Any, dict[str, Any]]:
    batch = {name: tokens(size, cfg.seq_length) for name in ("input_ids", "labels")}
    vocab_size = 50257 if cfg.tokenizer == "openai-community/gpt2" else cfg.vocab_size
    model = recipe.build_model(replace(cfg, attention="sdpa"), tokenizer_of(vocab_size, cfg.seq_length))
    return model, {**batch, "use_cache": False}


def resnet(recipe: ModuleType, cfg: Any, size: int) -> tuple[Any, dict[str, Any]]:
    side = getattr(cfg, "final_image_size", cfg.image_size)
    model = recipe.build_model(cfg, [str(number) for number in range(1000)])
    return model, {"pixel_values": torch.zeros(size, 3, side, side)}


def text_to_image(recipe: ModuleType, cfg: Any, size: int) -> tuple[Any, dict[str, Any]]:
    """Frozen text encoders are CLIP ViT-L/14; latents have an eighth of the images' sides and four channels."""
    is_frozen = cfg.text_encoder != "scratch"
    frozen = SimpleNamespace(config=SimpleNamespace(hidden_size=768)) if is_frozen else None
    side = int(cfg.output_dir.split("_")[-1]) // 8 if is_frozen else 16
    length = 77 if is_frozen else cfg.caption_length
    text = torch.zeros(size, length, 768) if is_frozen else tokens(size, length)
    batch = {"latents": torch.zeros(size, 4, side, side), "timesteps": tokens(size), "text": text}
    shape: Any = (4, side, side)
    if recipe.__name__.endswith("transformer"):
        kept, shape = round((1 - cfg.routed_fraction) * (side // cfg.patch_size) ** 2), 4
        batch |= {"timesteps": torch.zeros(size), "text_mask": torch.ones(size, length, dtype=torch.bool)}
        batch |= {"kept": tokens(size, kept)}
    return recipe.build_model(replace(cfg, init="scratch"), tokenizer_of(49408, length), frozen, shape), batch


FAMILIES: dict[str, Callable[[ModuleType, Any, int], tuple[Any, dict[str, Any]]]] = {
    "bert": bert,
    "gpt": gpt,
    "resnet": resnet,
    "text_to_image": text_to_image,
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_a_micro_batch_fits_into_a_gpu(config: Path) -> None:
    header = "".join(line for line in config.read_text().splitlines(keepends=True) if line.startswith("#"))
    family = config.parent.parent.name
    program = re.search(r"# Program: (\S+)", header)
    recipe = load_recipe(f"{family}/{program[1] if program else DEFAULTS[family]}")
    cfg = cli.parse(recipe.Config, ["--config", str(config)])
    # Where two machines are named, the smaller one has the larger micro-batch.
    launcher = min(re.findall("|".join(PROCESSES), header), key=PROCESSES.get, default="multi_gpu")
    processes = PROCESSES[launcher]
    size = cfg.per_device_batch_size or cfg.global_batch_size // processes
    assert cfg.global_batch_size % (size * processes) == 0
    engine = SimpleNamespace(value="FSDP" if launcher == "fsdp2" else "MULTI_GPU")
    accelerator = SimpleNamespace(num_processes=processes, distributed_type=engine, mixed_precision="bf16")
    of_average = 4 if getattr(cfg, "ema_decay", 0) else 0
    with dry_run.without_memory():
        model, batch = FAMILIES[family](recipe, cfg, size)
        state = state_bytes_per_parameter(recipe.build_optimizer(cfg, model)) + of_average
        costs = dry_run.costs(accelerator, model, batch, state)
    shown = {name: dry_run.human_bytes(value) for name, value in costs.items()}
    assert costs["memory: total"] < (1 - LEFT_FREE) * MEMORY, shown
