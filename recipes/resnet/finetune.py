r"""Fine-tune a ResNet, or any other image classifier, on images of other classes.

Papers: Kornblith et al. 2019 (what is transferred), Kumar et al. 2022 (the head first, then all), Howard and Ruder 2018
(rates by layer). With no arguments it starts from outputs/resnet, learns the nine groups of the embedded emoji, and is
tried on concepts that it has not seen. `recipes/label_efficiency.py` measures what pre-training is worth.

    accelerate launch recipes/resnet/finetune.py
    accelerate launch recipes/resnet/finetune.py --init microsoft/resnet-50 --data me/flowers --image_size 224 \
        --eval_image_size 224 --eval_crop_fraction 0.875
"""

# Shapes: B images of a micro-batch, S side of a crop, C classes.
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place
from shared.fields import Amount, Count, Natural, Positive, Share, ShareAboveZero

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.Images, fields.RunControl):
    """Fields of the method; Images says where the images are, RunControl what every training stage has."""

    output_dir: Place = "outputs/resnet_finetuned"
    log_every: Count = 20
    eval_every: Natural = 100
    save_every: Natural = 200
    num_workers: Natural = 1

    # Data
    data: Place = "sample"
    """sample (groups of emoji), a .parquet or .tar file, a folder of them or of class folders, or a Hub data set id."""
    label_column: str = ""
    """Column of the classes, or of lists of them. "" = the only one whose classes are known, or called label or cls."""
    classes: str = ""  # Numbers of the classes to learn, with commas. "" = all.
    labels_per_class: Natural = 0  # Labels of each class that there are, chosen by the seed. 0 = all.
    balanced_sampling: bool = False  # Draw from all classes equally often, however many images they have.
    image_size: Count = 64  # Side of the random crops, in pixels.
    min_crop_area: ShareAboveZero = 0.5  # Least share of an image's area that a random crop takes.
    mirrored: bool = True  # Mirror half of the crops; not where left and right differ, as in text, signs and scans.
    enlarge: Count = 1  # Times by which crops are enlarged for the model: what it was pre-trained with. 1 = not.

    # Model
    init: Place = "outputs/resnet"
    """Run folder or Hub id of the classifier to start from; its head is new."""
    keep_head: bool = False  # Begin with the head of `init` too, which was tuned on the same classes.
    scratch: bool = False
    """Start from new weights of the sizes of `init`, the baseline that tells what pre-training is worth."""

    # Objective
    label_smoothing: Share = 0.0  # Share of each target that all classes get alike. 0 = none.
    class_weights: bool = False
    """Let an image count by how rare its class is, so that all classes weigh the same; of several labels, let those
    that an image has weigh as much as those that it has not."""

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
    test_split: str = ""
    """Split on which the best model is tried, and which chooses nothing. "" = none; of the sample, unseen concepts."""
    probe: bool = False
    """Say before training how well the model as it is tells classes: by nearest neighbours, and linearly."""
    best_metric: Literal["", "accuracy", "balanced_accuracy", "macro_f1", "auc", "loss"] = ""
    """Metric whose best evaluation is exported; of equal ones that with the least loss. "" = accuracy, of several
    labels auc."""
    patience: Natural = 0  # Evaluations without a better one after which the run ends. 0 = it does not.
    seeds: Count = 1  # Runs, with seeds from `seed` on, whose mean and standard error are told.


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from shared.data.batches import IGNORED, to_device
from shared.data.local_files import usual_name
from shared.data.randomness import derive_seed
from shared.data.updates import load_updates
from shared.images import captioned, files, labelled
from shared.images.bad_images import BadImages
from shared.images.crops import CenterCrops
from shared.images.labelled_updates import GrowingCrops
from shared.metrics import classification
from shared.metrics.classification import Answers, draw_batch
from shared.metrics.probe import linear_probe, nearest_neighbours
from shared.metrics.scores import Accuracy, AreaUnderRoc, BalancedAccuracy, MacroF1, MultiLabelMacroF1
from shared.models import resnet
from shared.models.batch_statistics import RunningStatistics
from shared.models.export import export_model
from shared.models.pretrained import label_numbers, load_encoder, load_errors, load_with_head
from shared.optim import schedules
from shared.optim.layer_rates import layer_groups
from shared.optim.optimizers import clip_and_step, set_learning_rates, state_bytes_per_parameter
from shared.performance import dry_run
from shared.run import summary
from shared.run.best import Best
from shared.run.seeds import each_seed, report_seeds
from shared.run.training_run import Run, start
from shared.runtime.collectives import SHARDED_ENGINES, gather_objects, node_main_first, rank_of
from shared.runtime.signals import until_stopped

