"""Pre-train a text-to-image model from scratch: flow matching with a transformer that reads captions.

Papers: Liu et al. 2022 and Lipman et al. 2022 (flow matching), Esser et al. 2024 (its times), Krause et al. 2025
(routed tokens), Ho and Salimans 2022 (guidance); the transformer is Photoroom's PRX. With no arguments it trains on the
embedded emoji, whose latents it makes at the first start, on two CPU cores in minutes.

    accelerate launch recipes/text_to_image/pretrain_transformer.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/text_to_image/pretrain_transformer.py \
        --config recipes/text_to_image/configs/transformer_300m_256.yaml --data me/latents --output_dir outputs/300m
"""

# Shapes: B samples of a micro-batch, C, h, w of the latents, N image tokens, K of them that skip no block, L tokens of
# a caption, D width of the text encoder.
import sys
from collections.abc import Iterator, Sequence
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

    output_dir: str = "outputs/text_to_image_transformer"
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
    """Folder that cache_latents.py made, or sample: outputs/latents, which must be of the embedded emoji, or, if it is
    not there, their latents made in cache_dir."""
    data_split: str = "train"
    """Split to train on."""
    eval_splits: str = ""
    """Splits to evaluate on, comma-separated. "" = those whose names begin with validation, val or test, else
    eval_fraction is held out."""
    eval_fraction: float = 0.05
    """Share of the samples held out where there is no split to evaluate on."""
    eval_samples: int = 200
    """Samples of each split that are evaluated, at most."""
    vae: str = ""
    """Run folder of train_vae.py, or Hub id of an autoencoder, with which the latents were made. "" = outputs/vae, or
    the shipped one if that is not there."""

    text_encoder: str = "scratch"
    """scratch = a CLIP text encoder trained along, or a run folder or Hub id of one that stays as it is and with which
    cache_latents.py made embeddings, of captions as they are: the pipeline then takes skip_text_cleaning=True."""
    vocab_size: int = 2048
    """Tokens of the tokenizer that is trained on the captions, for a text encoder from scratch."""
    caption_length: int = 32
    """Tokens of a caption, start and end included, for a text encoder from scratch; longer ones are cut."""
    text_hidden_size: int = 128
    """Width of the text encoder from scratch."""
    text_num_layers: int = 2
    """Layers of the text encoder from scratch."""
    text_num_heads: int = 4
    """Attention heads of the text encoder from scratch."""

    patch_size: int = 2
    """Side of the squares of latents that are one image token."""
    hidden_size: int = 128
    """Width of the transformer; a multiple of 4 x num_heads, since positions turn half of a head for each axis."""
    mlp_ratio: float = 3.0
    """Width inside the gated MLP, in hidden sizes."""
    num_layers: int = 8
    """Blocks of the transformer."""
    num_heads: int = 4
    """Attention heads."""
    init: str = "scratch"
    """scratch, or a run folder or Hub id of a pipeline of these sizes to start from."""

    logit_mean: float = 0.0
    """Mean of the logits of the times that are trained; higher = more noise."""
    logit_std: float = 1.0
    """Standard deviation of these logits."""
    shift: float = 1.0
    """By how much times are moved to more noise, in training and in the sampler: sqrt(m / n) for m image tokens where n
    need no shift. 1 = not at all."""
    routed_fraction: float = 0.5
    """Share of the image tokens that skip routed_layers in training. 0 = none."""
    routed_layers: str = "2,7"
    """First and last of the blocks, from 1, that routed tokens skip."""
    caption_dropout: float = 0.1
    """Share of the captions that are replaced by the empty one, so that guidance works. 0 = none."""

    global_batch_size: int = 16
    """Samples of one update, over all processes and micro-batches."""
    per_device_batch_size: int = 0
    """Samples of one micro-batch on one process. 0 = the process's whole share."""
    max_steps: int = 2500
    """Optimizer updates."""
    learning_rate: float = 2e-3
    """Peak rate."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices, not of embeddings, norms and biases. 0 = none."""
    max_grad_norm: float = 1.0
    """Norm to which the update's gradient is clipped. 0 = no clipping."""
    warmup_steps: int = 100
    """Updates over which the rate rises linearly."""
    decay_fraction: float = 0.5
    """Share of the updates, at the end, over which the rate falls linearly to 0. 0 = it never falls."""
    ema_decay: float = 0.995
    """Share of the old average that an update keeps; the averaged weights are evaluated and saved. 0 = no average."""

    sample_steps: int = 25
    """Steps in which each of the shown images is made."""
    guidance_scale: float = 4.0
    """How far shown images follow the caption's prediction beyond the empty caption's. 1 = no guidance."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import logging
import math

import diffusers
import numpy as np
import torch
import transformers
from diffusers.models.transformers.transformer_prx import get_image_ids, img2seq, seq2img
from torch import Tensor, nn

from shared.data.batches import to_device
from shared.data.randomness import derive_seed, normal_numbers, uniform_numbers
from shared.data.updates import load_updates
from shared.diffusion import latent_cache
from shared.diffusion.captions import CleanedCaptions, clean_captions, encode_captions, load_text_encoder, token_ids
from shared.diffusion.clip_tokenizer import train_clip_tokenizer
from shared.diffusion.latent_cache import Latents
from shared.diffusion.latent_encoding import open_latents
from shared.diffusion.latent_updates import FixedSamples, LatentUpdates
from shared.metrics import figures
from shared.models.averaged_weights import AveragedWeights
from shared.models.export import export_pipeline
from shared.models.pretrained import check_sizes, load_diffusion_model
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
from shared.runtime.cache_folder import cache_folder
from shared.runtime.signals import StopSignals

logger = logging.getLogger(__name__)

TRAINED, SHIPPED = Path("outputs/vae"), Path(__file__).parent / "assets" / "vae"
CACHED = Path("outputs/latents")
NUM_BANDS = 4  # of times, which evaluation tells apart
NUM_SHOWN = 8
USAGE = """from diffusers import PRXPipeline

