"""Train the autoencoder of a latent diffusion model: images to small latents and back.

Papers: Kingma and Welling 2014 (variational autoencoders), Rombach et al. 2022 (latent diffusion; section 3.1 and
appendix G for this stage), Zhang et al. 2018 (perceptual distance). There is no discriminator: recipes/text_to_image/
README.md says what it would add. With no arguments it trains on the embedded emoji on two CPU cores in minutes.

    accelerate launch recipes/text_to_image/train_vae.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/text_to_image/train_vae.py \
        --data me/images --image_size 256 --block_out_channels 128,256,512,512 --layers_per_block 2
"""

# Shapes: B images of a micro-batch, S side of an image, C channels of the latents, s side of the latents.
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.RunControl):
    """Fields of the method; RunControl has those that every recipe shares."""

    output_dir: str = "outputs/vae"
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
    """sample, a .parquet or .tar file, a folder of them or of images, or a Hub data set id."""
    data_config: str = ""
    """Configuration of a Hub data set. "" = its only one."""
    data_split: str = "train"
    """Split to train on."""
    eval_split: str = ""
    """Split to evaluate on. "" = the first whose name begins with validation, val or test, else eval_fraction is
    held out."""
    eval_fraction: float = 0.05
    """Share of the images held out where there is no split to evaluate on."""
    image_column: str = ""
    """Column of the images. "" = the only one that holds images."""
    max_bad_fraction: float = 0.01
    """Share of the images that may turn out damaged before the run stops; they are replaced, and named in the log."""

    image_size: int = 64
    """Side of the images in pixels, cut as the largest square at a random place."""
    block_out_channels: str = "16,32,64"
    """Channels after each stage of the encoder; every stage but the first halves the side."""
    layers_per_block: int = 1
    """Residual blocks of each stage."""
    latent_channels: int = 4
    """Channels of the latents."""
    norm_num_groups: int = 8
    """Groups of each normalisation; all block_out_channels are multiples of it."""
    mid_block_attention: bool = False
    """Attention between all places of the smallest stage, as Stable Diffusion's autoencoder has."""
    init: str = "scratch"
    """scratch, or a run folder or Hub id of an autoencoder of these sizes to start from."""

    kl_weight: float = 1e-6
    """Weight of the KL divergence from a standard normal distribution, in nats of a whole image."""
    perceptual_model: str = ""
    """Run folder or Hub id of a ResNet classifier in whose features images are compared as well. "" = none."""
    perceptual_weight: float = 1.0
    """Weight of that comparison beside the mean absolute error."""

    global_batch_size: int = 8
    """Images of one update, over all processes and micro-batches."""
    per_device_batch_size: int = 0
    """Images of one micro-batch on one process. 0 = the process's whole share."""
    max_steps: int = 2500
    """Optimizer updates."""
    learning_rate: float = 2e-3
    """Peak rate."""
    weight_decay: float = 0.0
    """Decoupled decay of convolutions, not of norms and biases. 0 = none."""
    max_grad_norm: float = 1.0
    """Norm to which the update's gradient is clipped. 0 = no clipping."""
    warmup_steps: int = 100
    """Updates over which the rate rises linearly; then it falls to 0 as a cosine."""
    ema_decay: float = 0.995
    """Share of the old average that an update keeps; the averaged weights are evaluated and saved. 0 = no average."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import math
import tempfile

import diffusers
import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import Dataset
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from shared.data.batches import to_device
from shared.data.randomness import derive_seed, normal_numbers, uniform_numbers
from shared.data.sample_order import samples_of_update
from shared.data.updates import load_updates
from shared.images import files as image_files
from shared.images.bad_images import BadImages, candidates
from shared.images.captioned import SAMPLE
from shared.images.crops import SQUARE_DRAWS, Squares, random_square
from shared.images.decoding import BadImage, EncodedImage
from shared.images.files import ImageFiles, spread
from shared.metrics import figures
from shared.models.averaged_weights import AveragedWeights
from shared.models.export import export_module
from shared.models.pretrained import check_sizes, load_diffusion_model, load_pretrained
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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, what a ResNet classifier expects
NUM_SHOWN = 8
STATISTICS_FROM = 4096  # images from which the latents' mean and deviation are measured
USAGE = """from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("path/of/this/folder")"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what can be told wrong from the fields alone."""
    fields.check_run_control(cfg)
    cli.expect_at_least(cfg, 1, "image_size", "layers_per_block", "latent_channels", "norm_num_groups")
    cli.expect_at_least(cfg, 1, "global_batch_size", "max_steps")
    cli.expect_at_least(cfg, 0, "per_device_batch_size", "warmup_steps", "weight_decay", "max_grad_norm")
    cli.expect_at_least(cfg, 0, "kl_weight", "perceptual_weight")
    cli.expect(cfg.learning_rate > 0, "learning_rate", cfg.learning_rate, "more than 0")
    for field in ("ema_decay", "max_bad_fraction"):
        cli.expect(0 <= getattr(cfg, field) < 1, field, getattr(cfg, field), "a share in [0, 1)")
    cli.expect(0 < cfg.eval_fraction < 1, "eval_fraction", cfg.eval_fraction, "a share in (0, 1)")
    channels = cli.whole_numbers("block_out_channels", cfg.block_out_channels)
    fits = all(number % cfg.norm_num_groups == 0 for number in channels)
    cli.expect(
        fits, "block_out_channels", cfg.block_out_channels, f"multiples of norm_num_groups {cfg.norm_num_groups}"
    )
    multiple = 2 ** (len(channels) - 1)
    cli.expect(cfg.image_size % multiple == 0, "image_size", cfg.image_size, f"a multiple of {multiple}")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config, accelerator: Any) -> tuple[ImageFiles, ImageFiles]:
    """The images to train on and to evaluate on."""
    source = str(SAMPLE) if cfg.data == "sample" else cfg.data
    with collectives.node_main_first(accelerator):
        train = image_files.open_files(source, cfg.data_config, cfg.data_split, cfg.image_column)
        eval_split = cfg.eval_split or image_files.validation_split(source, cfg.data_config)
        if eval_split:
            held_out = image_files.open_files(source, cfg.data_config, eval_split, cfg.image_column)
        else:
            train, held_out = image_files.hold_out(train, cfg.eval_fraction)
        image_files.check_sides(source, train, cfg.image_size)
    return train, held_out