NO_CHOICE = "another split than the one that chooses the best model"


class Split(NamedTuple):
    """Images, how metrics call them (eval or test), and the middles of them that are evaluated."""

    name: str
    images: labelled.LabelledImages
    crops: CenterCrops


class Tried(NamedTuple):
    """How a model did on a split: metrics, what it mistakes most often, and of each image the label and the answer."""

    metrics: dict[str, float]
    mistakes: str
    answers: Answers | None  # None where an image can have several labels
    indices: np.ndarray  # of the images
    named: tuple[list[Any], list[Any]]  # their labels and answers, by the names of classes


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    is_other = usual_name(cfg.test_split) != usual_name(cfg.data_split)
    cli.expect(is_other, "test_split", cfg.test_split, "another split than the one to train on")
    evaluates = not cfg.patience or cfg.eval_every > 0
    cli.expect(evaluates, "patience", cfg.patience, "0 where eval_every is 0, since it counts evaluations")
    cli.expect(not (cfg.keep_head and cfg.scratch), "keep_head", True, "False for new weights")
    # Not every image model of the library has such a choice, and the field must not be passed over in silence.
    cli.expect(not cfg.gradient_checkpointing, "gradient_checkpointing", True, "False for these models")


def check_labels(cfg: Config, train: labelled.LabelledImages) -> str:
    """Raise `UsageError` for what does not fit the labels; the metric whose best evaluation is exported."""
    usual = "auc" if train.has_several else "accuracy"
    has_area, has_balance = train.has_several or len(train.class_names) == 2, not train.has_several
    fits = {"auc": has_area, "balanced_accuracy": has_balance}.get(cfg.best_metric, True)
    cli.expect(fits, "best_metric", cfg.best_metric, f"one that these labels have, such as {usual}")
    for field in ("balanced_sampling", "probe"):
        is_one = not (getattr(cfg, field) and train.has_several)
        cli.expect(is_one, field, True, "False for images with several labels")
    return f"eval/{cfg.best_metric or usual}"


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config, accelerator: Any) -> tuple[labelled.LabelledImages, dict[str, labelled.LabelledImages]]:
    """The images to train on, and those of eval and, if there is such a split, of test."""
    data, columns = cfg.data, {"image_column": cfg.image_column, "label_column": cfg.label_column}
    eval_split, test_split = cfg.eval_split, cfg.test_split
    if cfg.data == "sample":
        data, columns["label_column"] = str(captioned.SAMPLE), cfg.label_column or "group"
        eval_split = eval_split or "test_unseen_combination"
        test_split = test_split or ("test_unseen_concept" if eval_split != "test_unseen_concept" else "")
    with node_main_first(accelerator):
        train = labelled.open_images(data, config=cfg.data_config, split=cfg.data_split, **columns)
        labelled.check_classes(data, train.class_names)
        files.check_sides(data, train.files, max(cfg.image_size, cfg.eval_image_size))
        eval_split = eval_split or files.validation_split(data, cfg.data_config, test_split)
        is_free = not test_split or usual_name(test_split) != usual_name(eval_split)
        cli.expect(is_free, "test_split", test_split, NO_CHOICE)
        chosen = {"eval": eval_split, "test": test_split}
        evals = {
            name: labelled.open_images(data, config=cfg.data_config, split=split, **columns, field=f"{name}_split")
            for name, split in chosen.items()
            if split and usual_name(split) != usual_name(cfg.data_split)
        }
    evals = {
        name: labelled.number_alike(
            some, train.class_names, chosen[name], f"{name}_split", has_several=train.has_several
        )
        for name, some in evals.items()
    }
    if cfg.classes:
        evals = {name: labelled.of_classes(some, "classes", cfg.classes) for name, some in evals.items()}
        train = labelled.of_classes(train, "classes", cfg.classes)
    labelled.check_every_class(data, train)
    held_out = {}
    if not eval_split:
        train, held_out["eval"] = labelled.hold_out(train, cfg.eval_fraction)
    if cfg.labels_per_class:
        train = labelled.few_of_each_class(train, cfg.labels_per_class, cfg.seed)
    if eval_split and usual_name(eval_split) == usual_name(cfg.data_split):  # by labels that are to be few as well
        train, held_out["eval"] = labelled.hold_out(train, cfg.eval_fraction)
    return train, {**held_out, **evals}


