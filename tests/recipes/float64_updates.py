"""Three updates of a recipe in float64, where a fault of accumulation or averaging cannot hide in rounding.

    accelerate launch ... tests/recipes/float64_updates.py FAMILY OUTPUT_FOLDER MICRO_BATCH_SIZE ...

writes loss, gradient norm and weights for each micro-batch size into OUTPUT_FOLDER.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shared.runtime import launch
from tests.conftest import load_recipe
from tests.recipes.runs import reset_accelerate

ROWS = 8


def gpt_batch(step: int) -> dict[str, torch.Tensor]:
    """ROWS rows of random tokens with 20 to 32 targets each: a mean of means would differ in the second digit."""
    ids = torch.randint(280, (ROWS, 33), generator=torch.Generator().manual_seed(step))
    labels = ids[:, 1:].clone()
    for row in range(ROWS):
        labels[row, : (5 * row) % 13] = -100
    return {"input_ids": ids[:, :-1], "labels": labels, "position_ids": torch.arange(32).expand(ROWS, 32)}


def bert_batch(step: int) -> dict[str, torch.Tensor]:
    """ROWS pairs of 16 to 32 random tokens with 1 to 8 masked ones."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(5, 40, (ROWS, 32), generator=generator)
    sizes, num_masked = 16 + 2 * torch.arange(ROWS), 1 + torch.arange(ROWS)
    positions = torch.rand(ROWS, 15, generator=generator).argsort(dim=1)[:, :8] + 1
    labels = ids.gather(1, positions).masked_fill(torch.arange(8) >= num_masked[:, None], -100)
    return {
        "input_ids": ids.scatter(1, positions, 4),
        "token_type_ids": (torch.arange(32) >= 8).long().expand(ROWS, 32),
        "attention_mask": (torch.arange(32) < sizes[:, None]).long(),
        "masked_positions": positions,
        "labels": labels,
        "next_sentence_label": torch.arange(ROWS) % 2,
    }


def gpt_setting(gpt: Any) -> tuple[Any, Any]:
    """Configuration and tokenizer; the other architectures norm in float32, also in a float64 model."""
    tokenizer = gpt.tokenization.train_byte_level_bpe(["the cat sees the dog " * 50], vocab_size=300, seq_length=32)
    return gpt.Config(architecture="gpt2", **SIZES), tokenizer


def bert_setting(bert: Any) -> tuple[Any, Any]:
    """Configuration and tokenizer."""
    tokenizer = bert.wordpiece.train_wordpiece(["the cat sees the dog " * 50], 100, seq_length=32, lowercase=True)
    return bert.Config(global_batch_size=ROWS, **SIZES), tokenizer


SIZES = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "seq_length": 32,
    "optimizer": "adamw",
    "weight_decay": 0.1,
    "max_grad_norm": 0.1,
}
FAMILIES = {"gpt": (gpt_setting, gpt_batch), "bert": (bert_setting, bert_batch)}


def train(family: str, recipe: Any, micro_batch_size: int) -> dict[str, torch.Tensor]:
    """Loss, gradient norm and weights after three updates of this process's share of each global batch."""
    setting, global_batch = FAMILIES[family]
    cfg, tokenizer = setting(recipe)
    reset_accelerate()
    accelerator = launch.start_accelerator(5, "", "", False)
    launch.set_accumulation(accelerator, ROWS, micro_batch_size)
    model = recipe.build_model(cfg, tokenizer).double()
    model, optimizer = accelerator.prepare(model, recipe.build_optimizer(cfg, model))
    share = ROWS // accelerator.num_processes
    starts = range(accelerator.process_index * share, (accelerator.process_index + 1) * share, micro_batch_size)
    for step in range(3):
        whole = global_batch(step)
        batches = [{key: rows[start : start + micro_batch_size] for key, rows in whole.items()} for start in starts]
        loss, norm = recipe.train_update(cfg, accelerator, model, optimizer, batches, step)
    results = {name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}
    return {"loss": loss.double(), "norm": norm.double(), **results}


if __name__ == "__main__":
    family, folder = sys.argv[1:3]
    recipe = load_recipe(f"{family}/pretrain.py")
    for size in sys.argv[3:]:
        results = train(family, recipe, int(size))
        if torch.distributed.get_rank() == 0:
            save_file(results, Path(folder) / f"{size}.safetensors")
    torch.distributed.destroy_process_group()
