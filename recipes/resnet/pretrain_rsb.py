"""Train a ResNet on labelled images with the long recipe: LAMB, binary cross-entropy, mixed images.

Papers: Wightman et al. 2021 (ResNet Strikes Back, whose procedures A1, A2 and A3 the configs are), You et al. 2020
(LAMB), Cubuk et al. 2020 (RandAugment), Zhang et al. 2018 (mixup), Yun et al. 2019 (cutmix), Huang et al. 2016
(stochastic depth), Berman et al. 2019 (repeated augmentation). pretrain.py is the short recipe. With no arguments it
trains on the embedded photographs on two CPU cores in minutes; recipes/resnet/README.md has the measured results and
what differs from the papers.

    accelerate launch recipes/resnet/pretrain_rsb.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/resnet/pretrain_rsb.py \
        --config recipes/resnet/configs/resnet50_rsb_a3.yaml
"""

# Shapes: B images of a micro-batch, S side of an image, C classes, N images evaluated.
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.RunControl):
    """Fields of the method; RunControl has those that every recipe shares."""

    output_dir: str = "outputs/resnet_rsb"
    """The run folder; on several nodes it must be one that all of them see."""
    log_every: int = 20
    """Updates between two log entries."""
    eval_every: int = 500
    """Updates between two evaluations; 0 = only at the end."""
    save_every: int = 500
    """Updates between two checkpoints; 0 = only at the end and when a signal stops the run."""
    num_workers: int = 1
    """Data worker processes for each training process; never changes the result. 0 = load in the training process."""

    data: str = "sample"
    """sample, a .parquet or .tar file, a folder of them or of class folders, or a Hub data set id."""
    data_config: str = ""
    """Configuration of a Hub data set. "" = its only one."""
    streaming: bool = False
    """Read images as they arrive, in one data worker, instead of storing the data set; see the README."""
    data_split: str = "train"
    """Split to train on."""
    eval_split: str = ""
    """Split to evaluate on. "" = validation, val or test, the first that is there, else eval_fraction is held out."""
    eval_fraction: float = 0.05
    """Share of each class held out where there is no split to evaluate on."""
    image_column: str = ""
    """Column of the images. "" = the only one that holds images."""
    label_column: str = ""
    """Column of the classes. "" = the only one with a list of classes, or the one called label or cls."""
    max_bad_fraction: float = 0.01
    """Share of the images that may turn out damaged before the run stops; they are replaced, and named in the log."""

    image_size: int = 28
    """Side of the random crops, in pixels."""
    eval_image_size: int = 28
    """Side of the middle crop that is evaluated, in pixels."""
    eval_crop_fraction: float = 1.0
    """Share of the shorter side that this crop keeps; the paper's 0.95 is for ImageNet."""
    enlarge: int = 2
    """Times by which crops are enlarged for the model, whose stem leaves a quarter of each side. 1 = not."""
    min_crop_area: float = 0.8
    """Least share of an image's area that a random crop takes."""
    repeats: int = 1
    """Crops of the same image, one after the other (repeated augmentation); an epoch is as much longer. 1 = one."""
    rand_augment_operations: int = 2
    """Operations of RandAugment for each crop. 0 = none."""
    rand_augment_magnitude: float = 2.0
    """Their mean strength, from 0 to 10."""
    rand_augment_spread: float = 0.5
    """Standard deviation of their strength."""
    mixup_alpha: float = 0.1
    """Both parameters of the Beta distribution of shares in mixup. 0 = no mixup."""
    cutmix_alpha: float = 1.0
    """The same for cutmix; with both, each micro-batch gets one of them. 0 = no cutmix."""
    target_threshold: float = 0.2
    """A class of a mixed image is a target where its share is larger; the paper has every class, which is 0."""
    label_smoothing: float = 0.0
    """Share that targets of binary cross-entropy give up to all classes alike. 0 = none."""

    layer_type: Literal["basic", "bottleneck"] = "basic"
    """Blocks of two 3x3 convolutions (ResNet-18 and 34), or of 1x1, 3x3, 1x1 (50, 101, 152)."""
    depths: str = "1,1,1"
    """Blocks of each stage; the later stages halve the sides."""
    hidden_sizes: str = "32,64,128"
    """Channels after each stage."""
    embedding_size: int = 32
    """Channels after the stem."""
    init: str = "scratch"
    """scratch, or a run folder or Hub id to start from: its weights; with other classes its head is new."""

    global_batch_size: int = 128
    """Images of one update, over all processes and micro-batches."""
    per_device_batch_size: int = 0
    """Images of one micro-batch on one process, which batch normalisation sees. 0 = the process's whole share."""
    max_steps: int = 1500
    """Optimizer updates."""
    learning_rate: float = 0.01
    """Peak rate of LAMB."""
    weight_decay: float = 0.02
    """Decay of convolutions and the head, a part of LAMB's update, not of norms and biases. 0 = none."""
    max_grad_norm: float = 1.0
    """Norm to which the update's gradient is clipped. 0 = no clipping."""
    warmup_steps: int = 100
    """Updates over which the rate rises linearly; then it falls to 0 as a cosine."""
    stochastic_depth: float = 0.0
    """Share of the images for which the last block is skipped; less in the blocks before it. 0 = none."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import math
import tempfile

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, one_hot
from torch.utils.data import Dataset, IterableDataset
from tqdm import tqdm

from shared.data.batches import IGNORED, micro_batches, to_device
from shared.data.randomness import derive_seed, uniform_numbers
from shared.data.sample_order import positions_of_update, samples_at
from shared.data.shards import StreamState, resumed_state
from shared.data.updates import load_updates
from shared.images import files as image_files
from shared.images import labelled
from shared.images.bad_images import BadImages, candidates
from shared.images.crops import CROP_DRAWS, CenterCrops, random_crop
from shared.images.decoded_cache import ImageCache
from shared.images.decoding import BadImage, EncodedImage
from shared.images.labelled import SAMPLE, LabelledImages
from shared.images.rand_augment import MAX_MAGNITUDE, rand_augment
from shared.images.streaming import HELD_OUT_FROM, ImageStream, StreamedImage, open_image_stream, store
from shared.metrics import figures
from shared.metrics.classification import Answers, answers_of, describe_confusions, draw_answers, join_answers
from shared.models.batch_statistics import RunningStatistics
from shared.models.export import export_model
from shared.models.pretrained import load_classifier
from shared.optim import schedules
from shared.optim.optimizers import set_learning_rates
from shared.performance import dry_run
from shared.performance.flops import peak, training_flops
from shared.performance.profiling import trace_updates
from shared.performance.throughput import Throughput
from shared.run import checkpoints, hub, summary
from shared.run import folder as run_folder
from shared.run.log import RunLog
from shared.run.report import finish_run
from shared.run.skipped_updates import SkippedUpdates
from shared.runtime import collectives, launch
from shared.runtime.signals import StopSignals

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, from 0 to 1: what checkpoints expect
NUM_SHOWN = 16
USAGE = """from transformers import pipeline

