r"""Train the autoencoder of a latent diffusion model: images to small latents and back.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place
from shared.fields import Amount, Count, Natural, RateOfNewWeights, Share

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.Images, fields.HeldOut, fields.RunControl):
    """Fields of the method; Images and HeldOut say where the images are, RunControl what every training stage has."""

    output_dir: Place = "outputs/vae"
    log_every: Count = 20
    eval_every: Natural = 500
    save_every: Natural = 500
    num_workers: Natural = 1

    # Data
    image_size: Count = 64  # Side of the images in pixels, cut as the largest square at a random place.
    mirrored: bool = True  # Mirror half of the squares; not where they show text, which nobody writes mirrored.

    # Model
    block_out_channels: str = "16,32,64"
    """Channels after each stage of the encoder; every stage but the first halves the side."""
    layers_per_block: Count = 1  # Residual blocks of each stage.
    latent_channels: Count = 4  # Channels of the latents.
    norm_num_groups: Count = 8  # Groups of each normalisation; all block_out_channels are multiples of it.
    mid_block_attention: bool = False
    """Attention between all places of the smallest stage, as Stable Diffusion's autoencoder has."""
    init: Place = "scratch"  # scratch, or a run folder or Hub id of an autoencoder of these sizes to start from.

    # Objective
    kl_weight: Amount = 1e-6
    """Weight of the KL divergence from a standard normal distribution, in nats of a whole image."""
    perceptual_model: Place = ""
    """Run folder or Hub id of a ResNet classifier in whose features images are compared as well. "" = none."""
    perceptual_weight: Amount = 1.0  # Weight of that comparison beside the mean absolute error.

    # Optimization
    global_batch_size: Count = 8  # Images of one update, over all processes and micro-batches.
    max_steps: Count = 2500
    max_grad_norm: Amount = 1.0
    learning_rate: RateOfNewWeights = 2e-3  # Peak rate.
    weight_decay: Amount = 0.0  # Decoupled decay of convolutions, not of norms and biases. 0 = none.
    warmup_steps: Natural = 100  # Updates over which the rate rises linearly; then it falls to 0 as a cosine.
    ema_decay: Share = 0.995
    """Share of the old average that an update keeps; the averaged weights are evaluated and saved. 0 = no average."""

    # Evaluation
    best_metric: Literal["", "loss", "psnr", "ssim"] = ""
    """Metric whose best evaluation is kept too, in best/ of the run folder. "" = the last model alone."""


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
from torchmetrics.functional.image import structural_similarity_index_measure
from tqdm import tqdm

from shared.data import left_out
from shared.data.batches import to_device
from shared.data.randomness import derive_seed
from shared.data.subsets import fixed_choice
from shared.data.updates import load_updates
from shared.images import files as image_files
from shared.images.bad_images import BadImages
from shared.images.captioned import source_of
from shared.images.crops import Squares
from shared.images.files import ImageFiles, spread
from shared.images.pixel_range import from_minus_one, to_uint8
from shared.images.square_updates import SquareUpdates
from shared.metrics.figures import image_grid
from shared.models.averaged_weights import AveragedWeights
from shared.models.export import export_module, new_like, whole_weights
from shared.models.pretrained import check_sizes, load_diffusion_model, load_pretrained
from shared.models.resnet import MEAN, STD
from shared.optim import schedules
from shared.optim.optimizers import clip_and_step, decay_of_matrices, set_learning_rates, state_bytes_per_parameter
from shared.performance import dry_run
from shared.performance.flops import training_flops
from shared.run import summary
from shared.run.best import Best
from shared.run.training_run import Run, start
from shared.runtime.collectives import SHARDED_ENGINES, equal_share, gather_objects, node_main_first, rank_of
from shared.runtime.signals import until_stopped

