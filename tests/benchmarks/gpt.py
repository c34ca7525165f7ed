"""Measure recipes/gpt/pretrain.py against `transformers.Trainer`: same data, same tokenizer, same CPU cores.

    python tests/benchmarks/gpt.py                        # everything: half an hour to an hour on two quiet cores
    python tests/benchmarks/gpt.py --parts loop,startup   # some of it
    python tests/benchmarks/gpt.py --seconds 5            # whether it runs; such numbers mean nothing

Rules, the same on both sides:
* The clock runs from before the first batch is fetched to the end of the last update. Start-up, tokenising, evaluation,
  sampling, saving and exporting are outside. The Trainer neither logs, evaluates nor saves while its clock runs.
* Quality is bits a byte of UTF-8 text over every eval document once, end tokens counted, always by the recipe's
  `evaluate()`.
* On both sides a run's learning rates fall until its end, so each gets a run of its own for a time: the recipe is run
  ever longer until one run ends at the quality at which the best Trainer run ends. When the full-length run passes it,
  its rates still high, is told beside; between two evaluations its falling, convex curve is taken as a line above it.
* The Trainer gets a GPT-2 without dropout of the recipe's parameter count, fused AdamW with beta2 0.95, a cosine that
  ends with the recipe's training seconds, a memory-mapped data set, the best of several learning rates on the eval
  documents (more are tried while the best is the first or last), and then also an untied head, which costs as little a
  token as the recipe's. The best of all these runs is what the recipe is compared with.
* Where the machine was not quiet, that counts against the recipe: its seconds count as they were, those of a Trainer
  run as if it had gone on all the time at the fastest pace of any run of the same model.
* Peak memory is that of one training process up to its last update, with everything tokenised before.
"""

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import (
    OUTPUT,
    ROOT,
    WARM_UPDATES,
    EnoughUpdates,
    Row,
    answer_child,
    environment,
    execute,
    in_child,
    load_recipe,
    measure_parts,
    peak_bytes,
    read_options,
    say,
    speed,
)

RECIPE = ROOT / "recipes" / "gpt" / "pretrain.py"
README = RECIPE.with_name("README.md")
PROSE = ["--data=prose"]  # one corpus, as the Trainer gets it; the default adds a dictionary
PLAIN = [sys.executable, str(RECIPE), *PROSE]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPE), *PROSE]
# The smallest model there is: its updates take milliseconds, so 10,000 of them take less than a minute.
TINY = ["--hidden_size=16", "--num_layers=1", "--num_heads=1", "--seq_length=16", "--global_batch_size=2"]
NO_PAUSES = ["--eval_every=0", "--save_every=0"]
SHORTER = (0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25)  # runs tried, as shares of the full number of updates

# ----------------------------------------------------------------------------------------------------------------------
# In child processes, so that each side's memory is its own. Imports are late for the same reason.


