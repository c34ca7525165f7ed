r"""Train a ResNet on labelled images with the long recipe: LAMB, binary cross-entropy, mixed images.

Papers: Wightman et al. 2021 (ResNet Strikes Back, whose procedures A1, A2 and A3 the configs are), You et al. 2020
(LAMB), Cubuk et al. 2020 (RandAugment), Zhang et al. 2018 (mixup), Yun et al. 2019 (cutmix), Huang et al. 2016
(stochastic depth), Berman et al. 2019 (repeated augmentation). pretrain.py is the short recipe. With no arguments it
trains on the embedded photographs on two CPU cores in minutes; recipes/resnet/README.md has the measured results and
what differs from the papers.

    accelerate launch recipes/resnet/pretrain_rsb.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/resnet/pretrain_rsb.py \
        --config recipes/resnet/configs/resnet50_rsb_a3.yaml
"""

# Shapes: B images of a micro-batch, S side of an image, C classes.
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place
from shared.fields import Amount, Count, Natural, RateOfNewWeights, Share, ShareAboveZero

# ----------------------------------------------------------------------------------------------------------------------
# Config

Magnitude = Annotated[float, cli.Limit(lambda value: 0 <= value <= 10, "from 0 to 10")]
# Half or more, and an image of two equal halves would have no class at all.
BelowHalf = Annotated[float, cli.Limit(lambda value: 0 <= value < 0.5, "a share in [0, 0.5)")]