def latent_shape(cfg: Config) -> tuple[int, int, int]:
    """Shape of an image's latents: (C, s, s)."""
    side = cfg.image_size // 2 ** (len(cli.whole_numbers("block_out_channels", cfg.block_out_channels)) - 1)
    return cfg.latent_channels, side, side


class CroppedUpdates(Dataset):
    """Item `step` is what update `step` sees on this process: a function of seed and step, whoever reads it.

    Args:
        cfg: of the run.
        train: images to train on.
        micro_batch_size: images of a micro-batch.
        order: seed, global_batch_size, rank and num_processes.
    """

    def __init__(self, cfg: Config, train: ImageFiles, micro_batch_size: int, order: dict[str, int]) -> None:
        self._cfg, self._train, self._micro_batch_size, self._order = cfg, train, micro_batch_size, order

    def __getitem__(self, step: int) -> tuple[list[dict[str, np.ndarray]], list[str]]:
        """The micro-batches of update `step`, and the names of images that could not be decoded."""
        cfg, bad = self._cfg, []
        _, epochs, indices = np.transpose(samples_of_update(step, [len(self._train)], [1.0], **self._order))
        draws = uniform_numbers(derive_seed(cfg.seed, "crop"), epochs, indices, count=SQUARE_DRAWS).tolist()
        drawn = zip(epochs.tolist(), indices.tolist(), draws, strict=True)
        pixels = np.stack([self._read(*where, bad) for where in drawn])
        shape = latent_shape(cfg)
        noise = normal_numbers(derive_seed(cfg.seed, "noise"), epochs, indices, count=math.prod(shape))
        update = {"pixel_values": pixels, "noise": noise.astype(np.float32).reshape(-1, *shape)}
        starts = range(0, len(pixels), self._micro_batch_size)
        cuts = [slice(start, start + self._micro_batch_size) for start in starts]
        return [{name: values[cut] for name, values in update.items()} for cut in cuts], bad

    def _read(self, epoch: int, index: int, draws: list[float], bad: list[str]) -> np.ndarray:
        """A square of the image, or of the first replacement that can be decoded; what cannot goes to `bad`."""
        for candidate in candidates(index, len(self._train), self._cfg.seed, epoch):
            try:
                return random_square(EncodedImage(self._train.read(candidate)), self._cfg.image_size, draws)
            except BadImage:
                bad.append(self._train.name(candidate))
        raise cli.UsageError(f"data: {self._cfg.data!r}: expected images that can be decoded")