def open_updates(
    cfg: Config, accelerator: Any, train: labelled.LabelledImages, micro_batch_size: int, step: int
) -> Iterator[tuple[list[dict[str, Tensor]], list[str], None]]:
    """Updates from `step` on: each this process's micro-batches, and the names of bad images."""
    order = {"seed": cfg.seed, "global_batch_size": cfg.global_batch_size, **rank_of(accelerator)}
    cut = {"sizes": [cfg.image_size] * cfg.max_steps, "min_area": cfg.min_crop_area, "mirrored": cfg.mirrored}
    classes = range(len(train.class_names)) if cfg.balanced_sampling else ()
    groups = [np.flatnonzero(train.labels == label) for label in classes]
    crops = GrowingCrops(cfg.data, train, **cut, micro_batch_size=micro_batch_size, order=order, groups=groups)
    return load_updates(crops, range(step, cfg.max_steps), cfg.num_workers, accelerator.device)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def build_model(cfg: Config, train: labelled.LabelledImages) -> Any:
    """The classifier with a new head, in float32; or with new weights."""
    kind = "multi_label_classification" if train.has_several else "single_label_classification"
    head = {**label_numbers(train.class_names), "problem_type": kind}
    with load_errors("init", cfg.init):
        config = transformers.AutoConfig.from_pretrained(cfg.init, trust_remote_code=False, **head)
    is_resnet = config.model_type == "resnet"
    model_class = resnet.ResNetForImageClassification if is_resnet else transformers.AutoModelForImageClassification
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    if cfg.scratch:
        return model_class(config).float() if is_resnet else model_class.from_config(config, dtype=torch.float32)
    if cfg.keep_head:
        return load_with_head(model_class, cfg.init, train.class_names, **head)
    return load_encoder(model_class, cfg.init, **head)


def statistics_of(cfg: Config) -> dict[str, Any]:
    """Mean and deviation of the channels, as the image processor of `init` says; ImageNet's if it has none."""
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(cfg.init, trust_remote_code=False)
        return {"image_mean": list(processor.image_mean), "image_std": list(processor.image_std)}
    except (OSError, ValueError):
        return {"image_mean": list(resnet.MEAN), "image_std": list(resnet.STD)}


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def forward(model: Any, pixels: Tensor, enlarge: int, statistics: dict[str, Any]) -> Tensor:
    """Logits (B, C) for images (B, S, S, 3) from 0 to 255."""
    return model(pixel_values=resnet.normalize(pixels, enlarge, **statistics)).logits


def weights_of_classes(cfg: Config, train: labelled.LabelledImages) -> Tensor:
    """What an image of each class counts, of several labels what those count that it has; float32 (C,)."""
    counts = np.maximum(train.counts, 1)
    rarity = (
        np.maximum(len(train) - train.counts, 1) / counts if train.has_several else len(train) / (len(counts) * counts)
    )
    return torch.tensor(rarity if cfg.class_weights else np.ones(len(counts)), dtype=torch.float32)


