r"""Fine-tune a ResNet, or any other image classifier, on images of other classes.

Papers: Kornblith et al. 2019 (what is transferred), Kumar et al. 2022 (the head first, then all), Howard and Ruder 2018
(rates by layer). With no arguments it starts from outputs/resnet and tells the eight groups of the embedded emoji
apart, of concepts that it has not seen. recipes/resnet/README.md has what pre-training is worth there.

    accelerate launch recipes/resnet/finetune.py
    accelerate launch recipes/resnet/finetune.py --init microsoft/resnet-50 --data me/flowers --image_size 224 \
        --eval_image_size 224 --eval_crop_fraction 0.875
"""

# Shapes: B images of a micro-batch, S side of a crop, C classes.
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.fields import Amount, Count, Natural, Positive, Share, ShareAboveZero

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.Images, fields.RunControl):
    """Fields of the method; Images says where the images are, RunControl what every training stage has."""

    output_dir: str = "outputs/resnet_finetuned"
    log_every: Count = 20
    eval_every: Natural = 100
    save_every: Natural = 200
    num_workers: Natural = 1

    # Data
    data: str = "sample"
    """sample (groups of emoji), a .parquet or .tar file, a folder of them or of class folders, or a Hub data set id."""
    label_column: str = ""
    """Column of the classes. "" = the only one with a list of classes, or the one called label or cls."""
    labels_per_class: Natural = 0  # Images of each class to train on, chosen by the seed. 0 = all.
    image_size: Count = 64  # Side of the random crops, in pixels.
    min_crop_area: ShareAboveZero = 0.5  # Least share of an image's area that a random crop takes.

    # Model
    init: str = "outputs/resnet"
    """Run folder or Hub id of the classifier to start from; its head is new where the classes are not as many."""
    scratch: bool = False
    """Start from new weights of the sizes of `init`, the baseline that tells what pre-training is worth."""

    # Objective
    label_smoothing: Share = 0.0  # Share of each target that all classes get alike. 0 = none.
    class_weights: bool = False
    """Let an image count by how rare its class is, so that all classes together weigh the same."""

    # Optimization
    global_batch_size: Count = 64  # Images of one update, over all processes and micro-batches.
    per_device_batch_size: Natural = 0
    """Images of one micro-batch on one process, which batch normalisation sees. 0 = the process's whole share."""
    max_steps: Count = 600
    max_grad_norm: Amount = 1.0
    learning_rate: Positive = 1e-3  # Peak rate of AdamW.
    layer_decay: ShareAboveZero = 1.0  # Share of the next block's rate that a block has. 1 = one rate for all.
    head_steps: Natural = 0  # Updates at the beginning in which the head alone learns. 0 = none.
    weight_decay: Amount = 0.05  # Decoupled weight decay of all but biases and norms. 0 = none.
    warmup_steps: Natural = 50  # Updates over which the rate rises linearly; then it falls to 0 as a cosine.

    # Evaluation
    eval_image_size: Count = 64  # Side of the middle crop that is evaluated, in pixels.
    eval_crop_fraction: ShareAboveZero = 1.0
    """Share of the shorter side that this crop keeps; 0.875 is usual for photographs."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from shared.data.batches import IGNORED, to_device
from shared.data.randomness import derive_seed
from shared.data.updates import load_updates
from shared.images import captioned, labelled
from shared.images.bad_images import BadImages
from shared.images.crops import CenterCrops
from shared.images.labelled_updates import GrowingCrops
from shared.metrics import classification
from shared.metrics.classification import Answers, draw_batch
from shared.metrics.scores import BalancedAccuracy, MacroF1
from shared.models import resnet
from shared.models.batch_statistics import RunningStatistics
from shared.models.export import export_model
from shared.models.pretrained import label_numbers, load_encoder, load_errors
from shared.optim import schedules
from shared.optim.layer_rates import layer_groups
from shared.optim.optimizers import clip_and_step, set_learning_rates, state_bytes_per_parameter
from shared.performance import dry_run
from shared.run import summary
from shared.run.best import Best
from shared.run.training_run import Run, start
from shared.runtime.collectives import SHARDED_ENGINES, node_main_first, rank_of

METRIC = "eval/accuracy"  # whose best evaluation is exported


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    # Not every image model of the library has such a choice, and the field must not be passed over in silence.
    cli.expect(not cfg.gradient_checkpointing, "gradient_checkpointing", True, "False for these models")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config, accelerator: Any) -> tuple[labelled.LabelledImages, labelled.LabelledImages]:
    """The images to train on and those to evaluate on."""
    source, label_column = cfg, cfg.label_column
    if cfg.data == "sample":
        source = replace(cfg, data=str(captioned.SAMPLE), eval_split=cfg.eval_split or "test_unseen_concept")
        label_column = label_column or "group"
    with node_main_first(accelerator):
        largest = max(cfg.image_size, cfg.eval_image_size)
        train, held_out = labelled.open_splits(source, label_column, largest=largest)
    return (
        labelled.few_of_each_class(train, cfg.labels_per_class, cfg.seed) if cfg.labels_per_class else train
    ), held_out


def open_updates(
    cfg: Config, accelerator: Any, train: labelled.LabelledImages, micro_batch_size: int, step: int
) -> Iterator[tuple[list[dict[str, Tensor]], list[str], None]]:
    """Updates from `step` on: each this process's micro-batches, and the names of bad images."""
    order = {"seed": cfg.seed, "global_batch_size": cfg.global_batch_size, **rank_of(accelerator)}
    cut = {"sizes": [cfg.image_size] * cfg.max_steps, "min_area": cfg.min_crop_area}
    crops = GrowingCrops(cfg.data, train, **cut, micro_batch_size=micro_batch_size, order=order)
    return load_updates(crops, range(step, cfg.max_steps), cfg.num_workers, accelerator.device)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def build_model(cfg: Config, class_names: tuple[str, ...]) -> Any:
    """The classifier with a new head, in float32; or with new weights."""
    with load_errors("init", cfg.init):
        config = transformers.AutoConfig.from_pretrained(
            cfg.init, trust_remote_code=False, **label_numbers(class_names)
        )
    is_resnet = config.model_type == "resnet"
    model_class = resnet.ResNetForImageClassification if is_resnet else transformers.AutoModelForImageClassification
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    if cfg.scratch:
        return model_class(config) if is_resnet else model_class.from_config(config)
    return load_encoder(model_class, cfg.init, **label_numbers(class_names))


