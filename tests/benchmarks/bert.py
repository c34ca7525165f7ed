"""Measure recipes/bert/pretrain.py against `transformers.Trainer`: same pairs, same model, same CPU cores.

    python tests/benchmarks/bert.py                      # everything: about half an hour on two quiet cores
    python tests/benchmarks/bert.py --parts speed,pairs  # some of it
    python tests/benchmarks/bert.py --seconds 5          # whether it runs; such numbers mean nothing

Rules:
* The Trainer gets the library's class of the recipe's model, fused AdamW, a linear schedule, its own sampler, and
  `DataCollatorForLanguageModeling`, which pads to the longest pair of a batch and masks the recipe's share of the
  tokens one by one. Its pairs are the recipe's first epoch, ready in memory as lists of ids. Both use all cores.
* Speed is that of the same model with the same optimizer, so the recipe has AdamW too; real tokens, padding not
  counted, from the end of the fifth update on; both sides in turns, the median of three.
* Quality is the recipe's `evaluate()` on both sides. The Trainer trains as long as the recipe's default run, at the
  best of several learning rates (more are tried while the best is the first or last); the recipe has reached its
  quality at its first evaluation that is as good, and evaluates 40 times. The clock runs from before the first batch to
  the last update, without evaluation and saving, on both sides.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import (
    ROOT,
    WARM_UPDATES,
    EnoughUpdates,
    Row,
    answer_child,
    execute,
    in_child,
    load_recipe,
    measure_parts,
    peak_bytes,
    read_options,
    say,
    speed,
)

RECIPE = ROOT / "recipes" / "bert" / "pretrain.py"
README = RECIPE.with_name("README.md")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPE)]
NO_PAUSES = ["--eval_every=0", "--save_every=0"]
EVALUATIONS = 40
# This text is too small to train the paper's vocabulary on: the one trained here is filled up with unused entries.
WIDE = ["--hidden_size=256", "--num_heads=4", "--architecture=bert"]
WIDE_VOCABULARY = 30_522

# ----------------------------------------------------------------------------------------------------------------------
# In child processes, so that each side's memory is its own. Imports are late for the same reason.


def prepare(folder: str) -> dict[str, Any]:
    """Build the caches and a vocabulary as large as the paper's; return what the other parts need."""
    recipe, cfg = load_recipe(RECIPE, [])
    from shared.run.folder import hardware
    from shared.runtime.launch import start_accelerator

    accelerator = start_accelerator(cfg.timeout_minutes, "", folder, False)
    tokenizer, pairs, _ = recipe.open_data(cfg, accelerator)
    vocabulary = tokenizer.get_vocab()
    vocabulary |= {f"[unused{number}]": number for number in range(len(vocabulary), WIDE_VOCABULARY)}
    type(tokenizer)(vocab=vocabulary, model_max_length=cfg.max_positions).save_pretrained(Path(folder, "wide"))
    return {
        "max_steps": cfg.max_steps,
        "pairs_per_update": cfg.global_batch_size,
        "parameters": recipe.build_model(cfg, tokenizer).num_parameters(),
        "padding": padding_share(recipe, cfg, pairs),
        "hardware": hardware(),
    }


def padding_share(recipe: Any, cfg: Any, pairs: Any) -> float:
    """Share of an epoch's tokens that are padding, as the recipe batches them."""
    lengths, real, padded = pairs.lengths(pairs.epoch(0)), 0, 0
    order = {"global_batch_size": cfg.global_batch_size, "rank": 0, "num_processes": 1}
    for step in range(pairs.updates_per_epoch(cfg.global_batch_size)):
        of_update = lengths[[pair for _, pair in pairs.samples_of_update(step, **order)]]
        real, padded = real + int(of_update.sum()), padded + int(of_update.max()) * len(of_update)
    return 1 - real / padded


def run_trainer(flags: list[str], learning_rate: float, max_steps: int, evaluate: bool) -> dict[str, Any]:
    """Train the recipe's model with `transformers.Trainer`; speed and, if asked for, the metrics at the end."""
    import accelerate
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe, cfg = load_recipe(RECIPE, flags)
    accelerator = accelerate.Accelerator(cpu=True)
    tokenizer, pairs, eval_pairs = recipe.open_data(cfg, accelerator)
    rows = [pairs.read(0, pair) for pair in range(min(len(pairs.epoch(0)), max_steps * cfg.global_batch_size))]
    sizes = [int(row["attention_mask"].sum()) for row in rows]
    names = ("input_ids", "token_type_ids")
    samples = [
        {**{name: row[name][:size].tolist() for name in names}, "next_sentence_label": int(row["next_sentence_label"])}
        for row, size in zip(rows, sizes, strict=True)
    ]

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times = [time.perf_counter()]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=cfg.output_dir,
        max_steps=max_steps,
        per_device_train_batch_size=cfg.global_batch_size,
        optim="adamw_torch_fused",
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(0.05 * max_steps),
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    transformers.set_seed(0)
    own = recipe.build_model(cfg, tokenizer)
    library_class = getattr(transformers, type(own).__name__)
    network, clock = library_class(own.config), Clock()  # with the library's initial weights
    trainer = transformers.Trainer(
        model=network,
        args=arguments,
        train_dataset=samples,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=cfg.mask_fraction),
        callbacks=[clock],
    )
    trainer.train()
    result = {**speed(clock.times[1:]), "seconds": clock.times[-1] - clock.times[0], "peak_bytes": peak_bytes()}
    result |= {"tokens_per_update": cfg.global_batch_size * statistics.mean(sizes), "learning_rate": learning_rate}
    if evaluate:
        own.load_state_dict(network.state_dict())
        vocabulary = recipe.wordpiece.look_up_vocabulary(tokenizer)
        with torch.no_grad():
            result |= recipe.evaluate(accelerator, own, eval_pairs, vocabulary, cfg.global_batch_size)
    return result