def loss_sum(logits: Tensor, labels: Tensor, smoothing: float, weights: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over images, of several labels their mean; -100 is no label."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.ndim == 1:
        options = {"ignore_index": IGNORED, "label_smoothing": smoothing, "reduction": "none"}
        return (cross_entropy(logits, labels, **options) * weights[labels.clamp(min=0)]).sum()
    targets = labels.to(logits.dtype) * (1 - smoothing) + smoothing / 2
    losses = binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
    return (losses * (labels != IGNORED)).mean(1).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(cfg: Config, accelerator: Any, model: Any, split: Split, statistics: dict[str, Any]) -> Tried:
    """Loss (nats, not weighted) and metrics over every image once, under the name of the split."""
    model.eval()
    loss, found = 0.0, []
    share = classification.load_held_out(accelerator, split.crops, cfg.num_workers)
    for batch in until_stopped(accelerator, share):
        logits, labels = forward(model, batch["pixel_values"], 1, statistics).float(), batch["labels"]
        loss += loss_sum(logits, labels, 0.0, torch.ones(logits.shape[1], device=logits.device)).item()
        known = labels.reshape(len(labels), -1)[:, 0] != IGNORED
        likely = logits.softmax(-1) if labels.ndim == 1 else logits.sigmoid()
        found.append([values[known].cpu().numpy() for values in (batch["indices"], labels, likely)])
    model.train()
    gathered = gather_objects(accelerator, (loss, found))
    columns = zip(*(part for _, parts in gathered for part in parts), strict=True)
    indices, labels, likely = (np.concatenate(column) for column in columns)
    order = np.argsort(indices)
    indices, labels, likely = indices[order], labels[order], likely[order]
    measured = {"loss": sum(of_process for of_process, _ in gathered) / len(labels), **scores_of(labels, likely)}
    measured["skipped"] = len(split.images) - len(labels)
    metrics = {f"{split.name}/{name}": value for name, value in measured.items()}
    names = np.array(split.images.class_names)
    if labels.ndim == 2:
        named = tuple([names[row == 1].tolist() for row in rows] for rows in (labels, likely >= 0.5))
        return Tried(metrics, describe_labels(labels, likely >= 0.5, names), None, indices, named)
    answers = Answers(indices, labels, np.argsort(-likely, axis=1, kind="stable")[:, :5].copy(), likely.max(1))
    named = (names[labels].tolist(), names[answers.guesses[:, 0]].tolist())
    return Tried(metrics, answers.describe_confusions(split.images.class_names), answers, indices, named)


def scores_of(labels: np.ndarray, likely: np.ndarray) -> dict[str, float]:
    """Metrics of N images: labels (N,), or (N, C) of 0 and 1; probabilities (N, C)."""
    if labels.ndim == 2:
        both = {"predictions": (likely >= 0.5).astype(int).tolist(), "references": labels.tolist()}
        flat = {name: np.array(rows).ravel() for name, rows in both.items()}
        area = AreaUnderRoc().compute(predictions=likely.tolist(), references=labels.tolist())
        return {**area, "accuracy": Accuracy().compute(**flat)["accuracy"], **MultiLabelMacroF1().compute(**both)}
    both = {"predictions": likely.argmax(1), "references": labels}
    found = {**Accuracy().compute(**both), **BalancedAccuracy().compute(**both), **MacroF1().compute(**both)}
    if likely.shape[1] == 2:
        found |= AreaUnderRoc().compute(predictions=likely[:, 1:].tolist(), references=labels[:, None].tolist())
    return found


def describe_labels(labels: np.ndarray, answers: np.ndarray, names: np.ndarray) -> str:
    """Of each of several labels how often it was found, and how often it was said of images that do not have it."""
    found, wrong = (labels * answers).sum(0), ((1 - labels) * answers).sum(0)
    rows = zip(names.tolist(), found.tolist(), labels.sum(0).tolist(), wrong.tolist(), strict=True)
    return "\n".join(f"{name}: found {hits} of {there}, and wrongly {false} times" for name, hits, there, false in rows)


@torch.no_grad()
def mean_features(
    cfg: Config, accelerator: Any, model: Any, crops: CenterCrops, statistics: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Of every image the mean over the places of the last layer, float32 (N, H), and its class, on every process."""
    model.eval()
    found = []
    for batch in classification.load_held_out(accelerator, crops, cfg.num_workers):
        pixels = resnet.normalize(batch["pixel_values"], 1, **statistics)
        last = model(pixel_values=pixels, output_hidden_states=True).hidden_states[-1].float()
        features = last.mean((2, 3)) if last.ndim == 4 else last.mean(1)  # (B, H, places, places) or (B, places, H)
        known = batch["labels"] != IGNORED
        found.append([values[known].cpu().numpy() for values in (features, batch["labels"])])
    model.train()
    parts = [part for of_process in gather_objects(accelerator, found) for part in of_process]
    features, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return features, labels


def probe(
    cfg: Config, accelerator: Any, model: Any, known: CenterCrops, asked: CenterCrops, statistics: dict[str, Any]
) -> dict[str, float]:
    """Accuracies from frozen features, see `shared/metrics/probe.py`."""
    samples = [*mean_features(cfg, accelerator, model, known, statistics)]
    samples += mean_features(cfg, accelerator, model, asked, statistics)
    return {"knn_accuracy": nearest_neighbours(*samples), "linear_probe_accuracy": linear_probe(*samples)}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW, with a rate of its own for each block."""
    groups = layer_groups(model, cfg.learning_rate, cfg.layer_decay, cfg.weight_decay)
    has_blocks = max(group["depth"] for group in groups) > 0 or not cfg.head_steps
    cli.expect(has_blocks, "head_steps", cfg.head_steps, "0 for a model whose blocks are not known")
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.999), fused=True)