@dataclass(frozen=True, kw_only=True)
class Config(fields.Images, fields.HeldOut, fields.RunControl):
    """Fields of the method; Images and HeldOut say where the images are, RunControl what every training stage has."""

    output_dir: Place = "outputs/resnet_rsb"
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
    image_size: Count = 28  # Side of the random crops, in pixels.
    min_crop_area: ShareAboveZero = 0.8  # Least share of an image's area that a random crop takes.
    mirrored: bool = True  # Mirror half of the crops; not where left and right differ, as in text, signs and scans.
    repeats: Count = 1
    """Crops of the same image, one after the other (repeated augmentation); an epoch is as much longer. 1 = one."""
    rand_augment_operations: Natural = 2  # Operations of RandAugment for each crop. 0 = none.
    rand_augment_magnitude: Magnitude = 2.0  # Their mean strength.
    rand_augment_spread: Amount = 0.5  # Standard deviation of their strength.
    enlarge: Natural = 0
    """Times by which crops are enlarged for the model, whose stem leaves a quarter of each side. 1 = not. 0 = 2 for the
    sample, whose images are small, else 1."""

    # Model
    layer_type: Literal["basic", "bottleneck"] = "basic"
    """Blocks of two 3x3 convolutions (ResNet-18 and 34), or of 1x1, 3x3, 1x1 (50, 101, 152)."""
    depths: str = "1,1,1"  # Blocks of each stage; the later stages halve the sides.
    hidden_sizes: str = "32,64,128"  # Channels after each stage.
    embedding_size: Count = 32  # Channels after the stem.
    init: Place = "scratch"
    """scratch, or a run folder or Hub id to start from: its weights; with other classes its head is new."""
    stochastic_depth: Share = 0.0
    """Share of the images for which the last block is skipped; less in the blocks before it. 0 = none."""

    # Objective
    mixup_alpha: Amount = 0.1  # Both parameters of the Beta distribution of shares in mixup. 0 = no mixup.
    cutmix_alpha: Amount = 1.0
    """The same for cutmix; with both, each micro-batch gets one of them. 0 = no cutmix."""
    target_threshold: BelowHalf = 0.2
    """A class of a mixed image is a target where its share is larger; the paper has every class, which is 0."""
    label_smoothing: Share = 0.0
    """Share that targets of binary cross-entropy give up to all classes alike. 0 = none."""

    # Optimization
    global_batch_size: Count = 128  # Images of one update, over all processes and micro-batches.
    per_device_batch_size: Natural = 0
    """Images of one micro-batch on one process, which batch normalisation sees. 0 = the process's whole share."""
    max_steps: Count = 1500
    learning_rate: RateOfNewWeights = 0.01  # Peak rate of LAMB.
    weight_decay: Amount = 0.02
    """Decay of convolutions and the head, a part of LAMB's update, not of norms and biases. 0 = none."""
    max_grad_norm: Amount = 1.0
    warmup_steps: Natural = 100  # Updates over which the rate rises linearly; then it falls to 0 as a cosine.

    # Evaluation
    eval_image_size: Count = 28  # Side of the middle crop that is evaluated, in pixels.
    eval_crop_fraction: ShareAboveZero = 1.0
    """Share of the shorter side that this crop keeps; the paper's 0.95 is for ImageNet."""
    best_metric: Literal["", "loss", "top1", "top5"] = ""
    """Metric whose best evaluation is kept too, in best/ of the run folder. "" = the last model alone."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import math

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, one_hot

from shared.data.batches import IGNORED, to_device
from shared.data.randomness import derive_seed
from shared.data.subsets import fixed_choice
from shared.data.updates import load_updates
from shared.images import labelled, streaming
from shared.images.bad_images import BadImages
from shared.images.crops import CenterCrops
from shared.images.labelled_updates import RepeatedCrops, StreamedRepeatedCrops
from shared.metrics import classification
from shared.metrics.classification import Answers, draw_batch
from shared.models import resnet
from shared.models.batch_statistics import RunningStatistics
from shared.models.export import export_model
from shared.models.pretrained import label_numbers, load_classifier
from shared.optim import schedules
from shared.optim.lamb import Lamb
from shared.optim.optimizers import clip_and_step, set_learning_rates, state_bytes_per_parameter
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
    resnet.stage_sizes(cfg.depths, cfg.hidden_sizes)


def check_engine(accelerator: Any) -> None:
    """Raise `UsageError` for an engine that flattens matrices."""
    if (engine := accelerator.distributed_type.value) == "DEEPSPEED":
        raise cli.UsageError(
            f"accelerate_configs: {engine}: expected DDP or FSDP2, for LAMB needs the norms of matrices"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config, accelerator: Any) -> tuple[Any, labelled.LabelledImages]:
    """The images to train on, maybe a stream of them, and those to evaluate on."""
    open_splits = streaming.open_splits if cfg.streaming else labelled.open_splits
    with node_main_first(accelerator):
        train, held_out = open_splits(cfg, cfg.label_column, largest=max(cfg.image_size, cfg.eval_image_size))
    return train, held_out.subset(fixed_choice(len(held_out), cfg.eval_rows))


def open_updates(
    cfg: Config, accelerator: Any, train: Any, micro_batch_size: int, step: int, streams: list[Any]
) -> Iterator[tuple[list[dict[str, Tensor]], list[str], Any]]:
    """Updates from `step` on: each this process's micro-batches, the names of bad images, and its stream's state."""
    order = {"seed": cfg.seed, "global_batch_size": cfg.global_batch_size, **rank_of(accelerator)}
    augmentation = (cfg.rand_augment_operations, cfg.rand_augment_magnitude, cfg.rand_augment_spread)
    cut = {"size": cfg.image_size, "min_area": cfg.min_crop_area, "repeats": cfg.repeats, "augmentation": augmentation}
    cut |= {"micro_batch_size": micro_batch_size, "mirrored": cfg.mirrored, "order": order}
    if cfg.streaming:
        stream = StreamedRepeatedCrops(cfg.data, train, **cut, states=streams)
        return load_updates(stream, None, min(cfg.num_workers, 1), accelerator.device)
    crops = RepeatedCrops(cfg.data, train, **cut)
    return load_updates(crops, range(step, cfg.max_steps), cfg.num_workers, accelerator.device)


# ----------------------------------------------------------------------------------------------------------------------
# Model


class StochasticDepth(torch.nn.Module):
    """Leave out the branch it stands at the end of, for some images in training (Huang et al. 2016, section 3)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self._share = share

    def forward(self, branch: Tensor) -> Tensor:
        """(B, C, H, W): zero for a share of the images, the others larger, so that the mean stays."""
        if not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= self._share
        return branch * (kept / (1 - self._share)).to(branch.dtype)


def build_model(cfg: Config, class_names: tuple[str, ...]) -> resnet.ResNetForImageClassification:
    """A model from `init`, or a new one, in float32."""
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    if cfg.init == "scratch":
        sizes = {"embedding_size": cfg.embedding_size, **resnet.stage_sizes(cfg.depths, cfg.hidden_sizes)}
        config = transformers.ResNetConfig(layer_type=cfg.layer_type, **sizes, **label_numbers(class_names))
        model = resnet.ResNetForImageClassification(config)
        for stage in model.resnet.encoder.stages:
            for block in stage.layers:
                # A block begins as its shortcut alone: Goyal et al. 2017, section 5.1.
                torch.nn.init.zeros_(block.layer[-1].normalization.weight)
    else:
        model = load_classifier(resnet.ResNetForImageClassification, cfg.init, class_names)
    skip_blocks(model, cfg.stochastic_depth)
    return resnet.activate_in_place(model)