def statistics_of(cfg: Config) -> dict[str, Any]:
    """Mean and deviation of the channels, as the image processor of `init` says; ImageNet's if it has none."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(cfg.init, trust_remote_code=False)
        return {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
    except (OSError, ValueError):
        return {"image_mean": list(resnet.MEAN), "image_std": list(resnet.STD)}


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def forward(model: Any, pixels: Tensor, statistics: dict[str, Any]) -> Tensor:
    """Logits (B, C) for images (B, S, S, 3) from 0 to 255."""
    mean, std = (
        torch.tensor(statistics[f"image_{name}"], device=pixels.device)[:, None, None] for name in ("mean", "std")
    )
    return model(pixel_values=(pixels.permute(0, 3, 1, 2).to(torch.float32) / 255 - mean) / std).logits


def weights_of_classes(cfg: Config, train: labelled.LabelledImages) -> Tensor:
    """What an image of each class counts, float32 (C,); the mean over images is 1."""
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    weights = len(train) / (len(counts) * np.maximum(counts, 1)) if cfg.class_weights else np.ones(len(counts))
    return torch.tensor(weights, dtype=torch.float32)


def loss_sum(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor) -> Tensor:
    """Cross-entropy in nats, summed, each image by the weight of its class; -100 is no label."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    options = {"ignore_index": IGNORED, "label_smoothing": smoothing, "reduction": "none"}
    return (cross_entropy(logits, labels, **options) * weights[labels.clamp(min=0)]).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    cfg: Config, accelerator: Any, model: Any, crops: CenterCrops, statistics: dict[str, Any]
) -> tuple[dict[str, float], Answers]:
    """Loss (nats, not weighted) and metrics over every image once, and the answer to each."""
    model.eval()
    nll, found = 0.0, []
    for batch in classification.load_held_out(accelerator, crops, cfg.num_workers):
        logits = forward(model, batch["pixel_values"], statistics)
        nll += cross_entropy(logits.float(), batch["labels"], ignore_index=IGNORED, reduction="sum").item()
        found.append(classification.answers_of(logits.float().softmax(-1), batch))
    model.train()
    metrics, answers = classification.gather_answers(accelerator, found, nll, crops.num_images)
    pairs = {"predictions": answers.guesses[:, 0], "references": answers.labels}
    own = {
        "eval/loss": metrics["eval/loss"],
        "eval/accuracy": metrics["eval/top1"],
        "eval/skipped": metrics["eval/skipped"],
    }
    return own | {
        "eval/balanced_accuracy": BalancedAccuracy().compute(**pairs)["balanced_accuracy"],
        "eval/macro_f1": MacroF1().compute(**pairs)["macro_f1"],
    }, answers


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW, with a rate of its own for each block."""
    groups = layer_groups(model, cfg.learning_rate, cfg.layer_decay, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.999), fused=True)


def set_rates(cfg: Config, optimizer: Any, step: int) -> float:
    """Set the rates of update `step`, in the first ones of the head alone; the share of its peak that the head has."""
    factor = schedules.warmup_cosine(step, cfg.max_steps, cfg.warmup_steps, final_fraction=0.0)
    set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
    head = max(group["depth"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        if step < cfg.head_steps and group["depth"] < head:
            group["lr"] = 0.0
    return factor


def train_update(
    cfg: Config,
    accelerator: Any,
    model: Any,
    optimizer: Any,
    running: RunningStatistics,
    batches: list[Any],
    statistics: dict[str, Any],
    weights: Tensor,
) -> tuple[Tensor, float]:
    """One optimizer update: its mean loss (nats) over all processes and micro-batches, and its gradient norm."""
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    losses = []
    running.begin_update()
    for batch in batches:
        with accelerator.accumulate(model):
            logits = forward(model, batch["pixel_values"], statistics)
            loss = loss_sum(logits, batch["labels"], cfg.label_smoothing, weights)
            accelerator.backward(loss * scale)
        losses.append(loss.detach())
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    running.end_update(accelerator, grad_norm)
    return accelerator.reduce(torch.stack(losses).sum(), "sum") / cfg.global_batch_size, grad_norm


def main(cfg: Config) -> None:
    """Train, evaluate, and leave the best model as `from_pretrained` and `pipeline` load it."""
    check_config(cfg)
    accelerator, micro_batch_size = start(cfg)
    train, held_out = open_data(cfg, accelerator)
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, micro_batch_size)
        return
    model = build_model(cfg, train.class_names)
    facts = describe(cfg, accelerator, model, train)
    accelerator.print(summary.table(facts))
    if accelerator.distributed_type.value not in SHARDED_ENGINES:  # which cut weights into flat parts
        model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))
    running, statistics = RunningStatistics(model), statistics_of(cfg)
    weights = weights_of_classes(cfg, train).to(accelerator.device)

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best = Best(METRIC, run.state)
    bad = BadImages(accelerator, len(train), cfg.max_bad_fraction, run.state.get("bad_images", []))
    updates = open_updates(cfg, accelerator, train, micro_batch_size, run.step)
    crops = CenterCrops(held_out, cfg.eval_image_size, cfg.eval_crop_fraction, micro_batch_size)
    processor = resnet.build_processor(cfg.eval_image_size, cfg.eval_crop_fraction, **statistics)
    data = {"data": cfg.data, "data_fingerprint": [train.fingerprint, held_out.fingerprint], "init": cfg.init}
    run.record(Path(__file__), {**data, **facts})
    model.train()
    for step, (batches, undecoded, _) in run.updates(updates, facts["flops_per_image"]):
        factor = set_rates(cfg, optimizer, step)
        batches = [to_device(batch, accelerator.device) for batch in batches]
        loss, grad_norm = train_update(cfg, accelerator, model, optimizer, running, batches, statistics, weights)
        bad.add(undecoded)

        due = run.count_update(grad_norm, samples=cfg.global_batch_size, units=cfg.global_batch_size)
        metrics = {}
        if due.log:
            metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
            metrics |= {"train/grad_norm": grad_norm, "train/bad_images": bad.number(), **run.rates("images")}
        with run.pause():
            if due.evaluate:
                found, answers = evaluate(cfg, accelerator, model, crops, statistics)
                metrics |= found
                shown = answers.describe_confusions(train.class_names)
                run.write_samples(shown)
                if best.is_better(run.step, found, shown):
                    export_model(accelerator, model, processor, run.folder)
                    draw_answers(accelerator, answers, train, crops, run.folder)
            run.write(metrics)
            if due.save or bad.are_too_many:
                run.save({"bad_images": bad.gather(), **best.state()})
            if due.push and best.step:  # before the first evaluation there is no model to push
                run.push()
        bad.check()

    results = {"training_flops": facts["flops_per_image"] * cfg.global_batch_size * run.step, "best_step": best.step}
    card = {"samples": best.samples, "figures": classification.FIGURES, "evaluation": best.metrics}
    run.finish("image-classification", classification.USAGE, results=results, **card)


def draw_answers(
    accelerator: Any, answers: Answers, train: labelled.LabelledImages, crops: CenterCrops, folder: Path
) -> None:
    """The confusion matrix and the surest mistakes of the model that was exported; the main process draws."""
    if accelerator.is_main_process:
        classification.draw_answers(answers, train.class_names, crops, folder / "figures")


def describe(cfg: Config, accelerator: Any, model: Any, train: Any) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    return summary.describe_classifier(accelerator, model, cfg.image_size, train.num_images, cfg.global_batch_size)


def report_costs(cfg: Config, accelerator: Any, train: Any, micro_batch_size: int) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    (first, *_), *_ = next(open_updates(replace(cfg, num_workers=0), accelerator, train, micro_batch_size, 0))
    batch, seconds = to_device(first, accelerator.device), None
    inputs = {"pixel_values": resnet.normalize(batch["pixel_values"], enlarge=1), "labels": batch["labels"]}
    with dry_run.without_memory():
        model = build_model(cfg, train.class_names)
        facts = describe(cfg, accelerator, model, train)
        costs = dry_run.costs(accelerator, model, inputs, state_bytes_per_parameter(build_optimizer(cfg, model)))
    if dry_run.can_time(accelerator, facts["flops_per_image"] * micro_batch_size, costs["memory: total"]):
        model = build_model(cfg, train.class_names)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    accelerator.print(summary.table(rows))
    if accelerator.is_main_process:
        accelerator.print(f"training images as the model sees them: {draw_batch(first, train.class_names)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
