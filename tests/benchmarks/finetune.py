"""Measure recipes/bert/finetune.py and recipes/resnet/finetune.py against `transformers.Trainer`.

    python tests/benchmarks/finetune.py --family bert      # a quarter of an hour on two quiet cores
    python tests/benchmarks/finetune.py --family resnet
    python tests/benchmarks/finetune.py --seconds 5        # whether it runs; such numbers mean nothing

Rules:
* Both start from the same run folder, outputs/bert or outputs/resnet, with the library's class, a new head, the same
  batch, updates, peak rate, linear or cosine fall, weight decay and dropout, fused AdamW and all cores.
* BERT, supersenses: the Trainer gets tokenised texts and `DataCollatorWithPadding`, which pads a batch to its longest
  text, and its own sampler; in a row of its own it pads to 128, the default of the library's example. Texts a second.
* ResNet, the embedded emoji's groups: the Trainer gets the embedded Parquet file, whose images the library's image
  processor makes ready as they are asked for; it runs with no data worker and with one, and the faster counts.
* Speed is from the end of the fifth update on; both sides in turns, the median of three.
* Score is accuracy on the test split after the default number of updates, of three seeds on each side; the interval of
  the difference is Student's.
"""

import argparse
import os
import statistics
import tempfile
import time
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
    say,
    speed,
    update_times,
)

NO_PAUSES = ["--eval_every=0", "--save_every=0"]
EVALUATED = {"bert": ["--eval_split=test"], "resnet": ["--eval_split=test_unseen_concept", "--data_split=train"]}
DATA = {
    "bert": ["--init=outputs/bert", "--data=shared/samples/supersenses"],
    "resnet": ["--init=outputs/resnet", "--data=shared/samples/emoji", "--label_column=group"],
}
SEEDS = 3


def recipe_of(family: str) -> Path:
    """The program that is measured."""
    return ROOT / "recipes" / family / "finetune.py"


# ----------------------------------------------------------------------------------------------------------------------
# In child processes; imports are late, so that each side has its own.


def prepare(family: str, folder: str) -> dict[str, Any]:
    """What the other parts need."""
    import json

    _, cfg = load_recipe(recipe_of(family), DATA[family])
    from shared.run.folder import hardware

    record = json.loads((Path(cfg.init) / "run.json").read_text())
    return {"max_steps": cfg.max_steps, "parameters": record["parameters"], "hardware": hardware()}


def run_recipe(family: str, flags: list[str], updates: int) -> dict[str, Any]:
    """Run the recipe's own `main()`, to its end where `updates` is 0; its speed, or its score."""
    import json

    recipe, cfg = load_recipe(recipe_of(family), flags)
    rates = speed(update_times(recipe, cfg, updates))
    if updates:
        return rates
    record = json.loads((Path(cfg.output_dir) / "run.json").read_text())
    return {**rates, "accuracy": record["evaluation"]["eval/accuracy"]}


def run_trainer(family: str, flags: list[str], updates: int, workers: int, pad_to: int) -> dict[str, Any]:
    """Tune the same model with `transformers.Trainer`, to the end where `updates` is 0; speed, and at the end score."""
    import accelerate
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe, cfg = load_recipe(recipe_of(family), flags)
    from shared.models.pretrained import load_encoder

    class Clock(transformers.TrainerCallback):
        times: list[float]

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.times = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.times.append(time.perf_counter())

    transformers.set_seed(cfg.seed)
    if family == "bert":
        _, train, evals = recipe.open_data(cfg)
        tokenizer = recipe.open_tokenizer(cfg, "classes")
        sets = [
            [
                {**tokenizer(text, truncation=True, max_length=cfg.seq_length), "label": int(label)}
                for text, label in zip(texts.texts, texts.labels, strict=True)
            ]
            for texts in (train, evals["eval"])
        ]
        padding = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
        collator: Any = transformers.DataCollatorWithPadding(tokenizer, **padding)
        own = recipe.build_model(cfg, "classes", train.class_names, tokenizer)
        network = type(own).from_pretrained(cfg.init, **recipe.label_numbers(train.class_names))
        schedule = "linear"
    else:
        train, evals = recipe.open_data(cfg, accelerate.Accelerator(cpu=True))
        processor = recipe.resnet.build_processor(cfg.image_size, 1.0, **recipe.statistics_of(cfg))
        sets = [with_processor(images, processor) for images in (train, evals["eval"])]
        names = recipe.label_numbers(train.class_names)
        network = load_encoder(transformers.AutoModelForImageClassification, cfg.init, **names)
        collator, schedule = transformers.default_data_collator, "cosine"
    clock = Clock()
    trainer = transformers.Trainer(
        model=network,
        args=transformers.TrainingArguments(
            output_dir=cfg.output_dir,
            max_steps=updates or cfg.max_steps,
            per_device_train_batch_size=cfg.global_batch_size,
            per_device_eval_batch_size=cfg.global_batch_size,
            dataloader_num_workers=workers,
            optim="adamw_torch_fused",
            learning_rate=recipe.learning_rate_of(cfg) if family == "bert" else cfg.learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=cfg.warmup_steps,
            weight_decay=cfg.weight_decay,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            seed=cfg.seed,
        ),
        train_dataset=sets[0],
        data_collator=collator,
        callbacks=[clock],
    )
    trainer.train()
    result = {**speed(clock.times), "workers": workers}
    if not updates:
        predicted = trainer.predict(sets[1])
        result["accuracy"] = float(np.mean(predicted.predictions.argmax(-1) == predicted.label_ids))
    return result


