"""Three updates of the GPT recipe in float64, where a fault of accumulation or averaging cannot hide in rounding.

    accelerate launch ... tests/recipes/float64_updates.py OUTPUT_FOLDER MICRO_BATCH_SIZE ...

writes loss, gradient norm and weights for each micro-batch size into OUTPUT_FOLDER.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shared import launch
from tests.conftest import load_recipe

ROWS = 8


def global_batch(step: int) -> dict[str, torch.Tensor]:
    """ROWS rows of random tokens with 20 to 32 targets each: a mean of means would differ in the second digit."""
    ids = torch.randint(280, (ROWS, 33), generator=torch.Generator().manual_seed(step))
    labels = ids[:, 1:].clone()
    for row in range(ROWS):
        labels[row, : (5 * row) % 13] = -100
    return {"input_ids": ids[:, :-1], "labels": labels, "position_ids": torch.arange(32).expand(ROWS, 32)}


def train(gpt: Any, micro_batch_size: int) -> dict[str, torch.Tensor]:
    """Loss, gradient norm and weights after three updates of this process's share of each global batch."""
    # The other architectures norm in float32, also in a float64 model.
    cfg = gpt.Config(
        architecture="gpt2",
        hidden_size=32,
        num_layers=2,
        seq_length=32,
        optimizer="adamw",
        weight_decay=0.1,
        max_grad_norm=0.1,
    )
    reset_accelerate()
    accelerator = launch.start_accelerator(5, "", "", False)
    launch.set_accumulation(accelerator, ROWS, micro_batch_size)
    tokenizer = gpt.tokenization.train_byte_level_bpe(["the cat sees the dog " * 50], vocab_size=300, seq_length=32)
    model = gpt.build_model(cfg, tokenizer).double()
    model, optimizer = accelerator.prepare(model, gpt.build_optimizer(cfg, model))
    share = ROWS // accelerator.num_processes
    starts = range(accelerator.process_index * share, (accelerator.process_index + 1) * share, micro_batch_size)
    for step in range(3):
        whole = global_batch(step)
        batches = [{key: rows[start : start + micro_batch_size] for key, rows in whole.items()} for start in starts]
        loss, norm = gpt.train_update(cfg, accelerator, model, optimizer, batches, step)
    results = {name: value.clone() for name, value in accelerator.unwrap_model(model).state_dict().items()}
    return {"loss": loss.double(), "norm": torch.tensor(norm, dtype=torch.float64), **results}


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


if __name__ == "__main__":
    recipe = load_recipe("gpt/pretrain.py")
    for size in sys.argv[2:]:
        results = train(recipe, int(size))
        if torch.distributed.get_rank() == 0:
            save_file(results, Path(sys.argv[1]) / f"{size}.safetensors")
    torch.distributed.destroy_process_group()