def open_updates(
    cfg: Config, accelerator: Any, train: ImageFiles, micro_batch_size: int, step: int
) -> Iterator[tuple[list[dict[str, Tensor]], list[str]]]:
    """Updates from `step` on: each this process's micro-batches, and the names of bad images."""
    rank = {"rank": accelerator.process_index, "num_processes": accelerator.num_processes}
    order = {"seed": cfg.seed, "global_batch_size": cfg.global_batch_size, **rank}
    updates = CroppedUpdates(cfg, train, micro_batch_size, order)
    return load_updates(updates, range(step, cfg.max_steps), cfg.num_workers, accelerator.device)


# ----------------------------------------------------------------------------------------------------------------------
# Model


class AutoencoderKL(diffusers.AutoencoderKL):
    """The library's class, under its name, which is what config.json will say, with one `forward` for training.

    Engines gather weights inside the wrapped `forward` only.
    """

    _no_split_modules = ("ResnetBlock2D",)  # accelerate wants each under FSDP2, and the library's list has others

    def forward(self, pixel_values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstructions (B, 3, S, S), KL divergences in nats (B,), and latents (B, C, s, s)."""
        posterior = self.encode(pixel_values).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.decode(latents).sample, posterior.kl(), latents


def build_model(cfg: Config) -> AutoencoderKL:
    """A model from `init`, or a new one, in float32."""
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    channels = cli.whole_numbers("block_out_channels", cfg.block_out_channels)
    sizes = {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "block_out_channels": tuple(channels),
        "layers_per_block": cfg.layers_per_block,
        "latent_channels": cfg.latent_channels,
        "norm_num_groups": cfg.norm_num_groups,
        "mid_block_add_attention": cfg.mid_block_attention,
    }
    if cfg.init == "scratch":
        model = AutoencoderKL(**sizes, sample_size=cfg.image_size)
    else:
        model = load_diffusion_model(AutoencoderKL, cfg.init, "init")
        check_sizes(cfg.init, "an autoencoder", model.config, sizes)
        model.register_to_config(sample_size=cfg.image_size)
    if cfg.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def scaled(pixels: Tensor) -> Tensor:
    """uint8 images (B, S, S, 3) as float32 (B, 3, S, S) from -1 to 1, channels-last in memory."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def forward(model: Any, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstructions (B, 3, S, S) of pixels from -1 to 1, KL divergences in nats (B,), and latents (B, C, s, s)."""
    return model(pixel_values=pixels, noise=noise)


def losses(pixels: Tensor, made: Tensor, kl: Tensor, kl_weight: float) -> Tensor:
    """Absolute error and weighted KL divergence of each image (B,), both for one channel of a pixel.

    CompVis's code for Rombach et al. 2022 adds up over all of an image's pixels instead; the relation is the same.
    """
    error = (made.float() - pixels).abs().mean((1, 2, 3))
    return error + kl_weight * kl.float() / pixels[0].numel()


def perceptual_losses(judge: Any, pixels: Tensor, made: Tensor) -> Tensor:
    """Squared distance between unit-length features, mean over places, summed over stages, of each image (B,).

    Zhang et al. 2018, equation 1, with all weights one; their networks are others.
    """
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (MEAN, STD))
    stages = [
        judge(pixel_values=((images.float() + 1) / 2 - mean) / std, output_hidden_states=True).hidden_states
        for images in (pixels, made)
    ]
    distances = []
    for stage in zip(*stages, strict=True):
        one, other = (normalize(features.float(), dim=1) for features in stage)
        distances.append((one - other).square().sum(1).mean((1, 2)))
    return torch.stack(distances).sum(0)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.compiler.set_stance("force_eager")  # else compiled anew for each shape, and for no gradients