def with_processor(images: Any, processor: Any) -> Any:
    """A data set of `datasets` that makes its images ready as they are asked for."""
    import datasets

    files = images.files
    table = files.dataset.select(files.indices).cast_column(files.image_column, datasets.Image())
    table = table.add_column("labels", images.labels.tolist())

    def process(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pictures = [image.convert("RGB") for image in batch[files.image_column]]
        return {**processor(pictures, return_tensors="pt"), "labels": batch["labels"]}

    return table.with_transform(process)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def measure_speed(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Samples a second on both sides, in turns."""
    family, turns = options.family, []
    others = [
        {"workers": 0, "pad_to": 0},
        {"workers": 0, "pad_to": 128} if family == "bert" else {"workers": 1, "pad_to": 0},
    ]
    for turn in range(3):
        flags = [*DATA[family], *EVALUATED[family], *NO_PAUSES]
        if not turns:
            trial = [*flags, f"--output_dir={folder / 'trial'}"]
            seconds = in_child(run_recipe, family=family, flags=trial, updates=2 * WARM_UPDATES)["seconds_per_update"]
            updates = WARM_UPDATES + max(5, round((options.seconds or 30) / seconds))
        flags += [f"--output_dir={folder / f'speed_{turn}'}"]
        ours = in_child(run_recipe, family=family, flags=flags, updates=updates)
        theirs = [in_child(run_trainer, family=family, flags=flags, updates=updates, **other) for other in others]
        turns.append((ours, *theirs))
    seconds = [[run["seconds_per_update"] for run in turn] for turn in turns]
    batch = load_recipe(recipe_of(family), [])[1].global_batch_size
    rows: list[Row] = []
    if family == "bert":
        for place, name in ((1, "padding each batch to its longest text"), (2, "padding to 128 tokens")):
            ratio = statistics.median(turn[place] / turn[0] for turn in seconds)
            rates = [statistics.median(batch / turn[side] for turn in seconds) for side in (0, place)]
            goal = "at least 1.5" if place == 1 else "none set"
            rows.append(
                (
                    f"fine-tuning, texts a second, recipe / Trainer {name}",
                    f"{ratio:.2f} ({rates[0]:,.0f} / {rates[1]:,.0f})",
                    goal,
                )
            )
    else:
        ratio = statistics.median(min(turn[1:]) / turn[0] for turn in seconds)
        rates = [
            statistics.median(batch / turn[0] for turn in seconds),
            statistics.median(batch / min(turn[1:]) for turn in seconds),
        ]
        rows.append(
            (
                "fine-tuning, images a second, recipe / Trainer",
                f"{ratio:.2f} ({rates[0]:,.0f} / {rates[1]:,.0f})",
                "at least 1.0",
            )
        )
    return {"turns": turns}, rows


def measure_score(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Accuracy on the test split after the default number of updates."""
    load_recipe(recipe_of(options.family), [])  # finds shared
    from shared.metrics.transfer import t_interval

    scores: dict[str, list[float]] = {"ours": [], "theirs": []}
    for seed in range(SEEDS):
        flags = [*DATA[options.family], *EVALUATED[options.family], *NO_PAUSES, f"--seed={seed}"]
        flags += [
            f"--output_dir={folder / f'score_{seed}'}",
            *([f"--max_steps={2 * WARM_UPDATES}"] if options.seconds else []),
        ]
        common = {"family": options.family, "flags": flags, "updates": 0}
        scores["ours"].append(in_child(run_recipe, **common)["accuracy"])
        scores["theirs"].append(in_child(run_trainer, **common, workers=0, pad_to=0)["accuracy"])
        say(f"seed {seed}: {scores}")
    gain = t_interval([one - other for one, other in zip(scores["ours"], scores["theirs"], strict=True)])
    means = " / ".join(f"{statistics.mean(values):.3f}" for values in scores.values())
    shown = f"{means}, difference {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    return scores, [
        (
            f"fine-tuning, accuracy on the test split, recipe / Trainer, {SEEDS} seeds",
            shown,
            "0 in the interval, or more",
        )
    ]


PARTS = {"speed": measure_speed, "score": measure_score}


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="bert", choices=["bert", "resnet"], help="default: %(default)s")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure, with commas; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.0, help="training seconds of a run, to try this out")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        answer_child(options.child, [prepare, run_trainer, run_recipe])
        return
    folder = Path(tempfile.mkdtemp(prefix="finetune_benchmark_"))
    facts = in_child(prepare, family=options.family, folder=str(folder))
    measure_parts(recipe_of(options.family).with_name("README.md"), PARTS, facts, options, folder)


if __name__ == "__main__":
    main()