print(pipeline("image-classification", "path/of/this/folder")("image.jpg"))"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what can be told wrong from the fields alone."""
    fields.check_run_control(cfg)
    cli.expect_at_least(cfg, 1, "image_size", "eval_image_size", "enlarge", "embedding_size", "repeats")
    cli.expect_at_least(cfg, 1, "global_batch_size", "max_steps")
    cli.expect_at_least(cfg, 0, "per_device_batch_size", "warmup_steps", "weight_decay", "max_grad_norm")
    cli.expect_at_least(cfg, 0, "rand_augment_operations", "rand_augment_spread", "mixup_alpha", "cutmix_alpha")
    cli.expect(cfg.learning_rate > 0, "learning_rate", cfg.learning_rate, "more than 0")
    magnitude = cfg.rand_augment_magnitude
    cli.expect(0 <= magnitude <= MAX_MAGNITUDE, "rand_augment_magnitude", magnitude, f"from 0 to {MAX_MAGNITUDE:g}")
    # The library's ResNet has no such choice, and the field must not be passed over in silence.
    cli.expect(not cfg.gradient_checkpointing, "gradient_checkpointing", True, "False for this model")
    for field in ("eval_crop_fraction", "min_crop_area"):
        cli.expect(0 < getattr(cfg, field) <= 1, field, getattr(cfg, field), "a share in (0, 1]")
    for field in ("label_smoothing", "stochastic_depth", "max_bad_fraction"):
        cli.expect(0 <= getattr(cfg, field) < 1, field, getattr(cfg, field), "a share in [0, 1)")
    # Half or more, and an image of two equal halves would have no class at all.
    cli.expect(0 <= cfg.target_threshold < 0.5, "target_threshold", cfg.target_threshold, "a share in [0, 0.5)")
    cli.expect(0 < cfg.eval_fraction < 1, "eval_fraction", cfg.eval_fraction, "a share in (0, 1)")
    stages = len(cli.whole_numbers("depths", cfg.depths))
    is_even = len(cli.whole_numbers("hidden_sizes", cfg.hidden_sizes)) == stages
    cli.expect(is_even, "hidden_sizes", cfg.hidden_sizes, f"as many numbers as depths has: {stages}")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config, accelerator: Any) -> tuple[LabelledImages | ImageStream, LabelledImages]:
    """The images to train on and to evaluate on."""
    source = str(SAMPLE) if cfg.data == "sample" else cfg.data
    columns = {"image_column": cfg.image_column, "label_column": cfg.label_column}
    open_split = open_image_stream if cfg.streaming else labelled.open_images
    with collectives.node_main_first(accelerator):
        train = open_split(source, config=cfg.data_config, split=cfg.data_split, **columns)
        if not cfg.streaming:
            labelled.check_every_class(source, train)
        eval_split = cfg.eval_split or image_files.validation_split(source, cfg.data_config)
        if eval_split:
            held_out = open_split(source, config=cfg.data_config, split=eval_split, **columns)
            held_out = store(held_out, 0) if cfg.streaming else held_out
            held_out = labelled.number_alike(held_out, train.class_names, eval_split)
        elif cfg.streaming:
            held_out = store(train.between(0, cfg.eval_fraction), round(cfg.eval_fraction * HELD_OUT_FROM))
            train = train.between(cfg.eval_fraction, 1)
        else:
            train, held_out = labelled.hold_out(train, cfg.eval_fraction)
        largest = max(cfg.image_size, cfg.eval_image_size)
        image_files.check_sides(source, (held_out if cfg.streaming else train).files, largest)
    return train, held_out