@torch.no_grad()
def evaluate(
    cfg: Config, accelerator: Any, model: Any, held_out: ImageFiles, batch_size: int
) -> tuple[dict[str, float], list[np.ndarray]]:
    """Errors of the reconstructions of every image once, from the mean of its latents, and some of both."""
    model.eval()
    processes = accelerator.num_processes
    steps = range(accelerator.process_index, math.ceil(len(held_out) / batch_size / processes) * processes, processes)
    batches = load_updates(Squares(held_out, cfg.image_size, batch_size), steps, cfg.num_workers, accelerator.device)
    is_quiet = not accelerator.is_main_process or None  # None: where there is no terminal
    totals, shown = torch.zeros(5, dtype=torch.float64), []
    for batch in tqdm(batches, total=len(steps), desc="evaluating", delay=2, leave=False, disable=is_quiet):
        batch = to_device(batch, accelerator.device)
        true, is_image = batch["pixel_values"], batch["indices"] >= 0
        noise = torch.zeros(len(true), *latent_shape(cfg), device=true.device)
        made, kl, _ = forward(model, scaled(true), noise)
        loss, made = losses(scaled(true), made, kl, cfg.kl_weight), to_uint8(made)
        rows = torch.stack([torch.ones_like(loss), loss, psnr(true, made), ssim(true, made), kl.float()])
        totals += rows[:, is_image].double().sum(1).cpu()
        shown += [pixels[is_image].cpu().numpy() for pixels in (true, made)] if not shown else []
    model.train()
    number, *sums = torch.stack(collectives.gather_objects(accelerator, totals)).sum(0).tolist()
    names = ("eval/loss", "eval/psnr", "eval/ssim", "eval/kl")
    metrics = {name: total / number for name, total in zip(names, sums, strict=True)}
    return {**metrics, "eval/skipped": len(held_out) - int(number)}, shown


def to_uint8(made: Tensor) -> Tensor:
    """Images (B, 3, S, S) from -1 to 1 as uint8 (B, S, S, 3)."""
    return ((made.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def psnr(true: Tensor, made: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each of two batches of uint8 images (B, S, S, 3)."""
    squared = (made.float() - true.float()).square().mean((1, 2, 3))
    return 10 * torch.log10(255**2 / squared.clamp(min=1e-6))


def ssim(true: Tensor, made: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each of two batches of uint8 images (B, S, S, 3)."""
    pairs = (pixels.permute(0, 3, 1, 2).float() for pixels in (made, true))
    return structural_similarity_index_measure(*pairs, data_range=255.0, reduction="none")


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_update(
    cfg: Config, accelerator: Any, model: Any, judge: Any, optimizer: Any, batches: list[Any]
) -> tuple[Tensor, float]:
    """One optimizer update: its mean loss over all processes and micro-batches, and its gradient norm.

    A gradient that is not finite changes nothing, on all processes alike; DeepSpeed, which steps inside the backward
    pass, finds that by itself.
    """
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        pixels = scaled(batch["pixel_values"])
        with accelerator.accumulate(model):
            made, kl, _ = forward(model, pixels, batch["noise"])
            loss = losses(pixels, made, kl, cfg.kl_weight).sum()
            if judge is not None:
                loss = loss + cfg.perceptual_weight * perceptual_losses(judge, pixels, made).sum()
            accelerator.backward(loss * scale)
        total += loss.detach()
    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm or math.inf))
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, "sum") / cfg.global_batch_size, grad_norm