pipeline = PRXPipeline.from_pretrained("path/of/this/folder")
options = {{"use_resolution_binning": False, "skip_text_cleaning": {}}}
image = pipeline({!r}, guidance_scale={}, num_inference_steps={}, **options).images[0]"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what can be told wrong from the fields alone."""
    fields.check_run_control(cfg)
    cli.expect_at_least(cfg, 1, "eval_samples", "text_hidden_size", "text_num_layers", "text_num_heads", "patch_size")
    cli.expect_at_least(cfg, 1, "hidden_size", "num_layers", "num_heads", "global_batch_size", "max_steps")
    cli.expect_at_least(cfg, 0, "per_device_batch_size", "warmup_steps", "weight_decay", "max_grad_norm")
    cli.expect_at_least(cfg, 3, "caption_length")
    cli.expect_at_least(cfg, 1, "sample_steps", "guidance_scale")
    for field in ("learning_rate", "mlp_ratio", "logit_std", "shift"):
        cli.expect(getattr(cfg, field) > 0, field, getattr(cfg, field), "more than 0")
    for field in ("ema_decay", "caption_dropout", "routed_fraction"):
        cli.expect(0 <= getattr(cfg, field) < 1, field, getattr(cfg, field), "a share in [0, 1)")
    cli.expect(0 < cfg.eval_fraction < 1, "eval_fraction", cfg.eval_fraction, "a share in (0, 1)")
    cli.expect(0 <= cfg.decay_fraction <= 1, "decay_fraction", cfg.decay_fraction, "a share in [0, 1]")
    is_guidable = cfg.guidance_scale == 1 or cfg.caption_dropout > 0
    expected = "1 with caption_dropout 0: a model that never sees the empty caption cannot be guided by it"
    cli.expect(is_guidable, "guidance_scale", cfg.guidance_scale, expected)
    fits = cfg.text_hidden_size % cfg.text_num_heads == 0
    cli.expect(fits, "text_hidden_size", cfg.text_hidden_size, f"a multiple of text_num_heads {cfg.text_num_heads}")
    fits = cfg.hidden_size % (4 * cfg.num_heads) == 0
    cli.expect(fits, "hidden_size", cfg.hidden_size, f"a multiple of 4 x num_heads {cfg.num_heads}")
    first, *rest = cli.whole_numbers("routed_layers", cfg.routed_layers)
    fits = len(rest) == 1 and (first <= rest[0] <= cfg.num_layers or not cfg.routed_fraction)
    expected = f"the first and the last block that are skipped, from 1 to {cfg.num_layers}"
    cli.expect(fits, "routed_layers", cfg.routed_layers, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(
    cfg: Config, accelerator: Any, vae: Any, text: tuple[Any, Any] | None
) -> tuple[Latents, dict[str, Latents], dict[str, Any]]:
    """Latents to train on, those to evaluate on by the names of their splits, and the manifest of the cache."""
    with collectives.node_main_first(accelerator):
        options = {"cached": CACHED, "cache_dir": cache_folder(cfg.cache_dir)}
        folder, manifest = open_latents(cfg.data, vae, text, **options)
        train, held_out = latent_cache.open_splits(folder, manifest, cfg.data_split, cfg.eval_splits, cfg.eval_fraction)
    for (_, *sides), _ in (bucket for latents in (train, *held_out.values()) for bucket in latents.buckets()):
        fits = all(side % cfg.patch_size == 0 for side in sides)
        cli.expect(fits, "patch_size", cfg.patch_size, f"a divisor of the latents' sides, {sides}")
    return train, held_out, manifest


def open_updates(
    cfg: Config, accelerator: Any, train: Latents, reading: dict[str, Any], micro_batch_size: int, step: int
) -> Iterator[list[dict[str, Tensor]]]:
    """Updates from `step` on: each this process's micro-batches."""
    rank = {"rank": accelerator.process_index, "num_processes": accelerator.num_processes}
    order = {"global_batch_size": cfg.global_batch_size, **rank}
    draws = {"caption_dropout": cfg.caption_dropout, "seed": cfg.seed}
    updates = LatentUpdates(train, reading, **draws, micro_batch_size=micro_batch_size, order=order)
    loaded = load_updates(updates, range(step, cfg.max_steps), cfg.num_workers, accelerator.device)
    return ([choose_kept(cfg, batch) for batch in batches] for batches in loaded)


# ----------------------------------------------------------------------------------------------------------------------
# Model


class Denoiser(nn.Module):
    """The networks that train together, as one module with one `forward`, in which engines gather weights.

    Args:
        transformer: the model that predicts.
        text_encoder: trained along; None = captions come as embeddings.
        routed: blocks that only the kept tokens go through.
    """

    def __init__(self, transformer: Any, text_encoder: Any, routed: range) -> None:
        super().__init__()
        self.transformer, self.text_encoder, self.routed = transformer, text_encoder, routed
        # What FSDP2 shards as one; accelerate wants each of them to occur.
        self._no_split_modules = ["PRXBlock"] + ["CLIPEncoderLayer"] * (text_encoder is not None)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of blocks in the backward pass."""
        self.transformer.enable_gradient_checkpointing()
        if self.text_encoder is not None:
            self.text_encoder.activation_checkpointing_enable()

    def forward(
        self, latents: Tensor, timesteps: Tensor, text: Tensor, text_mask: Tensor, kept: Tensor | None = None
    ) -> Tensor:
        """Velocities (B, C, h, w) at times (B,) from 0 to 1, for tokens (B, L) or embeddings (B, L, D), mask (B, L).

        Of the image tokens only those in `kept` (B, K) go through all blocks; None = all of them.
        """
        states = text if self.text_encoder is None else self.text_encoder(input_ids=text).last_hidden_state
        if kept is None:
            return self.transformer(latents, timesteps, states, text_mask).sample
        return self.forward_routed(latents, timesteps, states, text_mask, kept)

    def forward_routed(
        self, latents: Tensor, timesteps: Tensor, states: Tensor, text_mask: Tensor, kept: Tensor
    ) -> Tensor:
        """`PRXTransformer2DModel.forward`, where tokens that are not kept skip some blocks (Krause et al. 2025).

        They are put back, as they were, behind these blocks.
        """
        net = self.transformer
        tokens, text = net.img_in(img2seq(latents, net.patch_size)), net.txt_in(states)
        time = net._compute_timestep_embedding(timesteps, dtype=tokens.dtype)
        places = get_image_ids(len(latents), *latents.shape[2:], net.patch_size, latents.device)
        rotations = all_rotations = net.pe_embedder(places)
        rows = kept[:, :, None].expand(-1, -1, tokens.shape[2])
        for number, block in enumerate(net.blocks):
            if number == self.routed.start:
                all_tokens, tokens = tokens, tokens.gather(1, rows)
                rotations = net.pe_embedder(places.gather(1, rows[:, :, :2]))
            inputs = (tokens, text, time, rotations, text_mask)
            checkpoints_block = net.gradient_checkpointing and torch.is_grad_enabled()
            tokens = net._gradient_checkpointing_func(block, *inputs) if checkpoints_block else block(*inputs)
            if number == self.routed.stop - 1:
                tokens, rotations = all_tokens.scatter(1, rows, tokens), all_rotations
        return seq2img(net.final_layer(tokens, time), net.patch_size, latents.shape)


def build_model(cfg: Config, tokenizer: Any, frozen: Any, latent_channels: int) -> Denoiser:
    """Both networks from `init`, or new ones, in float32."""
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    sizes = {
        "in_channels": latent_channels,
        "patch_size": cfg.patch_size,
        "context_in_dim": frozen.config.hidden_size if frozen is not None else cfg.text_hidden_size,
        "hidden_size": cfg.hidden_size,
        "mlp_ratio": cfg.mlp_ratio,
        "num_heads": cfg.num_heads,
        "depth": cfg.num_layers,
        "axes_dim": [cfg.hidden_size // cfg.num_heads // 2] * 2,  # of a head's numbers, turned by row and by column
    }
    text_sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": cfg.text_hidden_size,
        "intermediate_size": 4 * cfg.text_hidden_size,
        "num_hidden_layers": cfg.text_num_layers,
        "num_attention_heads": cfg.text_num_heads,
        "max_position_embeddings": tokenizer.model_max_length,
    }
    text_encoder = None
    if cfg.init == "scratch":
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text_config = transformers.CLIPTextConfig(**text_sizes, **ends, pad_token_id=tokenizer.pad_token_id)
        transformer = diffusers.PRXTransformer2DModel(**sizes)
        text_encoder = transformers.CLIPTextModel(text_config) if frozen is None else None
    else:
        transformer = load_diffusion_model(diffusers.PRXTransformer2DModel, cfg.init, "init", subfolder="transformer")
        check_sizes(cfg.init, "a transformer", transformer.config, sizes)
        if frozen is None:
            _, text_encoder = load_text_encoder(cfg.init, "init")
            check_sizes(cfg.init, "a text encoder", text_encoder.config, text_sizes)
            text_encoder.train().requires_grad_(True)
    first, last = cli.whole_numbers("routed_layers", cfg.routed_layers)
    model = Denoiser(transformer, text_encoder, range(first - 1, last))
    if cfg.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def build_scheduler(cfg: Config) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """The steps in which images are made, as the pipeline saves them."""
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=cfg.shift)


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def forward(model: Any, noisy: Tensor, timesteps: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Velocities (B, C, h, w); see `Denoiser.forward`."""
    rest = {name: batch[name] for name in ("text", "text_mask", "kept") if name in batch}
    return model(latents=noisy, timesteps=timesteps, **rest)


def trained_times(uniform: Tensor, logit_mean: float, logit_std: float, shift: float) -> Tensor:
    """Times (B,) of numbers (B,) in [0, 1]: logit-normal (Esser et al. 2024, section 3.1), shifted (equation 23)."""
    times = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(uniform))
    return shift * times / (1 + (shift - 1) * times)