def augment(cfg: Config, pixels: np.ndarray, *where: int) -> np.ndarray:
    """RandAugment of a crop, as a function of the seed and of what tells the crop from others."""
    draw = np.random.Generator(np.random.Philox(key=derive_seed(cfg.seed, "augment", *where)))
    operations, magnitude = cfg.rand_augment_operations, cfg.rand_augment_magnitude
    return rand_augment(pixels, operations, magnitude, cfg.rand_augment_spread, draw)


class CroppedUpdates(Dataset):
    """Item `step` is what update `step` sees on this process: a function of seed and step, whoever reads it.

    Args:
        cfg: of the run.
        train: images to train on.
        micro_batch_size: images of a micro-batch.
        order: seed, global_batch_size, rank and num_processes.
    """

    def __init__(self, cfg: Config, train: LabelledImages, micro_batch_size: int, order: dict[str, int]) -> None:
        self._cfg, self._train, self._micro_batch_size, self._order = cfg, train, micro_batch_size, order
        self._cache = ImageCache(train.files)

    def __getitem__(self, step: int) -> tuple[list[dict[str, np.ndarray]], list[str], None]:
        """The micro-batches of update `step`, the names of images that could not be decoded, and no state."""
        order, bad = dict(self._order), []
        seed = order.pop("seed")
        # Berman et al. 2019: an image stands in the order once for all of its crops.
        places, copies = np.divmod(positions_of_update(step, **order), self._cfg.repeats)
        _, epochs, indices = np.transpose(samples_at(places, [len(self._train)], [1.0], seed))
        draws = uniform_numbers(derive_seed(self._cfg.seed, "crop"), epochs, indices, copies, count=CROP_DRAWS).tolist()
        drawn = zip(epochs.tolist(), indices.tolist(), copies.tolist(), draws, strict=True)
        rows = [self._read(*where, bad) for where in drawn]
        return micro_batches(rows, self._micro_batch_size), bad, None

    def _read(self, epoch: int, index: int, copy: int, draws: list[float], bad: list[str]) -> dict[str, np.ndarray]:
        """A crop of the image, or of the first replacement that can be decoded; what cannot goes to `bad`."""
        cfg = self._cfg
        for candidate in candidates(index, len(self._train), cfg.seed, epoch):
            try:
                image = self._cache.open(candidate)
                pixels = random_crop(image, cfg.image_size, cfg.min_crop_area, draws)
            except BadImage:
                bad.append(self._train.files.name(candidate))
                continue
            pixels = augment(cfg, pixels, epoch, index, copy)
            return {"pixel_values": pixels, "labels": self._train.labels[candidate]}
        raise cli.UsageError(f"data: {cfg.data!r}: expected images that can be decoded")