@torch.compiler.set_stance("force_eager")  # else compiled anew for each shape, and for no gradients
@torch.no_grad()
def latent_statistics(
    cfg: Config, accelerator: Any, model: Any, train: ImageFiles, batch_size: int
) -> tuple[Tensor, float]:
    """Mean of each channel of training images' latents (C,), and the deviation of all from these means.

    Rombach et al. 2022, section 4.3.2 and appendix G: diffusion expects latents of about unit variance.
    """
    model.eval()
    processes, some = accelerator.num_processes, spread(len(train), STATISTICS_FROM)
    squares = Squares(train.subset(np.array(some)), cfg.image_size, batch_size)
    steps = range(accelerator.process_index, math.ceil(len(some) / batch_size / processes) * processes, processes)
    totals = torch.zeros(3, cfg.latent_channels, dtype=torch.float64)
    for batch in load_updates(squares, steps, cfg.num_workers, accelerator.device):
        batch = to_device(batch, accelerator.device)
        noise = torch.zeros(len(batch["indices"]), *latent_shape(cfg), device=accelerator.device)
        _, _, latents = forward(model, scaled(batch["pixel_values"]), noise)
        kept = latents[batch["indices"] >= 0].double().cpu()
        ones = torch.full((cfg.latent_channels,), kept[:, 0].numel(), dtype=torch.float64)
        totals += torch.stack([ones, kept.sum((0, 2, 3)), kept.square().sum((0, 2, 3))])
    model.train()
    number, sums, squares_sums = torch.stack(collectives.gather_objects(accelerator, totals)).sum(0)
    mean = sums / number
    return mean.float(), float((squares_sums / number - mean.square()).mean().sqrt())


def export(accelerator: Any, cfg: Config, model: Any, mean: Tensor, deviation: float, run_dir: Path) -> None:
    """Write the autoencoder, its latents moved to mean zero, with the factor that makes their variance one.

    Pipelines know that factor but no mean, so the convolutions on both sides of the latents take the mean in; what is
    decoded stays. Every process calls this.
    """
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        bare = build_model(replace(cfg, init="scratch"))
        bare.load_state_dict({name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()})
        with torch.no_grad():
            bare.post_quant_conv.bias += bare.post_quant_conv.weight[:, :, 0, 0] @ mean
            bare.quant_conv.bias[: cfg.latent_channels] -= mean
        bare.register_to_config(scaling_factor=1 / deviation)
        export_module(bare, run_dir)
    accelerator.wait_for_everyone()