NUM_SHOWN = 8
STATISTICS_FROM = 4096  # images from which the latents' mean and deviation are measured
USAGE = """from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("path/of/this/folder")"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    channels = cli.whole_numbers("block_out_channels", cfg.block_out_channels)
    fits = all(number % cfg.norm_num_groups == 0 for number in channels)
    expected = f"multiples of norm_num_groups {cfg.norm_num_groups}"
    cli.expect(fits, "block_out_channels", cfg.block_out_channels, expected)
    multiple = 2 ** (len(channels) - 1)
    cli.expect(cfg.image_size % multiple == 0, "image_size", cfg.image_size, f"a multiple of {multiple}")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config, accelerator: Any) -> tuple[ImageFiles, ImageFiles]:
    """The images to train on and to evaluate on."""
    source = source_of(cfg.data)
    with node_main_first(accelerator):
        train = image_files.open_files(source, cfg.data_config, cfg.data_split, cfg.image_column)
        eval_split = cfg.eval_split or image_files.validation_split(source, cfg.data_config)
        if eval_split:
            held_out = image_files.open_files(source, cfg.data_config, eval_split, cfg.image_column)
        else:
            train, held_out = image_files.hold_out(train, cfg.eval_fraction)
        image_files.check_sides(source, train, cfg.image_size)
    return train, held_out.subset(fixed_choice(len(held_out), cfg.eval_rows))


def latent_shape(cfg: Config) -> tuple[int, int, int]:
    """Shape of an image's latents: (C, s, s)."""
    side = cfg.image_size // 2 ** (len(cli.whole_numbers("block_out_channels", cfg.block_out_channels)) - 1)
    return cfg.latent_channels, side, side


def open_updates(
    cfg: Config, accelerator: Any, train: ImageFiles, micro_batch_size: int, step: int
) -> Iterator[tuple[list[dict[str, Tensor]], list[str]]]:
    """Updates from `step` on: each this process's micro-batches, and the names of bad images."""
    order = {"seed": cfg.seed, "global_batch_size": cfg.global_batch_size, **rank_of(accelerator)}
    form = {"size": cfg.image_size, "noise_shape": latent_shape(cfg), "micro_batch_size": micro_batch_size}
    updates = SquareUpdates(train, cfg.data, **form, order=order, mirrored=cfg.mirrored)
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
        centred = {"use_quant_conv": True, "use_post_quant_conv": True}  # into which `export` takes the latents' mean
        check_sizes(cfg.init, "an autoencoder", model.config, sizes | centred)
        model.register_to_config(sample_size=cfg.image_size)
    if cfg.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def forward(model: Any, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstructions (B, 3, S, S) of pixels from -1 to 1, KL divergences in nats (B,), and latents (B, C, s, s)."""
    return model(pixel_values=pixels, noise=noise)


def losses(pixels: Tensor, made: Tensor, kl: Tensor, kl_weight: float) -> Tensor:
    """Absolute error and weighted KL divergence of each image (B,), both for one channel of a pixel.

    CompVis's code for Rombach et al. 2022 adds up over all of an image's pixels instead; the relation is the same.
    """
    error = (made.float() - pixels).abs().mean((1, 2, 3))
    return error + kl_weight * kl.float() / pixels[0].numel()


def load_judge(cfg: Config, device: torch.device) -> Any:
    """The frozen classifier of the perceptual loss; None if there is none."""
    if not cfg.perceptual_model:
        return None
    judge = load_pretrained(transformers.ResNetForImageClassification, cfg.perceptual_model, "perceptual_model")
    return judge.eval().requires_grad_(False).to(device)


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
    steps = equal_share(accelerator, math.ceil(len(held_out) / batch_size))
    batches = load_updates(Squares(held_out, cfg.image_size, batch_size), steps, cfg.num_workers, accelerator.device)
    is_quiet = not accelerator.is_main_process or None  # None: where there is no terminal
    totals, shown = torch.zeros(5, dtype=torch.float64), []
    bar = tqdm(batches, total=len(steps), desc="evaluating", delay=2, leave=False, disable=is_quiet)
    for batch in until_stopped(accelerator, bar):
        batch = to_device(batch, accelerator.device)
        true, is_image = batch["pixel_values"], batch["indices"] >= 0
        noise = torch.zeros(len(true), *latent_shape(cfg), device=true.device)
        made, kl, _ = forward(model, from_minus_one(true), noise)
        loss, made = losses(from_minus_one(true), made, kl, cfg.kl_weight), to_uint8(made)
        rows = torch.stack([torch.ones_like(loss), loss, psnr(true, made), ssim(true, made), kl.float()])
        totals += rows[:, is_image].cpu().double().sum(1)
        shown += [pixels[is_image].cpu().numpy() for pixels in (true, made)] if not shown else []
    model.train()
    number, *sums = torch.stack(gather_objects(accelerator, totals)).sum(0).tolist()
    names = ("eval/loss", "eval/psnr", "eval/ssim", "eval/kl")
    metrics = {name: total / number for name, total in zip(names, sums, strict=True)}
    return {**metrics, "eval/skipped": len(held_out) - int(number)}, shown


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


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW with the betas of CompVis's code for Rombach et al. 2022."""
    groups = decay_of_matrices(model, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.5, 0.9), fused=True)