class StreamedCrops(IterableDataset):
    """The same for images that are read as they arrive: endless updates.

    Args:
        cfg: of the run.
        train: images to train on.
        micro_batch_size: images of a micro-batch.
        order: seed, global_batch_size, rank and num_processes.
        states: of every process, as a checkpoint kept them; empty = from the start.
    """

    def __init__(
        self,
        cfg: Config,
        train: ImageStream,
        micro_batch_size: int,
        order: dict[str, int],
        states: list[StreamState],
    ) -> None:
        self._cfg, self._train, self._micro_batch_size = cfg, train, micro_batch_size
        self._share = order["global_batch_size"] // order["num_processes"]
        state = resumed_state(states, order["rank"], order["num_processes"])
        self._start = {"seed": derive_seed(cfg.seed, "stream"), "rank": order["rank"], "state": state}

    def __iter__(self) -> Iterator[tuple[list[dict[str, np.ndarray]], list[str], StreamState]]:
        """The micro-batches of each update, the names of images that could not be decoded, the state after it."""
        arriving, state = self._train.read(**self._start), self._start["state"]
        while True:
            rows: list[dict[str, np.ndarray]] = []
            bad: list[str] = []
            while len(rows) < self._share:
                image, state = next(arriving)
                cropped = self._crops(image, state["epoch"])
                rows += cropped
                bad += [] if cropped else [image.name]
                is_endless = len(bad) > 100 + self._share
                cli.expect(not is_endless, "data", self._cfg.data, "images that can be decoded")
            yield micro_batches(rows[: self._share], self._micro_batch_size), bad, state

    def _crops(self, image: StreamedImage, epoch: int) -> list[dict[str, np.ndarray]]:
        """Crops as functions of the seed, the pass and the image's bytes; none if they cannot be decoded."""
        cfg, rows = self._cfg, []
        for copy in range(cfg.repeats):
            where = (np.array([epoch]), np.array([image.key]), np.array([copy]))
            [draws] = uniform_numbers(derive_seed(cfg.seed, "crop"), *where, count=CROP_DRAWS).tolist()
            try:
                encoded = EncodedImage(image.data)
                pixels = random_crop(encoded, cfg.image_size, cfg.min_crop_area, draws)
            except BadImage:
                return []
            pixels = augment(cfg, pixels, epoch, image.key, copy)
            rows.append({"pixel_values": pixels, "labels": np.array(image.label)})
        return rows