def run_recipe(flags: list[str], updates: int) -> dict[str, Any]:
    """Run the recipe's own `main()` for some updates; speed, real tokens and the share of making pairs and masks."""
    recipe, cfg = load_recipe(RECIPE, flags)
    times, tokens, making = [], [], [0.0]
    train_update, make = recipe.train_update, recipe.MaskedUpdates.__getitem__

    def timed(self: Any, step: int) -> Any:
        started = time.perf_counter()
        update = make(self, step)
        making[0] += time.perf_counter() - started
        return update

    def counted(*args: Any) -> Any:
        result = train_update(*args)
        times.append(time.perf_counter())
        tokens.append(sum(int(batch["attention_mask"].sum()) for batch in args[4]))
        if len(times) == WARM_UPDATES:
            making[0] = 0.0
        if len(times) == updates:
            raise EnoughUpdates
        return result

    recipe.train_update, recipe.MaskedUpdates.__getitem__ = counted, timed
    try:
        recipe.main(cfg)
    except EnoughUpdates:
        seconds = times[-1] - times[WARM_UPDATES - 1]
        result = {**speed(times), "tokens_per_update": statistics.mean(tokens[WARM_UPDATES:])}
        return {**result, "peak_bytes": peak_bytes(), "share_of_making": making[0] / seconds}
    raise SystemExit(f"the recipe ended before {updates} updates")