def choose_kept(cfg: Config, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with the tokens that skip no block, `kept` (B, K), drawn anew for each sample of each update."""
    if not cfg.routed_fraction:
        return batch
    number = math.prod(side // cfg.patch_size for side in batch["latents"].shape[2:])
    keys = batch["uniform"].numpy().view(np.int32).astype(np.int64)  # as good as (step, sample)
    order = uniform_numbers(derive_seed(cfg.seed, "kept"), keys, count=number).argsort(axis=1)
    return {**batch, "kept": torch.from_numpy(order[:, : max(1, round(number * (1 - cfg.routed_fraction)))])}


def errors(model: Any, batch: dict[str, Tensor], times: Tensor) -> Tensor:
    """Mean squared error of each sample's velocity (B,) on the line from latents to noise (Liu et al. 2022)."""
    share = times[:, None, None, None]
    noisy = (1 - share) * batch["latents"] + share * batch["noise"]
    predicted = forward(model, noisy, times, batch)
    return (predicted.float() - (batch["noise"] - batch["latents"])).square().mean((1, 2, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.compiler.set_stance("force_eager")  # else compiled anew for each shape, and for no gradients
@torch.no_grad()
def evaluate(cfg: Config, accelerator: Any, model: Any, held_out: dict[str, FixedSamples]) -> dict[str, float]:
    """Errors on the fixed noise of each split, of all tokens: over all times from 0 to 1 and in each band of them."""
    model.eval()
    processes, totals = accelerator.num_processes, torch.zeros(len(held_out), NUM_BANDS, 2, dtype=torch.float64)
    for row, samples in enumerate(held_out.values()):
        steps = range(accelerator.process_index, math.ceil(len(samples) / processes) * processes, processes)
        batches = load_updates(samples, steps, cfg.num_workers, accelerator.device)
        for number, batch in zip(steps, batches, strict=True):
            batch = to_device(batch, accelerator.device)
            error = errors(model, batch, batch["uniform"])
            counts = torch.tensor([error.double().sum().item(), len(error)], dtype=torch.float64)
            totals[row, number % NUM_BANDS] += counts * (number < len(samples))
    model.train()
    sums, numbers = torch.stack(collectives.gather_objects(accelerator, totals)).sum(0).unbind(-1)
    means = dict(zip(held_out, (sums.sum(1) / numbers.sum(1)).tolist(), strict=True))
    metrics = {"eval/loss": float(np.mean([mean for name, mean in means.items() if name != cfg.data_split]))}
    for row, (name, mean) in enumerate(means.items()):
        metrics[f"eval/loss_{name}"] = mean
        for band, value in enumerate((sums[row] / numbers[row]).tolist()):
            metrics[f"eval/loss_{name}_band_{band}"] = value
    return metrics


@torch.compiler.set_stance("force_eager")  # else compiled anew for each shape, and for no gradients
@torch.no_grad()
def make_images(
    cfg: Config, accelerator: Any, model: Any, vae: Any, texts: Any, empty: Any, latent_shape: Sequence[int]
) -> list[np.ndarray]:
    """An image uint8 (H, W, 3) for each of some texts, with guidance (Ho and Salimans 2022, equation 6).

    Every process makes all of them, since weights may be sharded; each begins with noise of its own.
    """
    model.eval()
    scheduler, device, number = build_scheduler(cfg), accelerator.device, len(texts["text"])
    noise = normal_numbers(derive_seed(cfg.seed, "pictures"), np.arange(number), count=math.prod(latent_shape))
    latents = torch.from_numpy(noise.astype(np.float32)).reshape(-1, *latent_shape).to(device)
    both = {name: torch.cat([empty[name].expand_as(rows), rows]).to(device) for name, rows in texts.items()}
    scheduler.set_timesteps(cfg.sample_steps, device=device)
    for timestep in scheduler.timesteps:
        times = (timestep / scheduler.config.num_train_timesteps).expand(2 * number)
        without, with_text = forward(model, torch.cat([latents, latents]), times, both).float().chunk(2)
        velocity = without + cfg.guidance_scale * (with_text - without)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    model.train()
    pixels = vae.decode(latents / vae.config.scaling_factor).sample
    return list(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_update(cfg: Config, accelerator: Any, model: Any, optimizer: Any, batches: list[Any]) -> tuple[Tensor, float]:
    """One optimizer update: its mean loss over all processes and micro-batches, and its gradient norm.

    A gradient that is not finite changes nothing, on all processes alike; DeepSpeed, which steps inside the backward
    pass, finds that by itself.
    """
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(model):
            times = trained_times(batch["uniform"], cfg.logit_mean, cfg.logit_std, cfg.shift)
            loss = errors(model, batch, times).sum()
            accelerator.backward(loss * scale)
        total += loss.detach()
    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm or math.inf))
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, "sum") / cfg.global_batch_size, grad_norm


def export(
    cfg: Config, accelerator: Any, model: Any, frozen: Any, vae: Any, tokenizer: Any, side: int, run_dir: Path
) -> None:
    """Write all parts as a PRXPipeline for images of `side` pixels. Every process calls this."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        bare = build_model(replace(cfg, init="scratch"), tokenizer, frozen, vae.config.latent_channels)
        bare.load_state_dict({name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()})
        vae.register_to_config(shift_factor=0.0)  # the pipeline adds it, and cannot add None
        pipeline = diffusers.PRXPipeline(
            transformer=bare.transformer,
            scheduler=build_scheduler(cfg),
            text_encoder=bare.text_encoder if frozen is None else frozen,
            tokenizer=tokenizer,
            vae=vae,
            default_sample_size=side,
        )
        export_pipeline(pipeline, run_dir)
    accelerator.wait_for_everyone()


def main(cfg: Config) -> None:
    """Train, evaluate, save, and leave a pipeline that `from_pretrained` loads."""
    check_config(cfg)
    run_dir = Path(cfg.output_dir)
    run_folder.check_run_folder(run_dir, cfg.resume, asdict(cfg))
    launch.follow_launcher()
    accelerator = launch.start_accelerator(cfg.timeout_minutes, cfg.report_to, cfg.output_dir, cfg.deterministic)
    micro_batch_size = launch.set_accumulation(accelerator, cfg.global_batch_size, cfg.per_device_batch_size)
    launch.set_deepspeed_values(accelerator, micro_batch_size, cfg.max_grad_norm)
    with collectives.raise_together(accelerator):
        hub_id = hub.check_login(cfg.push_to_hub if accelerator.is_main_process else "")

    vae = open_vae(cfg).to(accelerator.device)
    text = None if cfg.text_encoder == "scratch" else load_text_encoder(cfg.text_encoder, "text_encoder")
    train, held_out, manifest = open_data(cfg, accelerator, vae, text)
    tokenizer, frozen = text or (open_tokenizer(cfg, train), None)
    reader = tokenizer if text else CleanedCaptions(tokenizer)  # embeddings are of captions as they are
    empty = encode_captions([""], reader, frozen)
    reading = {"scaling_factor": vae.config.scaling_factor, "tokenizer": reader}
    reading["empty"] = None if frozen is None else empty["text"][0].numpy()
    shape = min((shape for shape, _ in train.buckets()), key=lambda shape: abs(shape[1] - shape[2]))
    batch, *_ = next(open_updates(replace(cfg, num_workers=0), accelerator, train, reading, micro_batch_size, 0))
    inputs = {"timesteps": batch["uniform"], **{name: batch[name] for name in batch.keys() - {"noise", "uniform"}}}
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, to_device(inputs, accelerator.device), tokenizer, frozen)
        return
    model = build_model(cfg, tokenizer, frozen, shape[0])
    facts = describe(cfg, accelerator, model, train, inputs)
    accelerator.print(summary.table(facts))
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))

    step, state = checkpoints.resume_run(accelerator, run_dir, cfg.resume, previous_phase=None)
    skipped = SkippedUpdates(state, cfg.max_bad_updates)
    average = AveragedWeights(accelerator, model, cfg.ema_decay, state.get("tensors", {}))
    updates = open_updates(cfg, accelerator, train, reading, micro_batch_size, step)
    fixed = {
        name: FixedSamples(latents, cfg.eval_samples, NUM_BANDS, reading, batch_size=micro_batch_size)
        for name, latents in ({cfg.data_split: train} | held_out).items()
    }
    captions = latent_cache.some_captions(held_out.values(), NUM_SHOWN)
    shown = {"texts": encode_captions(captions, reader, frozen), "empty": empty, "latent_shape": shape}
    exported = (frozen, vae, tokenizer, shape[1] * 2 ** (len(vae.config.block_out_channels) - 1), run_dir)
    record = {"data": cfg.data, "data_fingerprint": manifest["data"], "init": cfg.init}
    with collectives.raise_together(accelerator):
        hub.check_push(hub_id, private=cfg.hub_private)
        if accelerator.is_main_process:
            run_folder.write_run_record(run_dir, fields.to_yaml(cfg), Path(__file__), {**record, **facts})
    log = RunLog(accelerator, run_dir, step, cfg.max_steps)
    pusher = hub.HubPusher(hub_id, cfg.hub_private)
    profiler = trace_updates(run_dir / "profile") if cfg.profile else None
    throughput = Throughput(facts["flops_per_sample"], peak(accelerator) * accelerator.num_processes)
    seconds_before = state.get("training_seconds", 0.0)
    stop = StopSignals()  # before this one, a signal ends a run that has nothing to save
    model.train()
    while step < cfg.max_steps:
        with throughput.waiting_for_data():
            batches = next(updates)
        factor = schedules.warmup_stable_decay(step, cfg.max_steps, cfg.warmup_steps, cfg.decay_fraction)
        set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
        batches = [to_device(batch, accelerator.device) for batch in batches]
        loss, grad_norm = train_update(cfg, accelerator, model, optimizer, batches)
        step += 1
        average.update(step)
        throughput.add(samples=cfg.global_batch_size, units=cfg.global_batch_size)
        skipped.count(grad_norm)

        is_last = step == cfg.max_steps or skipped.are_too_many
        is_stopping = collectives.on_any_process(accelerator, stop.received)
        metrics = {}
        if is_last or step % cfg.log_every == 0:
            metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
            metrics |= {"train/grad_norm": grad_norm, "train/skipped_updates": skipped.total}
            metrics |= throughput.read("images")
        seconds = seconds_before + throughput.training_seconds
        if step == cfg.max_steps or schedules.is_due(step, cfg.eval_every):
            with throughput.pause(), average.in_place():
                metrics |= evaluate(cfg, accelerator, model, fixed)
                images = make_images(cfg, accelerator, model, vae, **shown)
            if accelerator.is_main_process:
                figures.image_grid(images, captions, run_dir / "samples" / f"step_{step:08d}.png")
        with throughput.pause():
            log.write(step, metrics and {**metrics, "perf/training_seconds": seconds})
            if is_last or is_stopping or schedules.is_due(step, cfg.save_every):
                state = {"training_seconds": seconds, **skipped.state(), "tensors": average.tensors()}
                checkpoints.save_checkpoint(accelerator, run_dir, step, state, cfg.keep_checkpoints)
        if schedules.is_due(step, cfg.push_every):
            with throughput.pause(), average.in_place():
                export(cfg, accelerator, model, *exported)
                pusher.push(run_dir, f"step {step}", f"step-{step}")
        if profiler:
            profiler.step()
        skipped.check(step)
        if is_stopping and step < cfg.max_steps:
            raise cli.RunStopped(f"saved at step {step} of {cfg.max_steps}; the same command goes on from there")

    with average.in_place():
        images = make_images(cfg, accelerator, model, vae, **shown)
        export(cfg, accelerator, model, *exported)
    if accelerator.is_main_process:
        figures.image_grid(images, captions, run_dir / "figures" / "images.png")
    flops = facts["flops_per_sample"] * cfg.global_batch_size * step
    results = {"steps": step, "training_seconds": state["training_seconds"], "training_flops": flops}
    usage = USAGE.format(cfg.text_encoder != "scratch", captions[0], cfg.guidance_scale, cfg.sample_steps)
    card = {"pipeline_tag": "text-to-image", "usage": usage, "results": results}
    card |= {"figures": {"Images of held-out captions": "images.png"}, "samples": "\n".join(captions)}
    finish_run(log, pusher, run_dir, **card, is_main_process=accelerator.is_main_process)
    log.say(f"generate: python recipes/text_to_image/generate.py --model {run_dir}")
    accelerator.end_training()


def open_vae(cfg: Config) -> Any:
    """The frozen autoencoder."""
    name = cfg.vae or str(TRAINED if TRAINED.is_dir() else SHIPPED)
    return load_diffusion_model(diffusers.AutoencoderKL, name, "vae").eval().requires_grad_(False)


def open_tokenizer(cfg: Config, train: Latents) -> Any:
    """The tokenizer of the text encoder from scratch: that of `init`, or one trained on the captions."""
    if cfg.init != "scratch":
        tokenizer, _ = load_text_encoder(cfg.init, "init")
    else:
        tokenizer = train_clip_tokenizer(clean_captions(train.captions()), cfg.vocab_size, cfg.caption_length)
    some = latent_cache.some_captions([train], 10_000)
    _, num_cut = token_ids(CleanedCaptions(tokenizer), some)
    if num_cut:
        share = num_cut / len(some)
        logger.warning("%.1f %% of the captions are longer than %d tokens and cut", 100 * share, cfg.caption_length)
    return tokenizer


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW with its usual betas, as micro_diffusion has it (Sehwag et al. 2024), and decay of matrices alone."""
    decays = [
        name.endswith("weight") and weight.ndim >= 2 and "embedding" not in name
        for name, weight in model.named_parameters()
    ]
    pairs = list(zip(model.parameters(), decays, strict=True))
    groups = [
        {"params": [weight for weight, decay in pairs if decay], "weight_decay": cfg.weight_decay},
        {"params": [weight for weight, decay in pairs if not decay], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.learning_rate, fused=True)


def describe(cfg: Config, accelerator: Any, model: Any, train: Latents, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latents": " x ".join(map(str, inputs["latents"].shape[1:])),
        "flops_per_sample": training_flops(model, {name: values[:1] for name, values in inputs.items()}),
        "samples_per_update": cfg.global_batch_size,
        "updates_per_epoch": round(len(train) / cfg.global_batch_size, 1),
        **summary.describe_engine(accelerator),
    }


def report_costs(
    cfg: Config, accelerator: Any, train: Latents, inputs: dict[str, Tensor], tokenizer: Any, frozen: Any
) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    number, channels = inputs["latents"].shape[:2]
    with dry_run.without_memory():
        model = build_model(cfg, tokenizer, frozen, channels)
        facts = describe(cfg, accelerator, model, train, inputs)
        state = 12 if cfg.ema_decay else 8  # AdamW's, and the average
        costs = dry_run.costs(accelerator, model, inputs, optimizer_bytes_per_parameter=state)
    rows = {**facts, **{name: dry_run.human_bytes(size) for name, size in costs.items()}}
    if dry_run.can_time(accelerator, facts["flops_per_sample"] * number, costs["memory: total"]):
        model = build_model(cfg, tokenizer, frozen, channels)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
        rows["one update"] = dry_run.human_seconds(seconds) + (", not compiled" if cfg.compile else "")
        rows["all updates"] = dry_run.human_seconds(seconds * cfg.max_steps)
    accelerator.print(f"first caption: {train.captions()[0]}\n\n{summary.table(rows)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