def open_updates(
    cfg: Config, accelerator: Any, train: Any, micro_batch_size: int, step: int, states: list[StreamState]
) -> Iterator[tuple[list[dict[str, Tensor]], list[str], StreamState | None]]:
    """Updates from `step` on: each this process's micro-batches, the names of bad images, and its stream's state."""
    rank = {"rank": accelerator.process_index, "num_processes": accelerator.num_processes}
    order = {"seed": cfg.seed, "global_batch_size": cfg.global_batch_size, **rank}
    if cfg.streaming:
        stream = StreamedCrops(cfg, train, micro_batch_size, order, states)
        return load_updates(stream, None, min(cfg.num_workers, 1), accelerator.device)
    updates = CroppedUpdates(cfg, train, micro_batch_size, order)
    return load_updates(updates, range(step, cfg.max_steps), cfg.num_workers, accelerator.device)


def center_crops(cfg: Config, held_out: LabelledImages, batch_size: int) -> CenterCrops:
    """What is evaluated, by batch."""
    return CenterCrops(held_out, cfg.enlarge * cfg.eval_image_size, cfg.eval_crop_fraction, batch_size)


# ----------------------------------------------------------------------------------------------------------------------
# Model


class ResNetForImageClassification(transformers.ResNetForImageClassification):
    """The library's class, under its name, which is what config.json will say."""

    # accelerate asks for them under FSDP2, and the library has no answer for a model without embeddings.
    get_input_embeddings = get_output_embeddings = lambda self: None
    _no_split_modules = ("ResNetStage",)


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


def build_model(cfg: Config, class_names: tuple[str, ...]) -> ResNetForImageClassification:
    """A model from `init`, or a new one, in float32."""
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    labels = {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}
    if cfg.init != "scratch":
        return skip_blocks(load_classifier(ResNetForImageClassification, cfg.init, class_names), cfg.stochastic_depth)
    config = transformers.ResNetConfig(
        layer_type=cfg.layer_type,
        depths=cli.whole_numbers("depths", cfg.depths),
        hidden_sizes=cli.whole_numbers("hidden_sizes", cfg.hidden_sizes),
        embedding_size=cfg.embedding_size,
        **labels,
    )
    model = ResNetForImageClassification(config)
    for stage in model.resnet.encoder.stages:
        for block in stage.layers:
            # A block begins as its shortcut alone: Goyal et al. 2017, section 5.1.
            torch.nn.init.zeros_(block.layer[-1].normalization.weight)
    return skip_blocks(model, cfg.stochastic_depth)


def skip_blocks(model: ResNetForImageClassification, share: float) -> ResNetForImageClassification:
    """Let blocks be skipped, the later ones more often: up to `share` (Huang et al. 2016, equation 4)."""
    blocks = [block for stage in model.resnet.encoder.stages for block in stage.layers] if share else []
    for place, block in enumerate(blocks, start=1):
        block.layer.append(StochasticDepth(share * place / len(blocks)))
    return activate_in_place(model)


def activate_in_place(model: ResNetForImageClassification) -> ResNetForImageClassification:
    """Let each ReLU overwrite what it gets, which no backward pass needs: less memory to hold and to move."""
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = True
    return model


def build_processor(cfg: Config) -> transformers.ConvNextImageProcessorPil:
    """What `AutoImageProcessor` loads: the same middle crop as in evaluation."""
    return transformers.ConvNextImageProcessorPil(
        size={"shortest_edge": cfg.enlarge * cfg.eval_image_size},
        crop_pct=cfg.eval_crop_fraction,
        resample=2,  # bilinear
        image_mean=list(MEAN),
        image_std=list(STD),
    )


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """LAMB; norms and biases have no decay and no trust ratio, as in timm's, which the paper used."""
    from pytorch_optimizer import Lamb  # two seconds

    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0, "adam": True},
    ]
    # You et al. 2020, algorithm 2: the decay is part of the update whose length the trust ratio sets.
    return Lamb(groups, lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-6, weight_decouple=False)


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def model_input(pixels: Tensor, enlarge: int) -> Tensor:
    """Normalised, enlarged images, float32 (B, 3, E * S, E * S), channels-last, of (B, S, S, 3) from 0 to 255."""
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    scaled = torch.addcmul(-mean / std, pixels.permute(0, 3, 1, 2).to(torch.float32), 1 / (255 * std))
    return interpolate(scaled, scale_factor=enlarge, mode="bilinear") if enlarge > 1 else scaled