def set_rates(cfg: Config, optimizer: Any, step: int) -> float:
    """Set the rates of update `step`, in the first ones of the head alone; the share of its peak that the head has."""
    factor = schedules.warmup_cosine(step, cfg.max_steps, cfg.warmup_steps)
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
) -> tuple[Tensor, Tensor]:
    """One optimizer update: its mean loss (nats) over all processes and micro-batches, and its gradient norm."""
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    losses = []
    running.begin_update()
    for batch in batches:
        with accelerator.accumulate(model):
            logits = forward(model, batch["pixel_values"], cfg.enlarge, statistics)
            loss = loss_sum(logits, batch["labels"], cfg.label_smoothing, weights)
            accelerator.backward(loss * scale)
        running.add_micro_batch()
        losses.append(loss.detach())
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    running.end_update(accelerator, grad_norm)
    return accelerator.reduce(torch.stack(losses).sum(), "sum") / cfg.global_batch_size, grad_norm


def prepare(cfg: Config, accelerator: Any, train: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Model and optimizer as the engine takes them, and what is said of them at the start."""
    model = build_model(cfg, train)
    facts = describe(cfg, accelerator, model, train)
    accelerator.print(summary.table(facts))
    if accelerator.distributed_type.value not in SHARDED_ENGINES:  # which cut weights into flat parts
        model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile(dynamic=False)
    return *accelerator.prepare(model, build_optimizer(cfg, model)), facts


def main(cfg: Config) -> None:
    """Train, evaluate, and leave the best model as `from_pretrained` and `pipeline` load it."""
    check_config(cfg)
    accelerator, micro_batch_size = start(cfg)
    train, evals = open_data(cfg, accelerator)
    metric = check_labels(cfg, train)
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, micro_batch_size)
        return
    model, optimizer, facts = prepare(cfg, accelerator, train)
    running, statistics = RunningStatistics(model), statistics_of(cfg)
    weights = weights_of_classes(cfg, train).to(accelerator.device)
    crop = (cfg.enlarge * cfg.eval_image_size, cfg.eval_crop_fraction)
    splits = {name: Split(name, some, CenterCrops(some, *crop, micro_batch_size)) for name, some in evals.items()}
    held_out, test = splits["eval"], splits.get("test")
    if cfg.probe:
        pair = (CenterCrops(train, *crop, micro_batch_size), (test or held_out).crops)
        facts |= (probed := probe(cfg, accelerator, model, *pair, statistics))
        accelerator.print(summary.table(probed))

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best, (due, metrics) = Best(metric, run.state), run.owed
    run.is_over = best.has_waited(cfg.patience)
    bad = BadImages(accelerator, len(train), cfg.max_bad_fraction, run.state.get("bad_images", []))
    updates = open_updates(cfg, accelerator, train, micro_batch_size, run.step)
    processor = resnet.build_processor(*crop, **statistics)
    fingerprints = [some.fingerprint for some in (train, *evals.values())]
    run.record(Path(__file__), {"data": cfg.data, "data_fingerprint": fingerprints, "init": cfg.init, **facts})
    model.train()
    for step, update in run.updates(updates, facts["flops_per_image"]):
        if update:  # else the evaluation alone is left, which a signal had ended
            batches, undecoded, _ = update
            factor = set_rates(cfg, optimizer, step)
            batches = [to_device(batch, accelerator.device) for batch in batches]
            loss, grad_norm = train_update(cfg, accelerator, model, optimizer, running, batches, statistics, weights)
            bad.add(undecoded)

            due = run.count_update(grad_norm, samples=cfg.global_batch_size, units=cfg.global_batch_size)
            metrics = {}
            if due.log:
                metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
                metrics |= {"train/grad_norm": grad_norm.item(), "train/bad_images": bad.number()}
                metrics |= run.rates("images")
        if due.evaluate:
            with run.evaluation(metrics):
                tried = evaluate(cfg, accelerator, model, held_out, statistics)
                metrics |= tried.metrics
                run.write_samples(tried.mistakes)
                if best.is_better(run.step, tried.metrics, tried.mistakes):
                    export_model(accelerator, model, processor, run.folder)
                    draw_answers(accelerator, tried, held_out, run.folder)
                    tried = evaluate(cfg, accelerator, model, test, statistics) if test else tried
                    metrics |= tried.metrics
                    best.metrics |= tried.metrics
                    images = (test or held_out).images.files
                    run.write_predictions(map(images.name, tried.indices.tolist()), *tried.named)
                run.is_over = best.has_waited(cfg.patience)
        with run.pause():
            run.write(metrics)
            if due.save or bad.are_too_many or run.is_over:
                run.save({"bad_images": bad.gather(), **best.state()})
            if due.push and best.step:  # before the first evaluation there is no model to push
                run.push()
        bad.check()

    cli.expect(best.step > 0, "best_metric", metric, "a finite value of it once; there is no model to export")
    results = {"training_flops": facts["flops_per_image"] * cfg.global_batch_size * run.step, "best_step": best.step}
    figures = {} if train.has_several else classification.drawn_figures(len(train.class_names))
    card = {"samples": best.samples, "figures": figures, "evaluation": best.metrics}
    run.finish("image-classification", classification.USAGE, results=results, **card)


def draw_answers(accelerator: Any, tried: Tried, split: Split, folder: Path) -> None:
    """The confusion matrix and the surest mistakes of the model that was exported; the main process draws."""
    if accelerator.is_main_process and tried.answers:
        classification.draw_answers(tried.answers, split.images.class_names, split.crops, folder / "figures")


def describe(cfg: Config, accelerator: Any, model: Any, train: Any) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    side = cfg.enlarge * cfg.image_size
    return summary.describe_classifier(accelerator, model, side, train.num_images, cfg.global_batch_size)


def report_costs(cfg: Config, accelerator: Any, train: Any, micro_batch_size: int) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    (first, *_), *_ = next(open_updates(replace(cfg, num_workers=0), accelerator, train, micro_batch_size, 0))
    batch, seconds = to_device(first, accelerator.device), None
    labels = batch["labels"].float() if train.has_several else batch["labels"]
    inputs = {"pixel_values": resnet.normalize(batch["pixel_values"], cfg.enlarge), "labels": labels}
    with dry_run.without_memory():
        model = build_model(cfg, train)
        facts = describe(cfg, accelerator, model, train)
        costs = dry_run.costs(accelerator, model, inputs, state_bytes_per_parameter(build_optimizer(cfg, model)))
    if dry_run.can_time(accelerator, facts["flops_per_image"] * micro_batch_size, costs["memory: total"]):
        model = build_model(cfg, train)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    accelerator.print(summary.table(rows))
    if accelerator.is_main_process:
        accelerator.print(f"training images as the model sees them: {draw_batch(first, train.class_names)}")


if __name__ == "__main__":
    with cli.exit_codes():
        for config in each_seed(CONFIG, CONFIG.seeds):
            main(config)
        report_seeds(CONFIG, CONFIG.seeds)