def train_update(
    cfg: Config, accelerator: Any, model: Any, judge: Any, optimizer: Any, batches: list[Any]
) -> tuple[Tensor, Tensor]:
    """One optimizer update: its mean loss over all processes and micro-batches, and its gradient norm."""
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        pixels = from_minus_one(batch["pixel_values"])
        with accelerator.accumulate(model):
            made, kl, _ = forward(model, pixels, batch["noise"])
            loss = losses(pixels, made, kl, cfg.kl_weight).sum()
            if judge is not None:
                loss = loss + cfg.perceptual_weight * perceptual_losses(judge, pixels, made).sum()
            accelerator.backward(loss * scale)
        total += loss.detach()
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
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
    some = spread(len(train), STATISTICS_FROM)
    squares = Squares(train.subset(np.array(some)), cfg.image_size, batch_size)
    steps = equal_share(accelerator, math.ceil(len(some) / batch_size))
    totals = torch.zeros(3, cfg.latent_channels, dtype=torch.float64)
    for batch in load_updates(squares, steps, cfg.num_workers, accelerator.device):
        batch = to_device(batch, accelerator.device)
        noise = torch.zeros(len(batch["indices"]), *latent_shape(cfg), device=accelerator.device)
        _, _, latents = forward(model, from_minus_one(batch["pixel_values"]), noise)
        kept = latents[batch["indices"] >= 0].cpu().double()
        ones = torch.full((cfg.latent_channels,), kept[:, 0].numel(), dtype=torch.float64)
        totals += torch.stack([ones, kept.sum((0, 2, 3)), kept.square().sum((0, 2, 3))])
    model.train()
    number, sums, squares_sums = torch.stack(gather_objects(accelerator, totals)).sum(0)
    mean = sums / number
    return mean.float(), float((squares_sums / number - mean.square()).mean().sqrt())


def export(accelerator: Any, cfg: Config, model: Any, mean: Tensor, deviation: float, run_dir: Path) -> None:
    """Write the autoencoder, its latents moved to mean zero, with the factor that makes their variance one.

    Pipelines know that factor but no mean, so the convolutions on both sides of the latents take the mean in; what is
    decoded stays. Every process calls this.
    """
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        bare = new_like(AutoencoderKL, accelerator.unwrap_model(model))
        bare.load_state_dict(weights)
        with torch.no_grad():
            bare.post_quant_conv.bias += bare.post_quant_conv.weight[:, :, 0, 0] @ mean
            bare.quant_conv.bias[: cfg.latent_channels] -= mean
        # Of a model to start from these are out of date now.
        bare.register_to_config(scaling_factor=1 / deviation, shift_factor=None, latents_mean=None, latents_std=None)
        export_module(bare, run_dir)
    accelerator.wait_for_everyone()