def forward(model: Any, pixels: Tensor, enlarge: int) -> Tensor:
    """Logits (B, C)."""
    return model(pixel_values=model_input(pixels, enlarge)).logits


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
def evaluate(
    cfg: Config, accelerator: Any, model: Any, held_out: LabelledImages, batch_size: int
) -> tuple[dict[str, float], Answers]:
    """Loss (nats, nothing mixed or smoothed) and accuracies over every image once, and the answer to each."""
    model.eval()
    processes = accelerator.num_processes
    steps = range(accelerator.process_index, math.ceil(len(held_out) / batch_size / processes) * processes, processes)
    crops = center_crops(cfg, held_out, batch_size)
    batches = load_updates(crops, steps, cfg.num_workers, accelerator.device)
    is_quiet = not accelerator.is_main_process or None  # None: where there is no terminal
    bce, found = 0.0, []
    for batch in tqdm(batches, total=len(steps), desc="evaluating", delay=2, leave=False, disable=is_quiet):
        batch = to_device(batch, accelerator.device)
        logits = forward(model, batch["pixel_values"], enlarge=1)  # as large as they are shown
        kept = batch["labels"] != IGNORED
        targets = one_hot(batch["labels"][kept], logits.shape[1]).to(torch.float32)
        bce += loss_sum(logits[kept], targets, smoothing=0.0).item()
        found.append(answers_of(logits.float().sigmoid(), batch))
    model.train()
    gathered = collectives.gather_objects(accelerator, (bce, found))
    answers = join_answers(part for _, parts in gathered for part in parts)
    number = len(answers.labels)
    metrics = {"eval/loss": sum(of_process for of_process, _ in gathered) / number, "eval/top1": answers.top1()}
    return {**metrics, "eval/top5": answers.top5(), "eval/skipped": len(held_out) - number}, answers


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_update(
    cfg: Config,
    accelerator: Any,
    model: Any,
    optimizer: Any,
    statistics: RunningStatistics,
    batches: list[Any],
    step: int,
) -> Any:
    """One optimizer update: its mean loss (nats) over all processes and micro-batches, and its gradient norm.

    A gradient that is not finite changes nothing, on all processes alike.
    """
    # accelerate divides by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    losses = []
    statistics.begin_update()
    for place, batch in enumerate(batches, start=accelerator.process_index * len(batches)):
        torch.manual_seed(derive_seed(cfg.seed, "depth", step, place))
        draw = np.random.Generator(np.random.Philox(key=derive_seed(cfg.seed, "mix", step, place)))
        pixels, share = mix(batch["pixel_values"], cfg.mixup_alpha, cfg.cutmix_alpha, draw)
        with accelerator.accumulate(model):
            logits = forward(model, pixels, cfg.enlarge)
            targets = mixed_targets(batch["labels"], share, logits.shape[1], cfg.target_threshold)
            loss = loss_sum(logits, targets, cfg.label_smoothing)
            accelerator.backward(loss * scale)
        losses.append(loss.detach())
    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm or math.inf))
    if math.isfinite(grad_norm):
        optimizer.step()
        statistics.end_update(accelerator)
    else:
        statistics.undo_update()
    optimizer.zero_grad()
    return accelerator.reduce(torch.stack(losses).sum(), "sum") / cfg.global_batch_size, grad_norm


