r"""Train a ResNet on labelled images with the short recipe: SGD, label smoothing, growing images.

Papers: He et al. 2016 (ResNet), Goyal et al. 2017 (large batches), Szegedy et al. 2016 (random crops, label smoothing),
He et al. 2019 (bag of tricks), Touvron et al. 2019 (test larger than trained), Leclerc et al. 2023 (FFCV, whose runs of
16 to 88 epochs the configs follow). With no arguments it trains on the embedded photographs on two CPU cores in
minutes; recipes/resnet/README.md has the measured results and what differs from the papers.

    accelerate launch recipes/resnet/pretrain.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/resnet/pretrain.py \
        --config recipes/resnet/configs/resnet50_16_epochs.yaml
"""

# Shapes: B images of a micro-batch, S side of an image, C classes.
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place
from shared.fields import Amount, Count, Natural, RateOfNewWeights, Share, ShareAboveZero

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.Images, fields.HeldOut, fields.RunControl):
    """Fields of the method; Images and HeldOut say where the images are, RunControl what every training stage has."""

    output_dir: Place = "outputs/resnet"
    log_every: Count = 20
    eval_every: Natural = 500
    save_every: Natural = 500
    num_workers: Natural = 1

    # Data
    data: Place = (
        "sample"  # sample, a .parquet or .tar file, a folder of them or of class folders, or a Hub data set id.
    )
    streaming: bool = False
    """Read images as they arrive, in one data worker, instead of storing the data set; see the README."""
    label_column: str = ""
    """Column of the classes. "" = the only one with a list of classes, or the one called label or cls."""
    classes: str = ""  # Numbers of the classes to learn, with commas. "" = all.
    image_size: Count = 20  # Side of the crops at the start, in pixels.
    final_image_size: Count = 28  # Side of the crops from grow_until on.
    grow_from: Share = 0.0  # Share of the updates after which the crops begin to grow, linearly.
    grow_until: ShareAboveZero = 0.8  # Share of the updates after which the crops have their final size.
    size_multiple: Count = 4  # The side of the crops is rounded to a multiple of this.
    min_crop_area: ShareAboveZero = 0.8  # Least share of an image's area that a random crop takes.
    mirrored: bool = True  # Mirror half of the crops; not where left and right differ, as in text, signs and scans.
    enlarge: Natural = 0
    """Times by which crops are enlarged for the model, whose stem leaves a quarter of each side. 1 = not. 0 = 2 for the
    sample, whose images are small, else 1."""

    # Model
    layer_type: Literal["basic", "bottleneck"] = "basic"
    """Blocks of two 3x3 convolutions (ResNet-18 and 34), or of 1x1, 3x3, 1x1 (50, 101, 152)."""
    depths: str = "1,1,1"  # Blocks of each stage; the later stages halve the sides.
    hidden_sizes: str = "32,64,128"  # Channels after each stage.
    embedding_size: Count = 32  # Channels after the stem.
    zero_init_residual: bool = True
    """Let blocks of a new model begin as their shortcuts (Goyal et al. 2017, section 5.1)."""
    init: Place = "scratch"
    """scratch, or a run folder or Hub id to start from: its weights; with other classes its head is new."""

    # Objective
    label_smoothing: Share = 0.1  # Share of the target that all classes get alike. 0 = none.

    # Optimization
    global_batch_size: Count = 128  # Images of one update, over all processes and micro-batches.
    per_device_batch_size: Natural = 0
    """Images of one micro-batch on one process, which batch normalisation sees. 0 = the process's whole share."""
    max_steps: Count = 3000
    learning_rate: RateOfNewWeights = 0.5  # Peak rate.
    momentum: Share = 0.9  # Of SGD. 0 = none.
    nesterov: bool = True  # Take Nesterov's momentum instead of the plain one.
    weight_decay: Amount = 5e-4  # L2 penalty of convolutions and the head, not of norms and biases. 0 = none.
    max_grad_norm: Amount = 0.0
    warmup_steps: Natural = 100  # Updates over which the rate rises linearly; then it falls to 0.
    schedule: Literal["cosine", "linear"] = "cosine"  # How it falls.
    ema_decay: Share = 0.998
    """Share of the old average that an update keeps; the averaged weights are evaluated and saved. 0 = no average."""

    # Evaluation
    eval_image_size: Count = 28  # Side of the middle crop that is evaluated, in pixels.
    eval_crop_fraction: ShareAboveZero = 1.0
    """Share of the shorter side that this crop keeps; 0.875 is usual for ImageNet."""
    best_metric: Literal["", "loss", "top1", "top5"] = ""
    """Metric whose best evaluation is kept too, in best/ of the run folder. "" = the last model alone."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from shared.data.batches import IGNORED, to_device
from shared.data.randomness import derive_seed
from shared.data.subsets import fixed_choice
from shared.data.updates import load_updates
from shared.images import labelled, streaming
from shared.images.bad_images import BadImages
from shared.images.crops import CenterCrops
from shared.images.labelled_updates import GrowingCrops, StreamedGrowingCrops
from shared.metrics import classification
from shared.metrics.classification import Answers, draw_batch
from shared.models import resnet
from shared.models.averaged_weights import AveragedWeights
from shared.models.batch_statistics import RunningStatistics
from shared.models.export import export_model
from shared.models.pretrained import label_numbers, load_classifier
from shared.optim import schedules
from shared.optim.optimizers import clip_and_step, decay_of_matrices, set_learning_rates, state_bytes_per_parameter
from shared.performance import dry_run
from shared.run import summary
from shared.run.best import Best
from shared.run.training_run import Run, start
from shared.runtime.collectives import SHARDED_ENGINES, gather_objects, node_main_first, rank_of
from shared.runtime.signals import until_stopped


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    # The library's ResNet has no such choice, and the field must not be passed over in silence.
    cli.expect(not cfg.gradient_checkpointing, "gradient_checkpointing", True, "False for this model")
    cli.expect(not (cfg.streaming and cfg.classes), "classes", cfg.classes, "no choice of classes with streaming")
    grows = cfg.final_image_size >= cfg.image_size
    cli.expect(grows, "final_image_size", cfg.final_image_size, "at least image_size")
    cli.expect(cfg.grow_from < cfg.grow_until, "grow_from", cfg.grow_from, "a share in [0, grow_until)")
    resnet.stage_sizes(cfg.depths, cfg.hidden_sizes)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config, accelerator: Any) -> tuple[Any, labelled.LabelledImages]:
    """The images to train on, maybe a stream of them, and those to evaluate on."""
    open_splits = streaming.open_splits if cfg.streaming else labelled.open_splits
    with node_main_first(accelerator):
        train, held_out = open_splits(cfg, cfg.label_column, largest=max(cfg.final_image_size, cfg.eval_image_size))
    if cfg.classes:
        train, held_out = (labelled.of_classes(some, "classes", cfg.classes) for some in (train, held_out))
    return train, held_out.subset(fixed_choice(len(held_out), cfg.eval_rows))


def image_size_at(cfg: Config, step: int) -> int:
    """Side of the crops of update `step`: small ones first, which cost less (Howard 2018; Leclerc et al. 2023)."""
    grown = (step / cfg.max_steps - cfg.grow_from) / (cfg.grow_until - cfg.grow_from)
    side = cfg.image_size + min(max(grown, 0), 1) * (cfg.final_image_size - cfg.image_size)
    rounded = round(side / cfg.size_multiple) * cfg.size_multiple
    return min(max(rounded, cfg.image_size), cfg.final_image_size)


def share_of_cost(cfg: Config, step: int) -> float:
    """What update `step` costs of one with crops of the final size."""
    return (image_size_at(cfg, step) / cfg.final_image_size) ** 2


def open_updates(
    cfg: Config, accelerator: Any, train: Any, micro_batch_size: int, step: int, streams: list[Any]
) -> Iterator[tuple[list[dict[str, Tensor]], list[str], Any]]:
    """Updates from `step` on: each this process's micro-batches, the names of bad images, and its stream's state."""
    order = {"seed": cfg.seed, "global_batch_size": cfg.global_batch_size, **rank_of(accelerator)}
    sizes = [image_size_at(cfg, number) for number in range(cfg.max_steps)]
    cut = {"sizes": sizes, "min_area": cfg.min_crop_area, "mirrored": cfg.mirrored}
    cut |= {"micro_batch_size": micro_batch_size, "order": order}
    if cfg.streaming:
        stream = StreamedGrowingCrops(cfg.data, train, **cut, step=step, states=streams)
        return load_updates(stream, None, min(cfg.num_workers, 1), accelerator.device)
    crops = GrowingCrops(cfg.data, train, **cut)
    return load_updates(crops, range(step, cfg.max_steps), cfg.num_workers, accelerator.device)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def build_model(cfg: Config, class_names: tuple[str, ...]) -> resnet.ResNetForImageClassification:
    """A model from `init`, or a new one, in float32."""
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    if cfg.init == "scratch":
        sizes = {"embedding_size": cfg.embedding_size, **resnet.stage_sizes(cfg.depths, cfg.hidden_sizes)}
        config = transformers.ResNetConfig(layer_type=cfg.layer_type, **sizes, **label_numbers(class_names))
        model = resnet.ResNetForImageClassification(config)
        for stage in model.resnet.encoder.stages if cfg.zero_init_residual else ():
            for block in stage.layers:
                torch.nn.init.zeros_(block.layer[-1].normalization.weight)
    else:
        model = load_classifier(resnet.ResNetForImageClassification, cfg.init, class_names)
    return resnet.activate_in_place(model)


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def enlargement(cfg: Config) -> int:
    """Times by which crops are enlarged for the model."""
    return cfg.enlarge or (2 if cfg.data == "sample" else 1)


def forward(model: Any, pixels: Tensor, enlarge: int) -> Tensor:
    """Logits (B, C) for images (B, S, S, 3) from 0 to 255."""
    return model(pixel_values=resnet.normalize(pixels, enlarge)).logits


def loss_sum(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy in nats, summed, against smoothed labels (Szegedy et al. 2016, section 7); -100 is no label."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, labels, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum")


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(cfg: Config, accelerator: Any, model: Any, crops: CenterCrops) -> tuple[dict[str, float], Answers]:
    """Loss (nats, labels not smoothed) and accuracies over every image once, and the answer to each."""
    model.eval()
    nll, found = 0.0, []
    for batch in until_stopped(accelerator, classification.load_held_out(accelerator, crops, cfg.num_workers)):
        logits = forward(model, batch["pixel_values"], enlarge=1)  # as large as they are shown
        nll += loss_sum(logits, batch["labels"], smoothing=0.0).item()
        found.append(classification.answers_of(logits.float().softmax(-1), batch))
    model.train()
    return classification.gather_answers(accelerator, found, nll, crops.num_images)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(cfg: Config, model: Any, fused: bool = True) -> torch.optim.Optimizer:
    """SGD with momentum; no decay of norms and biases (He et al. 2019, section 3.1)."""
    groups, nesterov = decay_of_matrices(model, cfg.weight_decay), cfg.nesterov and cfg.momentum > 0
    return torch.optim.SGD(groups, lr=cfg.learning_rate, momentum=cfg.momentum, nesterov=nesterov, fused=fused)


def learning_rate_factor(cfg: Config, step: int) -> float:
    """Share of the peak rate at `step`."""
    if cfg.schedule == "linear":
        return schedules.warmup_stable_decay(step, cfg.max_steps, cfg.warmup_steps, decay_fraction=1.0)
    return schedules.warmup_cosine(step, cfg.max_steps, cfg.warmup_steps)


def train_update(
    cfg: Config, accelerator: Any, model: Any, optimizer: Any, statistics: RunningStatistics, batches: list[Any]
) -> tuple[Tensor, Tensor]:
    """One optimizer update: its mean loss (nats) over all processes and micro-batches, and its gradient norm."""
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    losses = []
    statistics.begin_update()
    for batch in batches:
        with accelerator.accumulate(model):
            logits = forward(model, batch["pixel_values"], enlargement(cfg))
            loss = loss_sum(logits, batch["labels"], cfg.label_smoothing)
            accelerator.backward(loss * scale)
        statistics.add_micro_batch()
        losses.append(loss.detach())
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    statistics.end_update(accelerator, grad_norm)
    return accelerator.reduce(torch.stack(losses).sum(), "sum") / cfg.global_batch_size, grad_norm


def main(cfg: Config) -> None:
    """Train, evaluate, save, and leave a model that `from_pretrained` loads."""
    check_config(cfg)
    accelerator, micro_batch_size = start(cfg)
    train, held_out = open_data(cfg, accelerator)
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, len(held_out), micro_batch_size)
        return
    model = build_model(cfg, train.class_names)
    accelerator.print(summary.table(facts := describe(cfg, accelerator, model, train)))
    if accelerator.distributed_type.value not in SHARDED_ENGINES:  # which cut weights into flat parts
        model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        num_sides = len({image_size_at(cfg, step) for step in range(cfg.max_steps)})
        model.compile(dynamic=False, recompile_limit=2 * num_sides + 6)  # a last micro-batch may be smaller; evaluation
    is_sharded = accelerator.distributed_type == "FSDP"  # torch has no fused SGD of such weights
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model, fused=not is_sharded))
    statistics = RunningStatistics(model)

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best, (due, metrics), stream = Best(cfg.best_metric and f"eval/{cfg.best_metric}", run.state), run.owed, None
    average = AveragedWeights(model, cfg.ema_decay, run.state.get("tensors", {}))
    bad = BadImages(accelerator, len(train), cfg.max_bad_fraction, run.state.get("bad_images", []))
    updates = open_updates(cfg, accelerator, train, micro_batch_size, run.step, run.state.get("streams", []))
    side, fraction = enlargement(cfg) * cfg.eval_image_size, cfg.eval_crop_fraction
    crops = CenterCrops(held_out, side, fraction, micro_batch_size)
    processor = resnet.build_processor(side, fraction)
    data = {"data": cfg.data, "data_fingerprint": [train.fingerprint, held_out.fingerprint], "init": cfg.init}
    run.record(Path(__file__), {**data, **facts})
    model.train()
    for step, update in run.updates(updates, facts["flops_per_image"]):
        if update:  # else the evaluation alone is left, which a signal had ended
            batches, undecoded, stream = update
            factor = learning_rate_factor(cfg, step)
            set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
            batches = [to_device(batch, accelerator.device) for batch in batches]
            loss, grad_norm = train_update(cfg, accelerator, model, optimizer, statistics, batches)
            average.update(step + 1)
            bad.add(undecoded)

            whole = cfg.global_batch_size * share_of_cost(cfg, step)  # images of the last size that cost as much
            due = run.count_update(grad_norm, samples=whole, units=cfg.global_batch_size)
            metrics = {}
            if due.log:
                metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
                metrics |= {"train/grad_norm": grad_norm.item(), **run.rates("images")}
                metrics |= {"train/image_size": image_size_at(cfg, step), "train/bad_images": bad.number()}
        if due.evaluate:
            with run.evaluation(metrics), average.in_place():
                evaluation, answers = evaluate(cfg, accelerator, model, crops)
                metrics |= evaluation
                run.write_samples(shown := answers.describe_confusions(train.class_names))
                if best.is_better(run.step, evaluation, shown):
                    export_model(accelerator, model, processor, run.folder / best.FOLDER)
        with run.pause():
            run.write(metrics)
            if due.save or bad.are_too_many:
                streams = {"streams": gather_objects(accelerator, stream)} if stream else {}
                run.save({"bad_images": bad.gather(), "tensors": average.tensors(), **streams, **best.state()})
            if due.push:
                with average.in_place():
                    export_model(accelerator, model, processor, run.folder)
                run.push()
        bad.check()

    with average.in_place():
        export_model(accelerator, model, processor, run.folder)
        _, answers = evaluate(cfg, accelerator, model, crops)
    flops = (
        facts["flops_per_image"]
        * cfg.global_batch_size
        * sum(share_of_cost(cfg, earlier) for earlier in range(run.step))
    )
    card = classification.make_card(accelerator, answers, train.class_names, crops, run.folder / "figures")
    run.finish(**card, results={"training_flops": flops, **best.kept()})


def describe(cfg: Config, accelerator: Any, model: Any, train: Any) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    side = enlargement(cfg) * cfg.final_image_size
    return summary.describe_classifier(accelerator, model, side, train.num_images, cfg.global_batch_size)


def report_costs(cfg: Config, accelerator: Any, train: Any, num_held_out: int, micro_batch_size: int) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    cfg = replace(cfg, num_workers=0)
    seconds = None
    (batch, *_), *_ = next(open_updates(cfg, accelerator, train, micro_batch_size, cfg.max_steps - 1, []))
    last = to_device(batch, accelerator.device)
    inputs = {"pixel_values": resnet.normalize(last["pixel_values"], enlargement(cfg))}
    with dry_run.without_memory():
        model = build_model(cfg, train.class_names)
        facts = describe(cfg, accelerator, model, train)
        state = state_bytes_per_parameter(build_optimizer(cfg, model)) + (4 if cfg.ema_decay else 0)  # of the average
        costs = dry_run.costs(accelerator, model, inputs, state)
    if dry_run.can_time(accelerator, facts["flops_per_image"] * len(last["labels"]), costs["memory: total"]):
        model = build_model(cfg, train.class_names)
        inputs["labels"] = last["labels"]
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    batches = dry_run.num_batches(accelerator, [num_held_out], len(last["labels"]))
    rows |= dry_run.evaluation_rows(cfg, seconds, batches * (cfg.eval_image_size / cfg.final_image_size) ** 2)
    if seconds is not None:
        rows["all updates"] = f"at most {rows['all updates']}"  # of the largest crops
    accelerator.print(summary.table(rows))
    if accelerator.is_main_process:
        (first, *_), *_ = next(open_updates(cfg, accelerator, train, micro_batch_size, 0, []))
        accelerator.print(f"training images as the model sees them: {draw_batch(first, train.class_names)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
