"""Measure recipes/gpt/finetune.py against trl's `SFTTrainer`.

    pip install trl                                          # for this benchmark alone
    python tests/benchmarks/gpt_finetune.py                  # a quarter of an hour on two quiet cores
    python tests/benchmarks/gpt_finetune.py --seconds 5      # whether it runs; such numbers mean nothing

Rules:
* Both start from the same run folder, outputs/gpt, with its library class, on the embedded answers as `messages`, with
  the same chat template, loss on what the assistant says, peak rate, linear fall, fused AdamW, clipping and all cores.
* An update of the recipe has 16 packed rows; one of trl has as many examples as lie in 16 rows, each padded to the
  longest of its batch. With `packing` trl lets examples of a row see each other on SDPA, which its own warning
  says: that is another computation, and has a row of its own.
* Speed is targets a second, from the end of the fifth update on; both sides in turns, the median of three. Loss is
  nats a target on the held-out answers after the speed run's updates, by one function for both.
"""

import os
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from harness import (
    ROOT,
    WARM_UPDATES,
    Row,
    answer_child,
    in_child,
    load_recipe,
    measure_parts,
    peak_bytes,
    read_options,
    speed,
    update_times,
)

RECIPE = ROOT / "recipes" / "gpt" / "finetune.py"
FLAGS = ["--eval_answers=0", "--eval_every=0", "--save_every=0", "--optimizer=adamw", "--learning_rate=0.002"]
WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed, mixing examples": {"packing": True},
}


# ----------------------------------------------------------------------------------------------------------------------
# In child processes; imports are late, so that each side has its own.


def packed(recipe: Any, cfg: Any, samples: Any, tokenizer: Any) -> Any:
    """Rows as the recipe makes them."""
    options = {"seq_length": cfg.seq_length, "cache_dir": recipe.cache_folder(cfg.cache_dir)}
    return recipe.pack_examples(samples, tokenizer, **options, num_processes=recipe.usable_cores())


def prepare(folder: str) -> dict[str, Any]:
    """What the other parts need."""
    del folder
    recipe, cfg = load_recipe(RECIPE, FLAGS)
    from shared.run.folder import hardware

    train, _ = recipe.open_data(cfg)
    tokenizer = recipe.open_tokenizer(cfg, train)
    rows = packed(recipe, cfg, train, tokenizer)
    model = recipe.build_model(cfg, tokenizer, talks=True)
    return {
        "targets_per_row": rows.num_targets / len(rows),
        "examples_per_row": (len(train) - rows.num_left_out) / len(rows),
        "rows": cfg.global_batch_size,
        "parameters": model.num_parameters(),
        "hardware": hardware(),
    }


def run_recipe(flags: list[str], updates: int) -> dict[str, Any]:
    """Run the recipe's own `main()` to its end: speed, memory, and loss on the held-out answers."""
    import json

    recipe, cfg = load_recipe(RECIPE, [*flags, f"--max_steps={updates}", f"--warmup_steps={updates // 10}"])
    rates = speed(update_times(recipe, cfg, 0))
    record = json.loads((Path(cfg.output_dir) / "run.json").read_text())
    return {**rates, "bytes": peak_bytes(), "loss": record["evaluation"]["eval/loss"]}


def run_trl(flags: list[str], updates: int, way: str, batch_size: int) -> dict[str, Any]:
    """Tune the same model with `SFTTrainer`: speed, memory, and loss on the held-out answers."""
    import accelerate
    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe, cfg = load_recipe(RECIPE, flags)
    train, held_out = recipe.open_data(cfg)
    tokenizer = recipe.open_tokenizer(cfg, train)

    class Clock(transformers.TrainerCallback):
        times: list[float]

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    clock = Clock()
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(cfg.init, attn_implementation="sdpa"),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([{"messages": record["messages"]} for record in train.records]),
        args=trl.SFTConfig(
            output_dir=cfg.output_dir,
            max_steps=updates,
            per_device_train_batch_size=batch_size,
            max_length=cfg.seq_length,
            assistant_only_loss=True,
            optim="adamw_torch_fused",
            adam_beta2=0.95,
            learning_rate=cfg.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=updates // 10,
            max_grad_norm=cfg.max_grad_norm,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **WAYS[way],
        ),
        callbacks=[clock],
    )
    trainer.train()
    memory = peak_bytes()
    trainer.save_model(cfg.output_dir)  # trl has changed the model's forward pass
    model = recipe.head_at_targets(transformers.AutoModelForCausalLM.from_pretrained(cfg.output_dir))
    rows = packed(recipe, cfg, held_out, tokenizer)
    nobody = recipe.Answers([], [], [], [])
    metrics, *_ = recipe.evaluate(cfg, accelerate.Accelerator(), model, rows, nobody, tokenizer, cfg.global_batch_size)
    return {**speed(clock.times), "bytes": memory, "loss": metrics["eval/loss"]}


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def measure_speed(facts: dict[str, Any], options: Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Targets a second on both sides, in turns."""
    turns: list[dict[str, Any]] = []
    flags = [*FLAGS, f"--output_dir={folder / 'trial'}"]
    seconds = in_child(run_recipe, flags=flags, updates=2 * WARM_UPDATES)["seconds_per_update"]
    updates = 2 * WARM_UPDATES + round((options.seconds or 30) / seconds)
    sizes = dict.fromkeys(WAYS, round(facts["examples_per_row"] * facts["rows"]))
    sizes["packed, mixing examples"] = facts["rows"]
    for turn in range(3):
        flags = [*FLAGS, f"--output_dir={folder / f'speed_{turn}'}"]
        found = {"ours": in_child(run_recipe, flags=flags, updates=updates)}
        found |= {way: in_child(run_trl, flags=flags, updates=updates, way=way, batch_size=sizes[way]) for way in WAYS}
        turns.append(found)
    targets = facts["targets_per_row"] * facts["rows"]
    rates = {way: [targets / turn[way]["seconds_per_update"] for turn in turns] for way in turns[0]}
    rows: list[Row] = []
    for way, name in (("padded", "trl"), ("packed, mixing examples", "trl with packing, in which examples mix")):
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates["ours"], rates[way], strict=True))
        both = " / ".join(f"{statistics.median(rates[side]):,.0f}" for side in ("ours", way))
        goal = "at least 1.5" if way == "padded" else "none set"
        rows.append((f"fine-tuning, targets a second, recipe / {name}", f"{ratio:.2f} ({both})", goal))
    last = turns[-1]
    memory = [last[side]["bytes"] / 2**20 for side in ("ours", "padded")]
    shown = f"{memory[0] / memory[1]:.2f} ({memory[0]:,.0f} MiB / {memory[1]:,.0f} MiB)"
    rows.append(("fine-tuning, peak memory of the process, recipe / trl", shown, "none set"))
    losses = " / ".join(f"{last[side]['loss']:.3f}" for side in last)
    names = " / ".join(["recipe", *(f"trl {way}" for way in WAYS)])
    rows.append((f"nats a target on held-out answers after {updates} updates, {names}", losses, "the same as padded"))
    return {"turns": turns}, rows


PARTS = {"speed": measure_speed}


def main() -> None:
    """Measure the parts asked for."""
    options = read_options(__doc__ or "", PARTS, "")
    if options.child:
        answer_child(options.child, [prepare, run_trl, run_recipe])
        return
    folder = Path(tempfile.mkdtemp(prefix="gpt_finetune_benchmark_"))
    facts = in_child(prepare, folder=str(folder))
    measure_parts(RECIPE.with_name("README.md"), PARTS, facts, options, folder)


if __name__ == "__main__":
    main()