def main(cfg: Config) -> None:
    """Train, evaluate, save, and leave a model that `from_pretrained` loads."""
    check_config(cfg)
    run_dir = Path(cfg.output_dir)
    run_folder.check_run_folder(run_dir, cfg.resume, asdict(cfg))
    launch.follow_launcher()
    accelerator = launch.start_accelerator(cfg.timeout_minutes, cfg.report_to, cfg.output_dir, cfg.deterministic)
    if (engine := accelerator.distributed_type.value) in collectives.SHARDED_ENGINES:
        raise cli.UsageError(f"accelerate_configs: {engine}: expected DDP, for LAMB needs the norms of whole matrices")
    micro_batch_size = launch.set_accumulation(accelerator, cfg.global_batch_size, cfg.per_device_batch_size)
    with collectives.raise_together(accelerator):
        hub_id = hub.check_login(cfg.push_to_hub if accelerator.is_main_process else "")

    train, held_out = open_data(cfg, accelerator)
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, micro_batch_size)
        return
    model = build_model(cfg, train.class_names)
    facts = describe(cfg, accelerator, model, train)
    accelerator.print(summary.table(facts))
    model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))
    statistics = RunningStatistics(model)

    step, state = checkpoints.resume_run(accelerator, run_dir, cfg.resume, previous_phase=None)
    skipped = SkippedUpdates(state, cfg.max_bad_updates)
    bad = BadImages(accelerator, len(train), cfg.max_bad_fraction, state.get("bad_images", []))
    updates = open_updates(cfg, accelerator, train, micro_batch_size, step, state.get("streams", []))
    record = {"data": cfg.data, "data_fingerprint": [train.fingerprint, held_out.fingerprint], "init": cfg.init}
    with collectives.raise_together(accelerator):
        hub.check_push(hub_id, private=cfg.hub_private)
        if accelerator.is_main_process:
            run_folder.write_run_record(run_dir, fields.to_yaml(cfg), Path(__file__), {**record, **facts})
    log = RunLog(accelerator, run_dir, step, cfg.max_steps)
    pusher = hub.HubPusher(hub_id, cfg.hub_private)
    profiler = trace_updates(run_dir / "profile") if cfg.profile else None
    throughput = Throughput(facts["flops_per_image"], peak(accelerator) * accelerator.num_processes)
    seconds_before, processor = state.get("training_seconds", 0.0), build_processor(cfg)
    stop = StopSignals()  # before this one, a signal ends a run that has nothing to save
    model.train()
    while step < cfg.max_steps:
        with throughput.waiting_for_data():
            batches, undecoded, stream = next(updates)
        factor = schedules.warmup_cosine(step, cfg.max_steps, cfg.warmup_steps, final_fraction=0.0)
        set_learning_rates(optimizer, factor)
        batches = [to_device(batch, accelerator.device) for batch in batches]
        loss, grad_norm = train_update(cfg, accelerator, model, optimizer, statistics, batches, step)
        step += 1
        throughput.add(samples=cfg.global_batch_size, units=cfg.global_batch_size)
        bad.add(undecoded)
        skipped.count(grad_norm)

        is_last = step == cfg.max_steps or skipped.are_too_many
        is_stopping = collectives.on_any_process(accelerator, stop.received)
        metrics = {}
        if is_last or step % cfg.log_every == 0:
            metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
            metrics |= {"train/grad_norm": grad_norm, "train/skipped_updates": skipped.total}
            metrics |= {"train/bad_images": bad.number(), **throughput.read("images")}
        seconds = seconds_before + throughput.training_seconds
        if step == cfg.max_steps or schedules.is_due(step, cfg.eval_every):
            with throughput.pause():
                evaluation, answers = evaluate(cfg, accelerator, model, held_out, micro_batch_size)
            metrics |= evaluation
            log.write_samples(step, describe_confusions(answers, train.class_names))
        with throughput.pause():
            log.write(step, metrics and {**metrics, "perf/training_seconds": seconds})
            if is_last or is_stopping or bad.are_too_many or schedules.is_due(step, cfg.save_every):
                state = {"training_seconds": seconds, "bad_images": bad.gather(), **skipped.state()}
                if stream:
                    state["streams"] = collectives.gather_objects(accelerator, stream)
                checkpoints.save_checkpoint(accelerator, run_dir, step, state, cfg.keep_checkpoints)
        if schedules.is_due(step, cfg.push_every):
            with throughput.pause():
                export_model(accelerator, model, processor, run_dir)
                pusher.push(run_dir, f"step {step}", f"step-{step}")
        if profiler:
            profiler.step()
        skipped.check(step)
        bad.check()
        if is_stopping and step < cfg.max_steps:
            raise cli.RunStopped(f"saved at step {step} of {cfg.max_steps}; the same command goes on from there")

    export_model(accelerator, model, processor, run_dir)
    _, answers = evaluate(cfg, accelerator, model, held_out, micro_batch_size)
    flops = facts["flops_per_image"] * cfg.global_batch_size * step
    results = {"steps": step, "training_seconds": state["training_seconds"], "training_flops": flops}
    drawn = {}
    if accelerator.is_main_process:
        crops = center_crops(cfg, held_out, micro_batch_size)
        drawn = draw_answers(answers, train.class_names, crops, run_dir / "figures")
    shown = {"pipeline_tag": "image-classification", "usage": USAGE, "results": results, "figures": drawn}
    samples = describe_confusions(answers, train.class_names)
    finish_run(log, pusher, run_dir, **shown, samples=samples, is_main_process=accelerator.is_main_process)
    accelerator.end_training()