def main(cfg: Config) -> None:
    """Train, evaluate, save, and leave an autoencoder that `from_pretrained` loads."""
    check_config(cfg)
    run_dir = Path(cfg.output_dir)
    run_folder.check_run_folder(run_dir, cfg.resume, asdict(cfg))
    launch.follow_launcher()
    accelerator = launch.start_accelerator(cfg.timeout_minutes, cfg.report_to, cfg.output_dir, cfg.deterministic)
    micro_batch_size = launch.set_accumulation(accelerator, cfg.global_batch_size, cfg.per_device_batch_size)
    launch.set_deepspeed_values(accelerator, micro_batch_size, cfg.max_grad_norm)
    with collectives.raise_together(accelerator):
        hub_id = hub.check_login(cfg.push_to_hub if accelerator.is_main_process else "")

    train, held_out = open_data(cfg, accelerator)
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, micro_batch_size)
        return
    model = build_model(cfg)
    facts = describe(cfg, accelerator, model, train)
    accelerator.print(summary.table(facts))
    if accelerator.distributed_type.value not in collectives.SHARDED_ENGINES:  # which cut weights into flat parts
        model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    judge = load_judge(cfg, accelerator.device)
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))

    step, state = checkpoints.resume_run(accelerator, run_dir, cfg.resume, previous_phase=None)
    skipped = SkippedUpdates(state, cfg.max_bad_updates)
    average = AveragedWeights(accelerator, model, cfg.ema_decay, state.get("tensors", {}))
    bad = BadImages(accelerator, len(train), cfg.max_bad_fraction, state.get("bad_images", []))
    updates = open_updates(cfg, accelerator, train, micro_batch_size, step)
    fingerprints = [train.fingerprint(), held_out.fingerprint()]
    record = {"data": cfg.data, "data_fingerprint": fingerprints, "init": cfg.init}
    with collectives.raise_together(accelerator):
        hub.check_push(hub_id, private=cfg.hub_private)
        if accelerator.is_main_process:
            run_folder.write_run_record(run_dir, fields.to_yaml(cfg), Path(__file__), {**record, **facts})
    log = RunLog(accelerator, run_dir, step, cfg.max_steps)
    pusher = hub.HubPusher(hub_id, cfg.hub_private)
    profiler = trace_updates(run_dir / "profile") if cfg.profile else None
    throughput = Throughput(facts["flops_per_image"], peak(accelerator) * accelerator.num_processes)
    seconds_before = state.get("training_seconds", 0.0)
    stop = StopSignals()  # before this one, a signal ends a run that has nothing to save
    model.train()
    while step < cfg.max_steps:
        with throughput.waiting_for_data():
            batches, undecoded = next(updates)
        factor = schedules.warmup_cosine(step, cfg.max_steps, cfg.warmup_steps, final_fraction=0.0)
        set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
        batches = [to_device(batch, accelerator.device) for batch in batches]
        loss, grad_norm = train_update(cfg, accelerator, model, judge, optimizer, batches)
        step += 1
        average.update(step)
        throughput.add(samples=cfg.global_batch_size, units=cfg.global_batch_size)
        bad.add(undecoded)
        skipped.count(grad_norm)

        is_last = step == cfg.max_steps or skipped.are_too_many
        is_stopping = collectives.on_any_process(accelerator, stop.received)
        metrics = {}
        if is_last or step % cfg.log_every == 0:
            metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
            metrics |= {"train/grad_norm": grad_norm, "train/skipped_updates": skipped.total}
            metrics |= {**throughput.read("images"), "train/bad_images": bad.number()}
        seconds = seconds_before + throughput.training_seconds
        if step == cfg.max_steps or schedules.is_due(step, cfg.eval_every):
            with throughput.pause(), average.in_place():
                evaluation, shown = evaluate(cfg, accelerator, model, held_out, micro_batch_size)
            metrics |= evaluation
        with throughput.pause():
            log.write(step, metrics and {**metrics, "perf/training_seconds": seconds})
            if is_last or is_stopping or bad.are_too_many or schedules.is_due(step, cfg.save_every):
                state = {"training_seconds": seconds, **skipped.state()}
                state |= {"bad_images": bad.gather(), "tensors": average.tensors()}
                checkpoints.save_checkpoint(accelerator, run_dir, step, state, cfg.keep_checkpoints)
        if schedules.is_due(step, cfg.push_every):
            with throughput.pause(), average.in_place():
                statistics = latent_statistics(cfg, accelerator, model, train, micro_batch_size)
                export(accelerator, cfg, model, *statistics, run_dir)
                pusher.push(run_dir, f"step {step}", f"step-{step}")
        if profiler:
            profiler.step()
        skipped.check(step)
        bad.check()
        if is_stopping and step < cfg.max_steps:
            raise cli.RunStopped(f"saved at step {step} of {cfg.max_steps}; the same command goes on from there")

    with average.in_place():
        _, shown = evaluate(cfg, accelerator, model, held_out, micro_batch_size)
        mean, deviation = latent_statistics(cfg, accelerator, model, train, micro_batch_size)
        export(accelerator, cfg, model, mean, deviation, run_dir)
    drawn = {}
    if accelerator.is_main_process:
        pairs = [image for pair in zip(*shown, strict=True) for image in pair][: 2 * NUM_SHOWN]
        figures.image_grid(pairs, ["original", "reconstruction"] * NUM_SHOWN, run_dir / "figures" / "images.png")
        drawn = {"Held-out images and their reconstructions": "images.png"}
    flops = facts["flops_per_image"] * cfg.global_batch_size * step
    results = {"steps": step, "training_seconds": state["training_seconds"], "training_flops": flops}
    results |= {"latents_mean": mean.tolist(), "latents_std": deviation}
    samples = f"latents: mean {', '.join(f'{value:.3f}' for value in mean.tolist())}, deviation {deviation:.3f}"
    card = {"pipeline_tag": "image-to-image", "usage": USAGE, "results": results, "figures": drawn}
    finish_run(log, pusher, run_dir, **card, samples=samples, is_main_process=accelerator.is_main_process)
    accelerator.end_training()


