"""Measure recipes/resnet/pretrain.py against `transformers.Trainer`, and its input path against Pillow.

    python tests/benchmarks/resnet.py                      # everything: three quarters of an hour on two quiet cores
    python tests/benchmarks/resnet.py --parts speed,input  # some of it
    python tests/benchmarks/resnet.py --seconds 5          # whether it runs; such numbers mean nothing

Rules:
* The Trainer gets the library's class of the recipe's model, its own sampler, fused AdamW with a linear schedule, and
  the embedded Parquet file, whose images the library's image processor makes ready as they are asked for, as in the
  example of transformers' documentation. It runs with no data worker and with one, and the faster counts. Both use all
  cores.
* Speed is that of the same model, batch and size of the crops, which is why the recipe's do not grow there; images a
  second from the end of the fifth update on, for a minute; both sides in turns, the median of three.
* Quality is the recipe's `evaluate()` on both sides. The Trainer trains as long as the recipe's default run, at the
  best of several learning rates (more are tried while the best is the first or last). Then the recipe runs with fewer
  updates, and all else as it is, until a run ends as good; its time counts. So does, in a row of its own, when the
  full-length run passes that quality, of 40 evaluations. The clock runs from before the first batch to the last update,
  without evaluation and saving, on both sides.
* The input path is one thread's: JPEGs of 500 x 375 pixels to 176 x 176 crops, the same boxes on both sides. Pillow
  decodes the whole image and resizes the box.
"""

import argparse
import io
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
    update_times,
)
from jpegs import JPEG_SIZE, make_jpeg

RECIPE = ROOT / "recipes" / "resnet" / "pretrain.py"
README = RECIPE.with_name("README.md")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", str(RECIPE)]
NO_PAUSES = ["--eval_every=0", "--save_every=0"]
ONE_SIZE = ["--image_size=28", "--final_image_size=28"]
EVALUATIONS = 40
SHORTER = (0.3, 0.4, 0.5, 0.6, 0.7)  # runs tried, as shares of the full number of updates
CROP, NUM_JPEGS = 176, 64

# ----------------------------------------------------------------------------------------------------------------------
# In child processes, so that each side's memory is its own. Imports are late for the same reason.


def prepare(folder: str) -> dict[str, Any]:
    """What the other parts need."""
    recipe, cfg = load_recipe(RECIPE, [])
    from shared.run.folder import hardware
    from shared.runtime.launch import start_accelerator

    accelerator = start_accelerator(cfg.timeout_minutes, "", folder, False)
    train, _ = recipe.open_data(cfg, accelerator)
    return {
        "max_steps": cfg.max_steps,
        "parameters": recipe.build_model(cfg, train.class_names).num_parameters(),
        "hardware": hardware(),
    }