def prepare(folder: str) -> dict[str, Any]:
    """Build the caches, the Trainer's rows and the configurations of its models; return what the other parts need."""
    import numpy as np

    recipe, cfg = load_recipe(RECIPE, PROSE)
    from shared.run.folder import hardware
    from shared.runtime.launch import start_accelerator

    accelerator = start_accelerator(cfg.timeout_minutes, "", folder, False)
    tokenizer, [train], _ = recipe.open_data(cfg, accelerator)
    model = recipe.build_model(cfg, tokenizer)
    # As run_clm's group_texts: documents, each closed by the end token, one behind the other and cut into rows.
    kept = np.ones(len(train.cache.tokens), dtype=bool)
    kept[[0, *train.cache.ends[:-1]]] = False  # the recipe's begin tokens
    tokens = train.cache.tokens[kept]
    rows = tokens[: len(tokens) // cfg.seq_length * cfg.seq_length].reshape(-1, cfg.seq_length)
    np.save(Path(folder, "rows.npy"), rows)
    model.config.save_pretrained(Path(folder, "recipe_config"))
    parameters = {"recipe": model.num_parameters()}
    width = cfg.hidden_size
    candidates = {
        "gpt2": [gpt2_config(model.config, wider, 4 * wider, tie=True) for wider in range(width, 2 * width, 8)],
        "gpt2_untied": [
            gpt2_config(model.config, width, inner, tie=False) for inner in range(2 * width, 6 * width, 16)
        ],
    }
    for name, configs in candidates.items():
        counts = [count_parameters(config) for config in configs]
        parameters[name] = min(counts, key=lambda count: abs(count - parameters["recipe"]))
        if abs(parameters[name] / parameters["recipe"] - 1) > 0.02:
            raise SystemExit(f"{name}: {parameters[name]} parameters are not within 2 % of {parameters['recipe']}")
        configs[counts.index(parameters[name])].save_pretrained(Path(folder, f"{name}_config"))
    return {
        "parameters": parameters,
        "tokenizer": tokenizer.name_or_path,
        "rows_per_update": cfg.global_batch_size,
        "tokens_per_update": cfg.global_batch_size * cfg.seq_length,
        "max_steps": cfg.max_steps,
        "padding_share": 1 - float(train.pieces[:, 1].sum()) / (len(train) * cfg.seq_length),
        "hardware": hardware(),
    }


def gpt2_config(like: Any, width: int, inner_size: int, *, tie: bool) -> Any:
    """A GPT-2 with the vocabulary, row length, depth and heads of the recipe's model."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=like.vocab_size,
        n_positions=like.max_position_embeddings,
        n_embd=width,
        n_inner=inner_size,
        n_layer=like.num_hidden_layers,
        n_head=like.num_attention_heads,
        bos_token_id=like.bos_token_id,
        eos_token_id=like.eos_token_id,
        tie_word_embeddings=tie,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )


def count_parameters(config: Any) -> int:
    """Parameters of a model; nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def run_trainer(
    folder: str, model: str, rows_per_update: int, learning_rate: float, max_steps: int, evaluate: bool
) -> dict[str, Any]:
    """Train `model` with `transformers.Trainer`; speed, peak memory and, if asked for, bits a byte at the end."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows = np.load(Path(folder, "rows.npy"), mmap_mode="r")

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            row = rows[index].astype(np.int64)
            return {"input_ids": row, "labels": row}

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times = [time.perf_counter()]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(Path(folder, "trainer")),
        max_steps=max_steps,
        per_device_train_batch_size=rows_per_update,
        optim="adamw_torch_fused",
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.05 * max_steps),
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        use_cpu=True,
    )
    set_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(Path(folder, f"{model}_config")))
    clock = Clock()
    trainer = Trainer(model=network, args=arguments, train_dataset=Rows(), callbacks=[clock])
    trainer.train()
    result = {**speed(clock.times[1:]), "seconds": clock.times[-1] - clock.times[0], "peak_bytes": peak_bytes()}
    result |= {"learning_rate": learning_rate, "model": model, "parameters": network.num_parameters()}
    if evaluate:
        recipe, cfg = load_recipe(RECIPE, PROSE)
        _, _, sources = recipe.open_data(cfg, trainer.accelerator)
        metrics = recipe.evaluate(trainer.accelerator, trainer.model, sources, rows_per_update, by_windows=False)
        result["bits_per_byte"] = metrics["eval/bits_per_byte"]
    return result


def run_recipe(flags: list[str], updates: int) -> dict[str, Any]:
    """Run the recipe's own `main()` for some updates; speed, peak memory, and where an update's time goes."""
    import accelerate
    from accelerate.optimizer import AcceleratedOptimizer

    recipe, cfg = load_recipe(RECIPE, [*PROSE, *flags])
    seconds = dict.fromkeys(("forward", "backward", "optimizer", "clipping"), 0.0)
    times, parts, processor = [], [], []
    train_update = recipe.train_update

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            seconds[part] += time.perf_counter() - started
            return result

        return call

    def counted(*args: Any) -> Any:
        result = train_update(*args)
        times.append(time.perf_counter())
        processor.append(time.process_time())
        parts.append(dict(seconds))
        if len(times) == updates:
            raise EnoughUpdates
        return result

    recipe.train_update = counted
    recipe.forward = timed("forward", recipe.forward)
    recipe.causal_lm_loss_sum = timed("forward", recipe.causal_lm_loss_sum)
    accelerate.Accelerator.backward = timed("backward", accelerate.Accelerator.backward)
    accelerate.Accelerator.clip_grad_norm_ = timed("clipping", accelerate.Accelerator.clip_grad_norm_)
    AcceleratedOptimizer.step = timed("optimizer", AcceleratedOptimizer.step)
    try:
        recipe.main(cfg)
    except EnoughUpdates:
        elapsed = times[-1] - times[WARM_UPDATES - 1]
        shares = {part: (parts[-1][part] - parts[WARM_UPDATES - 1][part]) / elapsed for part in seconds}
        cores = (processor[-1] - processor[WARM_UPDATES - 1]) / elapsed
        return {**speed(times), "peak_bytes": peak_bytes(), "shares": shares, "cores": cores}
    raise SystemExit(f"the recipe ended before {updates} updates")


# ----------------------------------------------------------------------------------------------------------------------
# In the parent, which imports no library and so takes no memory or core from what it measures


def seconds_to_first_step(command: list[str]) -> float:
    """Seconds from the start of the process to its first line about a step; then it is killed."""
    started = time.perf_counter()
    process = subprocess.Popen(command, **OUTPUT, env=environment(), start_new_session=True)
    seen = []
    try:
        for line in process.stdout:
            if line.startswith("step "):
                return time.perf_counter() - started
            seen.append(line)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    raise SystemExit(f"{''.join(seen)[-4000:]}\nno step: {' '.join(command)}")


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def measure_quality(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """How soon the recipe is where the best Trainer run ends, in training seconds."""
    run_dir, max_steps = folder / "recipe", facts["max_steps"]
    if options.seconds:
        max_steps = max(12, round(options.seconds / facts["seconds_per_update"]))
    eval_every = max(1, max_steps // (2 if options.seconds else 25))
    curve = run_to_the_end(run_dir, max_steps, eval_every)
    budget, recipe_bits = curve[-1]
    say(f"recipe: {recipe_bits:.4f} bits a byte after {max_steps} updates in {budget:.0f} s")

    paces: dict[str, float] = {}
    runs: list[dict[str, Any]] = []

    def train(model: str, learning_rate: float) -> None:
        settings = {"model": model, "learning_rate": learning_rate, "rows_per_update": facts["rows_per_update"]}
        settings["folder"] = str(folder)
        if model not in paces:
            trial = in_child(run_trainer, max_steps=max(2 * WARM_UPDATES, max_steps // 10), evaluate=False, **settings)
            paces[model] = min(trial["seconds_per_update"], *paces.values(), math.inf)  # untied costs no more than tied
        updates = max(2 * WARM_UPDATES, round(budget / paces[model]))
        runs.append(in_child(run_trainer, max_steps=updates, evaluate=True, **settings))
        paces[model] = min(paces[model], runs[-1]["seconds_per_update"])
        told = f"{runs[-1]['bits_per_byte']:.4f} bits a byte after {updates} updates in {runs[-1]['seconds']:.0f} s"
        say(f"Trainer: {model} {learning_rate:g}: {told}")

    def best() -> dict[str, Any]:
        return min(runs, key=lambda run: run["bits_per_byte"])

    rates = [float(rate) for rate in options.learning_rates.split(",")]
    for rate in rates:
        train("gpt2", rate)
    while not options.seconds and len(runs) < len(rates) + 3:
        tried, at_best = [run["learning_rate"] for run in runs], best()["learning_rate"]
        if min(tried) < at_best < max(tried):
            break
        train("gpt2", at_best / 2 if at_best == min(tried) else at_best * 2)
    train("gpt2_untied", best()["learning_rate"])

    winner = best()
    target, trainer_seconds = winner["bits_per_byte"], winner["updates"] * paces[winner["model"]]
    if winner["seconds"] > 1.1 * trainer_seconds:
        say(f"warning: not a quiet machine: {winner['seconds']:.0f} s of the Trainer count as {trainer_seconds:.0f} s")
    reached = seconds_to_reach(curve, target)
    share = f"{reached / trainer_seconds:.3f}" if reached else "not reached"
    told = f"{reached:.0f} s of {trainer_seconds:.0f} s" if reached else f"{budget:.0f} s"
    label = f"{winner['model']} at {winner['learning_rate']:g}"

    shorter = []
    for part in SHORTER:
        updates = max(2 * WARM_UPDATES, round(part * max_steps))
        shorter += run_to_the_end(folder / f"recipe_{part}", updates, 0)
        say(f"recipe: {shorter[-1][1]:.4f} bits a byte after {updates} updates in {shorter[-1][0]:.0f} s")
        if shorter[-1][1] <= target:
            break
    seconds, bits = shorter[-1]
    sooner = f"{seconds / trainer_seconds:.3f}" if bits <= target else "not reached"
    raw = {"curve": curve, "trainer": runs, "paces": paces, "seconds_to_reach": reached, "shorter": shorter}
    return raw, [
        (
            "training time of a recipe run to the best Trainer run's bits a byte, as a share of that run's time",
            f"{sooner} ({seconds:.0f} s to {bits:.4f}, {trainer_seconds:.0f} s to {target:.4f} by {label})",
            "at most 0.20",
        ),
        (
            "when the full-length recipe run passes that quality, as a share of the same time",
            f"{share} ({told})",
            "at most 0.20",
        ),
        ("bits a byte after the same training time, recipe / Trainer", f"{recipe_bits:.4f} / {target:.4f}", "lower"),
    ]


def run_to_the_end(run_dir: Path, max_steps: int, eval_every: int) -> list[tuple[float, float]]:
    """Run the recipe; (training seconds, bits a byte) at each evaluation."""
    execute([*LAUNCH, f"--output_dir={run_dir}", f"--max_steps={max_steps}", f"--eval_every={eval_every}"])
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(e["perf/training_seconds"], e["eval/bits_per_byte"]) for e in entries if "eval/bits_per_byte" in e]


def seconds_to_reach(curve: list[tuple[float, float]], target: float) -> float | None:
    """When the line through (seconds, bits a byte) is first at `target`; None if never."""
    before: tuple[float, float] | None = None
    for seconds, bits in curve:
        if bits <= target:
            if before is None:
                return seconds
            return before[0] + (seconds - before[0]) * (before[1] - target) / (before[1] - bits)
        before = seconds, bits
    return None


def measure_loop(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Speed and memory of both loops with the recipe's model, the same rows an update, and AdamW, in turns."""
    updates = loop_updates(facts, options)
    pairs = []
    for turn in range(3):
        flags = [f"--output_dir={folder / f'loop_{turn}'}", "--optimizer=adamw", "--weight_decay=0.1", *NO_PAUSES]
        ours = in_child(run_recipe, flags=flags, updates=updates)
        settings = {"model": "recipe", "learning_rate": 1e-3, "max_steps": updates, "evaluate": False}
        theirs = in_child(run_trainer, folder=str(folder), rows_per_update=facts["rows_per_update"], **settings)
        assert theirs["parameters"] == facts["parameters"]["recipe"]
        pairs.append((ours, theirs))
    ratio = statistics.median(theirs["seconds_per_update"] / ours["seconds_per_update"] for ours, theirs in pairs)
    rates = [
        facts["tokens_per_update"] / statistics.median(pair[side]["seconds_per_update"] for pair in pairs)
        for side in (0, 1)
    ]
    peaks = [statistics.median(pair[side]["peak_bytes"] for pair in pairs) for side in (0, 1)]
    return {"updates": updates, "pairs": pairs}, [
        (
            "tokens a second, recipe's loop / Trainer's (the recipe's model, AdamW; median of 3 turns)",
            f"{ratio:.3f} ({rates[0]:,.0f} / {rates[1]:,.0f})",
            "at least 1.0",
        ),
        (
            "peak memory of the training process, recipe / Trainer (same runs)",
            f"{peaks[0] / peaks[1]:.3f} ({peaks[0] / 2**20:.0f} MiB / {peaks[1] / 2**20:.0f} MiB)",
            "none set",
        ),
    ]


def loop_updates(facts: dict[str, Any], options: argparse.Namespace) -> int:
    """Updates of a short run, as many as fit half a minute."""
    return WARM_UPDATES + max(5, round((options.seconds or 30) / facts["seconds_per_update"]))


def measure_overhead(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Share of an update that is none of: forward pass with loss, backward pass, optimizer step. Clipping counts."""
    flags = [f"--output_dir={folder / 'overhead'}", *NO_PAUSES]
    run = in_child(run_recipe, flags=flags, updates=loop_updates(facts, options))
    outside = 1 - sum(run["shares"][part] for part in ("forward", "backward", "optimizer"))
    measured = f"{outside:.1%} (gradient clipping {run['shares']['clipping']:.1%})"
    cores = f"{run['cores']:.2f} of {len(os.sched_getaffinity(0))}"
    return run, [
        ("share of an update outside forward, backward and optimizer", measured, "at most 3 %"),
        ("cores that training keeps busy: processor time by time", cores, "all"),
    ]


def measure_resume(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Seconds from process start to the first update after resuming, far into a run and near its start."""
    eval_data = folder / "tiny_eval.txt"
    eval_data.write_text("A short document to evaluate a tiny model on.\n")
    near, far = 10, 200 if options.seconds else 10_000
    common = [
        *TINY,
        *NO_PAUSES,
        f"--tokenizer={facts['tokenizer']}",
        f"--eval_data={eval_data}",
        f"--cache_dir={folder / 'tiny'}",
    ]
    for steps in (near, far):
        output = f"--output_dir={folder / f'resume_{steps}'}"
        execute([*PLAIN, *common, output, f"--max_steps={steps}", "--log_every=1000"])
    seconds: dict[int, list[float]] = {near: [], far: []}
    for turn in range(3):
        for steps in (near, far):
            checkpoint = folder / f"resume_{steps}" / "checkpoints" / f"step_{steps:08d}"
            flags = [f"--resume={checkpoint}", f"--output_dir={folder / f'resumed_{steps}_{turn}'}", "--log_every=1"]
            seconds[steps].append(seconds_to_first_step([*PLAIN, *common, *flags, f"--max_steps={2 * far}"]))
    best = {steps: min(values) for steps, values in seconds.items()}
    measured = f"{best[far] / best[near]:.2f} ({best[far]:.1f} s / {best[near]:.1f} s)"
    return {"seconds": seconds}, [
        (f"process start to first resumed update, step {far:,} / step {near} (best of 3)", measured, "about 1")
    ]


def measure_startup(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Seconds to the first loss with a tokenizer but nothing tokenised, and to the end of --help."""
    flags = [f"--output_dir={folder / 'startup'}", f"--cache_dir={folder / 'cold'}"]
    first = seconds_to_first_step([*LAUNCH, *flags, f"--tokenizer={facts['tokenizer']}"])
    helps = [execute([*PLAIN, "--help"]) for _ in range(3)]
    return {"first_loss": first, "help": helps}, [
        ("start to first loss line, tokenizer there, data not yet tokenised", f"{first:.1f} s", "at most 30 s"),
        ("--help (median of 3)", f"{statistics.median(helps):.1f} s", "at most 3 s"),
    ]


PARTS = {
    "quality": measure_quality,
    "loop": measure_loop,
    "overhead": measure_overhead,
    "resume": measure_resume,
    "startup": measure_startup,
}


def main() -> None:
    """Measure the parts asked for."""
    options = read_options(__doc__, PARTS, "1e-3,2e-3,4e-3")
    if options.child:
        answer_child(options.child, [prepare, run_trainer, run_recipe])
        return
    folder = Path(tempfile.mkdtemp(prefix="gpt_benchmark_"))
    facts = in_child(prepare, folder=str(folder))
    trial = in_child(run_recipe, flags=[f"--output_dir={folder / 'pace'}", *NO_PAUSES], updates=4 * WARM_UPDATES)
    facts["seconds_per_update"] = trial["seconds_per_update"]
    measure_parts(README, PARTS, facts, options, folder)


if __name__ == "__main__":
    main()