def load_judge(cfg: Config, device: torch.device) -> Any:
    """The frozen classifier of the perceptual loss; None if there is none."""
    if not cfg.perceptual_model:
        return None
    judge = load_pretrained(transformers.ResNetForImageClassification, cfg.perceptual_model, "perceptual_model")
    return judge.eval().requires_grad_(False).to(device)


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW with the betas of CompVis's code for Rombach et al. 2022."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.5, 0.9), fused=True)


def describe(cfg: Config, accelerator: Any, model: Any, train: ImageFiles) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    image = torch.zeros(1, 3, cfg.image_size, cfg.image_size)
    channels, *sides = latent_shape(cfg)
    return {
        "parameters": model.num_parameters(),
        "latents": f"{channels} x {sides[0]} x {sides[1]}",
        "flops_per_image": training_flops(model, {"pixel_values": image, "noise": torch.zeros(1, channels, *sides)}),
        "images_per_update": cfg.global_batch_size,
        "updates_per_epoch": round(len(train) / cfg.global_batch_size, 1),
        **summary.describe_engine(accelerator),
    }


def report_costs(cfg: Config, accelerator: Any, train: ImageFiles, micro_batch_size: int) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    cfg = replace(cfg, num_workers=0)
    (first, *_), _ = next(open_updates(cfg, accelerator, train, micro_batch_size, 0))
    batch = to_device(first, accelerator.device)
    inputs = {"pixel_values": scaled(batch["pixel_values"]), "noise": batch["noise"]}
    with dry_run.without_memory():
        model = build_model(cfg)
        facts = describe(cfg, accelerator, model, train)
        state = 12 if cfg.ema_decay else 8  # AdamW's, and the average
        costs = dry_run.costs(accelerator, model, inputs, optimizer_bytes_per_parameter=state)
    rows = {**facts, **{name: dry_run.human_bytes(size) for name, size in costs.items()}}
    if dry_run.can_time(accelerator, facts["flops_per_image"] * micro_batch_size, costs["memory: total"]):
        model = build_model(cfg)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
        rows["one update"] = dry_run.human_seconds(seconds) + (", not compiled" if cfg.compile else "")
        rows["all updates"] = dry_run.human_seconds(seconds * cfg.max_steps)
    accelerator.print(summary.table(rows))
    if accelerator.is_main_process:
        grid = Path(tempfile.mkdtemp(prefix="dry_run_")) / "images.png"
        figures.image_grid(list(first["pixel_values"].numpy()[: 2 * NUM_SHOWN]), [""] * 2 * NUM_SHOWN, grid)
        accelerator.print(f"training images as the model sees them: {grid}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