def run_trainer(flags: list[str], learning_rate: float, max_steps: int, workers: int, evaluate: bool) -> dict[str, Any]:
    """Train the recipe's model with `transformers.Trainer`; speed and, if asked for, the metrics at the end."""
    import accelerate
    import datasets
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe, cfg = load_recipe(RECIPE, flags)
    from shared.images.labelled import SAMPLE

    accelerator = accelerate.Accelerator(cpu=True)
    train, held_out = recipe.open_data(cfg, accelerator)
    shown = (recipe.enlargement(cfg) * cfg.eval_image_size, cfg.eval_crop_fraction)
    processor = recipe.resnet.build_processor(*shown)

    def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch["image"]]
        return {**processor(images, return_tensors="pt"), "labels": batch["label"]}

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times = [time.perf_counter()]

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    arguments = transformers.TrainingArguments(
        output_dir=cfg.output_dir,
        max_steps=max_steps,
        per_device_train_batch_size=cfg.global_batch_size,
        dataloader_num_workers=workers,
        optim="adamw_torch_fused",
        learning_rate=learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(0.05 * max_steps),
        weight_decay=0.01,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    transformers.set_seed(0)
    own, clock = recipe.build_model(cfg, train.class_names), Clock()
    network = transformers.ResNetForImageClassification(own.config)  # with the library's initial weights
    data = datasets.load_dataset("parquet", data_files=str(SAMPLE / "train.parquet"), split="train")
    trainer = transformers.Trainer(
        model=network, args=arguments, train_dataset=data.with_transform(process), callbacks=[clock]
    )
    trainer.train()
    result = {**speed(clock.times[1:]), "seconds": clock.times[-1] - clock.times[0], "peak_bytes": peak_bytes()}
    result |= {"learning_rate": learning_rate, "workers": workers}
    if evaluate:
        own.load_state_dict(network.state_dict())
        crops = recipe.CenterCrops(held_out, *shown, cfg.global_batch_size)
        result |= recipe.evaluate(cfg, accelerator, own, crops)[0]
    return result


def run_recipe(flags: list[str], updates: int) -> dict[str, Any]:
    """Run the recipe's own `main()` for some updates; its speed."""
    recipe, cfg = load_recipe(RECIPE, flags)
    return {**speed(update_times(recipe, cfg, updates)), "peak_bytes": peak_bytes()}


def read_jpegs(seconds: float) -> dict[str, float]:
    """Crops a second of one thread, the recipe's way and Pillow's, in turns."""
    import numpy as np
    import torch
    from PIL import Image

    _, cfg = load_recipe(RECIPE, [])
    from shared.images.crops import CROP_DRAWS, random_crop
    from shared.images.decoding import EncodedImage

    torch.set_num_threads(1)  # as in a data worker
    data = [make_jpeg(seed) for seed in range(NUM_JPEGS)]

    def ours(index: int, draws: Any) -> None:
        random_crop(EncodedImage(data[index]), CROP, cfg.min_crop_area, draws, True)

    class Pillow:
        """An image whose `crop` decodes all of it."""

        def __init__(self, content: bytes) -> None:
            self._image = Image.open(io.BytesIO(content))
            self.width, self.height = self._image.size

        def crop(self, box: tuple[int, int, int, int], size: int) -> Any:
            return np.asarray(self._image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box))

    def theirs(index: int, draws: Any) -> None:
        random_crop(Pillow(data[index]), CROP, cfg.min_crop_area, draws, True)

    rates: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(6):
        for name, read in (("ours", ours), ("theirs", theirs)):
            started, number = time.perf_counter(), 0
            while time.perf_counter() - started < seconds:
                read(number % NUM_JPEGS, np.random.default_rng(number).random(CROP_DRAWS))
                number += 1
            if turn:  # the first warms up
                rates[name].append(number / (time.perf_counter() - started))
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True))
    return {**{name: statistics.median(values) for name, values in rates.items()}, "ratio": ratio}


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def measure_speed(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Images a second of the same model on both sides, in turns."""
    turns = []
    for turn in range(3):
        flags = [*ONE_SIZE, *NO_PAUSES, f"--output_dir={folder / f'speed_{turn}'}"]
        if not turns:
            trial_flags = [*ONE_SIZE, f"--output_dir={folder / 'trial'}"]
            trial = in_child(run_recipe, flags=trial_flags, updates=2 * WARM_UPDATES)
            updates = WARM_UPDATES + max(5, round((options.seconds or 60) / trial["seconds_per_update"]))
        ours = in_child(run_recipe, flags=flags, updates=updates)
        common = {"flags": flags, "learning_rate": 1e-3, "max_steps": updates, "evaluate": False}
        theirs = [in_child(run_trainer, workers=workers, **common) for workers in (0, 1)]
        turns.append((ours, min(theirs, key=lambda run: run["seconds_per_update"])))
    ratio = statistics.median(theirs["seconds_per_update"] / ours["seconds_per_update"] for ours, theirs in turns)
    batch = load_recipe(RECIPE, [])[1].global_batch_size
    rates = [statistics.median(batch / side[number]["seconds_per_update"] for side in turns) for number in (0, 1)]
    workers = statistics.mode(theirs["workers"] for _, theirs in turns)
    memory = statistics.median(ours["peak_bytes"] / theirs["peak_bytes"] for ours, theirs in turns)
    shown = f"{ratio:.2f} ({rates[0]:,.0f} / {rates[1]:,.0f}, the Trainer with {workers} data workers)"
    return {"turns": turns}, [
        ("images a second, recipe / Trainer", shown, "at least 1.5"),
        ("peak memory of the training process, recipe / Trainer", f"{memory:.2f}", "none set"),
    ]


def measure_quality(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """How soon the recipe's default run is where the best Trainer run of the same time ends, in training seconds."""
    max_steps = 2 * EVALUATIONS if options.seconds else facts["max_steps"]
    entries = run_to_the_end(folder / "quality", max_steps, max_steps // EVALUATIONS)
    curve = [entry for entry in entries if "eval/top1" in entry]
    waits = [entry["perf/data_wait_fraction"] for entry in entries if "perf/data_wait_fraction" in entry]
    budget, last = curve[-1]["perf/training_seconds"], curve[-1]
    say(f"recipe: top-1 {last['eval/top1']:.4f} after {max_steps} updates in {budget:.0f} s")
    flags = [f"--output_dir={folder / 'trainer'}"]
    common = {"flags": flags, "workers": 1}
    trial = in_child(run_trainer, **common, learning_rate=1e-3, max_steps=6 * WARM_UPDATES, evaluate=False)
    updates = max(2 * WARM_UPDATES, round(budget / trial["seconds_per_update"]))
    runs: list[dict[str, Any]] = []

    def train(rate: float) -> None:
        runs.append(in_child(run_trainer, **common, learning_rate=rate, max_steps=updates, evaluate=True))
        say(f"Trainer at {rate:g}: top-1 {runs[-1]['eval/top1']:.4f} in {runs[-1]['seconds']:.0f} s")

    rates = [float(rate) for rate in options.learning_rates.split(",")]
    for rate in rates:
        train(rate)
    while not options.seconds and len(runs) < len(rates) + 2:
        tried, at_best = [run["learning_rate"] for run in runs], best(runs)["learning_rate"]
        if min(tried) < at_best < max(tried):
            break
        train(at_best / 2 if at_best == min(tried) else at_best * 2)
    winner = best(runs)
    target = winner["eval/top1"]
    reached = next((entry["perf/training_seconds"] for entry in curve if entry["eval/top1"] >= target), 0)
    passed = f"{reached / winner['seconds']:.2f} ({reached:.0f} s of {winner['seconds']:.0f} s)" if reached else "never"
    shorter = []
    for part in SHORTER:
        shorter.append(run_to_the_end(folder / f"shorter_{part}", round(part * max_steps), 0)[-1])
        say(f"recipe: top-1 {shorter[-1]['eval/top1']:.4f} after {shorter[-1]['perf/training_seconds']:.0f} s")
        if shorter[-1]["eval/top1"] >= target:
            break
    seconds, found = shorter[-1]["perf/training_seconds"], shorter[-1]["eval/top1"]
    share = f"{seconds / winner['seconds']:.2f}" if found >= target else "not reached"
    share += f" ({seconds:.0f} s to {found:.4f}, {winner['seconds']:.0f} s to {target:.4f})"
    top1 = f"{last['eval/top1']:.4f} / {winner['eval/top1']:.4f} (Trainer at {winner['learning_rate']:g})"
    return {"curve": curve, "trainer": runs, "shorter": shorter}, [
        (
            "training time of a recipe run to the best Trainer run's top-1, as a share of that run's time",
            share,
            "at most 0.50",
        ),
        ("when the full-length run passes that top-1, as a share of the same time", passed, "at most 0.50"),
        ("top-1 after the same time, recipe / Trainer", top1, "higher"),
        ("share of the default run's time that waits for data", f"{statistics.mean(waits):.1%}", "at most 2 %"),
    ]


def run_to_the_end(run_dir: Path, max_steps: int, eval_every: int) -> list[dict[str, float]]:
    """Run the recipe as a user would; what it logged."""
    execute([*LAUNCH, f"--output_dir={run_dir}", f"--max_steps={max_steps}", f"--eval_every={eval_every}"])
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the highest top-1."""
    return max(runs, key=lambda run: run["eval/top1"])


def measure_input(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """One core from JPEG to crop."""
    found = in_child(read_jpegs, seconds=0.5 if options.seconds else 5.0)
    shown = f"{found['ratio']:.2f} ({found['ours']:,.0f} / {found['theirs']:,.0f})"
    what = f"{JPEG_SIZE[0]}x{JPEG_SIZE[1]} JPEGs to {CROP}x{CROP} crops, images a second of one core, recipe / Pillow"
    return found, [(what, shown, "at least 1.5")]


PARTS = {"speed": measure_speed, "input": measure_input, "quality": measure_quality}


def main() -> None:
    """Measure the parts asked for."""
    options = read_options(__doc__, PARTS, "1e-3,2e-3,4e-3")
    if options.child:
        answer_child(options.child, [prepare, run_trainer, run_recipe, read_jpegs])
        return
    folder = Path(tempfile.mkdtemp(prefix="resnet_benchmark_"))
    facts = in_child(prepare, folder=str(folder))
    measure_parts(README, PARTS, facts, options, folder)


if __name__ == "__main__":
    main()