def describe(cfg: Config, accelerator: Any, model: Any, train: LabelledImages | ImageStream) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    side = cfg.enlarge * cfg.image_size
    size = train.num_images if isinstance(train, ImageStream) else len(train)
    return {
        "parameters": model.num_parameters(),
        "classes": len(train.class_names),
        "flops_per_image": training_flops(model, {"pixel_values": torch.zeros(1, 3, side, side)}),
        "images_per_update": cfg.global_batch_size,
        "updates_per_epoch": round(size / cfg.global_batch_size, 1) if size else "unknown, streamed",
        **summary.describe_engine(accelerator),
    }


def report_costs(cfg: Config, accelerator: Any, train: Any, micro_batch_size: int) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    cfg = replace(cfg, num_workers=0)
    (micro_batch, *_), *_ = next(open_updates(cfg, accelerator, train, micro_batch_size, cfg.max_steps - 1, []))
    last = to_device(micro_batch, accelerator.device)
    pixels = model_input(last["pixel_values"], cfg.enlarge)
    with dry_run.without_memory():
        model = build_model(cfg, train.class_names)
        facts = describe(cfg, accelerator, model, train)
        costs = dry_run.costs(accelerator, model, {"pixel_values": pixels}, optimizer_bytes_per_parameter=8)
    rows = {**facts, **{name: dry_run.human_bytes(size) for name, size in costs.items()}}
    if dry_run.can_time(accelerator, facts["flops_per_image"] * len(pixels), costs["memory: total"]):
        model = build_model(cfg, train.class_names)
        inputs = {"pixel_values": pixels, "labels": last["labels"]}
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
        rows["one update"] = dry_run.human_seconds(seconds) + (", not compiled" if cfg.compile else "")
        rows["all updates"] = "at most " + dry_run.human_seconds(seconds * cfg.max_steps)
    accelerator.print(summary.table(rows))
    if accelerator.is_main_process:
        (first, *_), *_ = next(open_updates(cfg, accelerator, train, micro_batch_size, 0, []))
        names = [train.class_names[label] for label in first["labels"][:NUM_SHOWN]]
        grid = Path(tempfile.mkdtemp(prefix="dry_run_")) / "images.png"
        figures.image_grid(list(first["pixel_values"][:NUM_SHOWN].numpy()), names, grid)
        accelerator.print(f"training images as the model sees them: {grid}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