def main(cfg: Config) -> None:
    """Train, evaluate, save, and leave an autoencoder that `from_pretrained` loads."""
    check_config(cfg)
    accelerator, micro_batch_size = start(cfg)
    train, held_out = open_data(cfg, accelerator)
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, len(held_out), micro_batch_size)
        return
    model = build_model(cfg)
    facts = describe(cfg, accelerator, model, train)
    accelerator.print(summary.table(facts))
    if accelerator.distributed_type.value not in SHARDED_ENGINES:  # which cut weights into flat parts
        model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    judge = load_judge(cfg, accelerator.device)
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best, (due, metrics) = Best(cfg.best_metric and f"eval/{cfg.best_metric}", run.state), run.owed
    average = AveragedWeights(model, cfg.ema_decay, run.state.get("tensors", {}))
    bad = BadImages(accelerator, len(train), cfg.max_bad_fraction, run.state.get("bad_images", []))
    updates = open_updates(cfg, accelerator, train, micro_batch_size, run.step)
    fingerprints = [train.fingerprint(), held_out.fingerprint()]
    run.record(Path(__file__), {"data": cfg.data, "data_fingerprint": fingerprints, "init": cfg.init, **facts})
    model.train()
    for step, update in run.updates(updates, facts["flops_per_image"]):
        if update:  # else the evaluation alone is left, which a signal had ended
            batches, undecoded = update
            factor = schedules.warmup_cosine(step, cfg.max_steps, cfg.warmup_steps)
            set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
            batches = [to_device(batch, accelerator.device) for batch in batches]
            loss, grad_norm = train_update(cfg, accelerator, model, judge, optimizer, batches)
            average.update(step + 1)
            bad.add(undecoded)

            due = run.count_update(grad_norm, samples=cfg.global_batch_size, units=cfg.global_batch_size)
            metrics = {}
            if due.log:
                metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
                metrics |= {
                    "train/grad_norm": grad_norm.item(),
                    **run.rates("images"),
                    "train/bad_images": bad.number(),
                }
        if due.evaluate:
            with run.evaluation(metrics), average.in_place():
                metrics |= evaluate(cfg, accelerator, model, held_out, micro_batch_size)[0]
                if best.is_better(run.step, metrics, ""):
                    statistics = latent_statistics(cfg, accelerator, model, train, micro_batch_size)
                    export(accelerator, cfg, model, *statistics, run.folder / best.FOLDER)
        with run.pause():
            run.write(metrics)
            if due.save or bad.are_too_many:
                run.save({"bad_images": bad.gather(), "tensors": average.tensors(), **best.state()})
            if due.push:
                with average.in_place():
                    statistics = latent_statistics(cfg, accelerator, model, train, micro_batch_size)
                    export(accelerator, cfg, model, *statistics, run.folder)
                run.push()
        bad.check()

    with average.in_place():
        _, shown = evaluate(cfg, accelerator, model, held_out, micro_batch_size)
        mean, deviation = latent_statistics(cfg, accelerator, model, train, micro_batch_size)
        export(accelerator, cfg, model, mean, deviation, run.folder)
    drawn = {}
    if accelerator.is_main_process:
        pairs = [image for pair in zip(*shown, strict=True) for image in pair][: 2 * NUM_SHOWN]
        image_grid(pairs, ["original", "reconstruction"] * NUM_SHOWN, run.folder / "figures" / "images.png")
        drawn = {"Held-out images and their reconstructions": "images.png"}
    results = {"training_flops": facts["flops_per_image"] * cfg.global_batch_size * run.step}
    results |= {"latents_mean": mean.tolist(), "latents_std": deviation, **best.kept()}
    samples = f"latents: mean {', '.join(f'{value:.3f}' for value in mean.tolist())}, deviation {deviation:.3f}"
    run.finish("image-to-image", USAGE, results=results, samples=samples, figures=drawn)


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
        "left_out": left_out.counts(),
        **summary.describe_engine(accelerator),
    }


def report_costs(cfg: Config, accelerator: Any, train: ImageFiles, num_held_out: int, micro_batch_size: int) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    (first, *_), _ = next(open_updates(replace(cfg, num_workers=0), accelerator, train, micro_batch_size, 0))
    batch, seconds = to_device(first, accelerator.device), None
    inputs = {"pixel_values": from_minus_one(batch["pixel_values"]), "noise": batch["noise"]}
    with dry_run.without_memory():
        model = build_model(cfg)
        facts = describe(cfg, accelerator, model, train)
        state = state_bytes_per_parameter(build_optimizer(cfg, model)) + (4 if cfg.ema_decay else 0)  # of the average
        costs = dry_run.costs(accelerator, model, inputs, state)
    if dry_run.can_time(accelerator, facts["flops_per_image"] * micro_batch_size, costs["memory: total"]):
        model = build_model(cfg)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    batches = dry_run.num_batches(accelerator, [num_held_out], len(batch["noise"]))
    rows |= dry_run.evaluation_rows(cfg, seconds, batches)
    accelerator.print(summary.table(rows))
    if accelerator.is_main_process:
        grid = Path(tempfile.mkdtemp(prefix="dry_run_")) / "images.png"
        image_grid(list(first["pixel_values"].numpy()[: 2 * NUM_SHOWN]), [""] * 2 * NUM_SHOWN, grid)
        accelerator.print(f"training images as the model sees them: {grid}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