def make_pairs(flags: list[str]) -> dict[str, float]:
    """Find the pairs of one epoch that nobody has asked for yet."""
    from shared.runtime.launch import start_accelerator

    recipe, cfg = load_recipe(RECIPE, flags)
    accelerator = start_accelerator(cfg.timeout_minutes, "", "", False)
    _, pairs, _ = recipe.open_data(cfg, accelerator)
    from shared.text.sentence_pairs import make_pairs as make

    started = time.perf_counter()
    number = sum(1 for _ in make(pairs.cache, cfg.seq_length, recipe.SHORT_FRACTION, seed=12345))
    return {"seconds": time.perf_counter() - started, "pairs": number, "sentences": len(pairs.cache.sentence_ends)}


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def measure_speed(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Real tokens a second with the same model and AdamW on both sides, in turns."""
    default = ["--optimizer=adamw"]
    settings = {
        "the default model": default,
        "BERT of the same sizes": [*default, "--architecture=bert"],
        f"BERT of width 256, vocabulary {WIDE_VOCABULARY:,}": [*default, *WIDE, f"--tokenizer={folder / 'wide'}"],
    }
    raw: dict[str, Any] = {}
    rows = []
    for name, flags in settings.items():
        turns = []
        for turn in range(3):
            common = [*flags, *NO_PAUSES, f"--output_dir={folder / f'speed_{len(raw)}_{turn}'}"]
            if not turns:
                trial = in_child(
                    run_recipe, flags=[*flags, f"--output_dir={folder / f'trial_{len(raw)}'}"], updates=2 * WARM_UPDATES
                )
                updates = loop_updates(trial, options)
            ours = in_child(run_recipe, flags=common, updates=updates)
            theirs = in_child(run_trainer, flags=common, learning_rate=1e-3, max_steps=updates, evaluate=False)
            turns.append((ours, theirs))
        rates = [
            statistics.median(side[number]["tokens_per_update"] / side[number]["seconds_per_update"] for side in turns)
            for number in (0, 1)
        ]
        ratio = statistics.median(tokens_a_second(ours) / tokens_a_second(theirs) for ours, theirs in turns)
        memory = statistics.median(ours["peak_bytes"] / theirs["peak_bytes"] for ours, theirs in turns)
        raw[name] = turns
        rows.append(
            (
                f"real tokens a second, recipe / Trainer, {name}",
                f"{ratio:.2f} ({rates[0]:,.0f} / {rates[1]:,.0f})",
                "at least 2.5",
            )
        )
        rows.append((f"peak memory of the training process, recipe / Trainer, {name}", f"{memory:.2f}", "none set"))
    return raw, rows


def tokens_a_second(run: dict[str, float]) -> float:
    """Real tokens a second of a run."""
    return run["tokens_per_update"] / run["seconds_per_update"]


def loop_updates(trial: dict[str, Any], options: argparse.Namespace) -> int:
    """Updates of a short run, as many as fit 20 seconds."""
    return WARM_UPDATES + max(5, round((options.seconds or 20) / trial["seconds_per_update"]))


def measure_quality(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """How soon the recipe's default run is where the best Trainer run of the same time ends, in training seconds."""
    max_steps = 2 * EVALUATIONS if options.seconds else facts["max_steps"]
    run_dir = folder / "quality"
    execute(
        [*LAUNCH, f"--output_dir={run_dir}", f"--max_steps={max_steps}", f"--eval_every={max_steps // EVALUATIONS}"]
    )
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = [entry for entry in entries if "eval/mlm_loss" in entry]
    budget, last = curve[-1]["perf/training_seconds"], curve[-1]
    say(f"recipe: {told(last)} after {max_steps} updates in {budget:.0f} s")
    flags = [f"--output_dir={folder / 'trainer'}"]
    trial = in_child(run_trainer, flags=flags, learning_rate=1e-3, max_steps=6 * WARM_UPDATES, evaluate=False)
    updates = max(2 * WARM_UPDATES, round(budget / trial["seconds_per_update"]))
    runs = []

    def train(rate: float) -> None:
        runs.append(in_child(run_trainer, flags=flags, learning_rate=rate, max_steps=updates, evaluate=True))
        say(f"Trainer at {rate:g}: {told(runs[-1])} after {updates} updates in {runs[-1]['seconds']:.0f} s")

    rates = [float(rate) for rate in options.learning_rates.split(",")]
    for rate in rates:
        train(rate)
    while not options.seconds and len(runs) < len(rates) + 2:
        tried, at_best = [run["learning_rate"] for run in runs], best(runs)["learning_rate"]
        if min(tried) < at_best < max(tried):
            break
        train(at_best / 2 if at_best == min(tried) else at_best * 2)
    winner = best(runs)
    reached = next((e["perf/training_seconds"] for e in curve if e["eval/mlm_loss"] <= winner["eval/mlm_loss"]), None)
    share = f"{reached / winner['seconds']:.2f} ({reached:.0f} s of {winner['seconds']:.0f} s)" if reached else "never"
    return {"curve": curve, "trainer": runs}, [
        ("training time to the best Trainer run's eval/mlm_loss, as a share of that run's time", share, "at most 0.40"),
        ("eval/mlm_loss after the same time, recipe / Trainer", pair_of(last, winner, "mlm_loss"), "lower"),
        ("eval/mlm_accuracy after the same time, recipe / Trainer", pair_of(last, winner, "mlm_accuracy"), "higher"),
        ("eval/nsp_accuracy after the same time, recipe / Trainer", pair_of(last, winner, "nsp_accuracy"), "higher"),
    ]


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the lowest eval/mlm_loss."""
    return min(runs, key=lambda run: run["eval/mlm_loss"])


def told(metrics: dict[str, Any]) -> str:
    """A run's quality in words."""
    return f"mlm_loss {metrics['eval/mlm_loss']:.3f}, mlm_accuracy {metrics['eval/mlm_accuracy']:.3f}"


def pair_of(ours: dict[str, Any], theirs: dict[str, Any], name: str) -> str:
    """A metric of both sides."""
    return f"{ours[f'eval/{name}']:.3f} / {theirs[f'eval/{name}']:.3f} (Trainer at {theirs['learning_rate']:g})"


def measure_pairs(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """What making pairs and masks costs, and how much is padding."""
    made = in_child(make_pairs, flags=[])
    flags = [f"--output_dir={folder / 'pairs'}", *NO_PAUSES]
    run = in_child(run_recipe, flags=flags, updates=WARM_UPDATES + (10 if options.seconds else 150))
    per_epoch = made["pairs"] / facts["pairs_per_update"] * run["seconds_per_update"]
    return {"made": made, "run": run}, [
        (
            "finding an epoch's pairs, sentences a second, and its share of the epoch's training time",
            f"{made['sentences'] / made['seconds']:,.0f}, {made['seconds'] / per_epoch:.2%}",
            "none set",
        ),
        ("reading and masking pairs, share of the training time", f"{run['share_of_making']:.1%}", "none set"),
        ("padding, share of the tokens of an epoch", f"{facts['padding']:.2%}", "under 5 %"),
    ]


PARTS = {"speed": measure_speed, "pairs": measure_pairs, "quality": measure_quality}


def main() -> None:
    """Measure the parts asked for."""
    options = read_options(__doc__, PARTS, "5e-4,1e-3,2e-3")
    if options.child:
        answer_child(options.child, [prepare, run_trainer, run_recipe, make_pairs])
        return
    folder = Path(tempfile.mkdtemp(prefix="bert_benchmark_"))
    facts = in_child(prepare, folder=str(folder))
    measure_parts(README, PARTS, facts, options, folder)


if __name__ == "__main__":
    main()