def skip_blocks(model: resnet.ResNetForImageClassification, share: float) -> None:
    """Let blocks be skipped, the later ones more often: up to `share` (Huang et al. 2016, equation 4)."""
    blocks = [block for stage in model.resnet.encoder.stages for block in stage.layers] if share else []
    for place, block in enumerate(blocks, start=1):
        block.layer.append(StochasticDepth(share * place / len(blocks)))


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def enlargement(cfg: Config) -> int:
    """Times by which crops are enlarged for the model."""
    return cfg.enlarge or (2 if cfg.data == "sample" else 1)


def forward(model: Any, pixels: Tensor, enlarge: int) -> Tensor:
    """Logits (B, C) for images (B, S, S, 3) from 0 to 255."""
    return model(pixel_values=resnet.normalize(pixels, enlarge)).logits


def mix(pixels: Tensor, mixup_alpha: float, cutmix_alpha: float, draw: np.random.Generator) -> tuple[Tensor, float]:
    """Mix each image with the one at the same place from the other end of the micro-batch, in one of two ways.

    Mixup blends them (Zhang et al. 2018); cutmix puts a box of one into the other (Yun et al. 2019, section 3.1).

    Args:
        pixels: (B, S, S, 3), from 0 to 255.
        mixup_alpha: both parameters of the Beta distribution of shares; 0 = no mixup.
        cutmix_alpha: likewise.
        draw: where the randomness comes from.

    Returns:
        Pixels, float32 where they are blended, and the share of each image that is still its own.
    """
    kinds = [kind for kind, alpha in (("mixup", mixup_alpha), ("cutmix", cutmix_alpha)) if alpha]
    if not kinds:
        return pixels, 1.0
    if kinds[int(draw.integers(len(kinds)))] == "mixup":
        share = float(draw.beta(mixup_alpha, mixup_alpha))
        whole = pixels.to(torch.float32)
        return torch.lerp(whole.flip(0), whole, share), share
    side = pixels.shape[1]
    half = side * math.sqrt(1 - draw.beta(cutmix_alpha, cutmix_alpha)) / 2
    down, across = draw.uniform(0, side, 2).tolist()  # the middle of the box, which the edges may cut
    (top, bottom), (left, right) = ((max(0, round(m - half)), min(side, round(m + half))) for m in (down, across))
    mixed = pixels.clone()
    mixed[:, top:bottom, left:right] = pixels.flip(0)[:, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / side**2


def mixed_targets(labels: Tensor, share: float, num_classes: int, threshold: float) -> Tensor:
    """1 for each class whose share of the image is above the threshold, float32 (B, C).

    An image has several classes, whatever their shares (Wightman et al. 2021, section 3).
    """
    targets = one_hot(labels, num_classes)
    shares = targets * share + targets.flip(0) * (1 - share)
    return (shares > threshold).to(torch.float32)


def loss_sum(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Binary cross-entropy in nats of each image, the mean over classes, summed over images.

    Args:
        logits: (B, C).
        targets: (B, C), 0 or 1.
        smoothing: share of each target that all classes get alike.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    smoothed = targets * (1 - smoothing) + smoothing / targets.shape[1]
    return binary_cross_entropy_with_logits(logits, smoothed.to(logits.dtype), reduction="sum") / targets.shape[1]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(cfg: Config, accelerator: Any, model: Any, crops: CenterCrops) -> tuple[dict[str, float], Answers]:
    """Loss (nats, nothing mixed or smoothed) and accuracies over every image once, and the answer to each."""
    model.eval()
    bce, found = 0.0, []
    for batch in until_stopped(accelerator, classification.load_held_out(accelerator, crops, cfg.num_workers)):
        logits = forward(model, batch["pixel_values"], enlarge=1)  # as large as they are shown
        kept = batch["labels"] != IGNORED
        targets = one_hot(batch["labels"][kept], logits.shape[1]).to(torch.float32)
        bce += loss_sum(logits[kept], targets, smoothing=0.0).item()
        found.append(classification.answers_of(logits.float().softmax(-1), batch))  # as the pipeline says it
    model.train()
    return classification.gather_answers(accelerator, found, bce, crops.num_images)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """LAMB; norms and biases have no decay and no trust ratio, as in timm's, which the paper used."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0, "trust_ratio": False},
    ]
    return Lamb(groups, cfg.learning_rate, betas=(0.9, 0.999), eps=1e-6)


def train_update(
    cfg: Config,
    accelerator: Any,
    model: Any,
    optimizer: Any,
    statistics: RunningStatistics,
    batches: list[Any],
    step: int,
) -> tuple[Tensor, Tensor]:
    """One optimizer update: its mean loss (nats) over all processes and micro-batches, and its gradient norm."""
    # accelerate divides by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    losses = []
    statistics.begin_update()
    for place, batch in enumerate(batches, start=accelerator.process_index * len(batches)):
        torch.manual_seed(derive_seed(cfg.seed, "depth", step, place))
        draw = np.random.Generator(np.random.Philox(key=derive_seed(cfg.seed, "mix", step, place)))
        pixels, share = mix(batch["pixel_values"], cfg.mixup_alpha, cfg.cutmix_alpha, draw)
        with accelerator.accumulate(model):
            logits = forward(model, pixels, enlargement(cfg))
            targets = mixed_targets(batch["labels"], share, logits.shape[1], cfg.target_threshold)
            loss = loss_sum(logits, targets, cfg.label_smoothing)
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
    check_engine(accelerator)
    train, held_out = open_data(cfg, accelerator)
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, len(held_out), micro_batch_size)
        return
    model = build_model(cfg, train.class_names)
    facts = describe(cfg, accelerator, model, train)
    accelerator.print(summary.table(facts))
    if accelerator.distributed_type.value not in SHARDED_ENGINES:  # which cut weights into flat parts
        model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile(dynamic=False)
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))
    statistics = RunningStatistics(model)

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best, (due, metrics), stream = Best(cfg.best_metric and f"eval/{cfg.best_metric}", run.state), run.owed, None
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
            factor = schedules.warmup_cosine(step, cfg.max_steps, cfg.warmup_steps)
            set_learning_rates(optimizer, factor)
            batches = [to_device(batch, accelerator.device) for batch in batches]
            loss, grad_norm = train_update(cfg, accelerator, model, optimizer, statistics, batches, step)
            bad.add(undecoded)

            due = run.count_update(grad_norm, samples=cfg.global_batch_size, units=cfg.global_batch_size)
            metrics = {}
            if due.log:
                metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
                metrics |= {"train/grad_norm": grad_norm.item(), "train/bad_images": bad.number()}
                metrics |= run.rates("images")
        if due.evaluate:
            with run.evaluation(metrics):
                evaluation, answers = evaluate(cfg, accelerator, model, crops)
                metrics |= evaluation
                run.write_samples(shown := answers.describe_confusions(train.class_names))
                if best.is_better(run.step, evaluation, shown):
                    export_model(accelerator, model, processor, run.folder / best.FOLDER)
        with run.pause():
            run.write(metrics)
            if due.save or bad.are_too_many:
                streams = {"streams": gather_objects(accelerator, stream)} if stream else {}
                run.save({"bad_images": bad.gather(), **streams, **best.state()})
            if due.push:
                export_model(accelerator, model, processor, run.folder)
                run.push()
        bad.check()

    export_model(accelerator, model, processor, run.folder)
    _, answers = evaluate(cfg, accelerator, model, crops)
    flops = facts["flops_per_image"] * cfg.global_batch_size * run.step
    card = classification.make_card(accelerator, answers, train.class_names, crops, run.folder / "figures")
    run.finish(**card, results={"training_flops": flops, **best.kept()})


def describe(cfg: Config, accelerator: Any, model: Any, train: Any) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    side = enlargement(cfg) * cfg.image_size
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
        costs = dry_run.costs(accelerator, model, inputs, state_bytes_per_parameter(build_optimizer(cfg, model)))
    if dry_run.can_time(accelerator, facts["flops_per_image"] * len(last["labels"]), costs["memory: total"]):
        model = build_model(cfg, train.class_names)
        inputs["labels"] = last["labels"]
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    batches = dry_run.num_batches(accelerator, [num_held_out], len(last["labels"]))
    rows |= dry_run.evaluation_rows(cfg, seconds, batches * (cfg.eval_image_size / cfg.image_size) ** 2)
    accelerator.print(summary.table(rows))
    if accelerator.is_main_process:
        (first, *_), *_ = next(open_updates(cfg, accelerator, train, micro_batch_size, 0, []))
        accelerator.print(f"training images as the model sees them: {draw_batch(first, train.class_names)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
