"""Pre-train a text-to-image model from scratch: latent diffusion with a UNet that reads captions.

Papers: Ho et al. 2020 (diffusion), Rombach et al. 2022 (latent diffusion; section 3.3 for the text), Salimans and Ho
2022 (v-prediction), Ho and Salimans 2022 (guidance), Hang et al. 2023 (weights of timesteps). With no arguments it
trains on the embedded emoji, whose latents it makes at the first start, on two CPU cores in minutes.

    accelerate launch recipes/text_to_image/pretrain.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/text_to_image/pretrain.py \
        --config recipes/text_to_image/configs/sd1_256.yaml --data me/latents --output_dir outputs/sd1
"""

# Shapes: B samples of a micro-batch, C, h, w of the latents, L tokens of a caption, D width of the text encoder.
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

    output_dir: str = "outputs/text_to_image"
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
    cache_latents.py made embeddings."""
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

    block_out_channels: str = "48,96,96"
    """Channels after each stage of the UNet; every stage but the last halves the side."""
    attention_stages: str = "2,3"
    """Stages, from 1, whose blocks attend to the caption and to all places; the middle always does."""
    layers_per_block: int = 1
    """Residual blocks of each stage on the way down, one more on the way up."""
    num_heads: int = 4
    """Heads of each attention."""
    norm_num_groups: int = 16
    """Groups of each normalisation; all block_out_channels are multiples of it."""
    init: str = "scratch"
    """scratch, or a run folder or Hub id of a pipeline of these sizes to start from."""

    prediction_type: str = "v_prediction"
    """What the model predicts: epsilon (the noise) or v_prediction."""
    snr_gamma: float = 5.0
    """Signal-to-noise ratio above which a timestep's weight stops to grow. 0 = all timesteps weigh the same."""
    caption_dropout: float = 0.1
    """Share of the captions that are replaced by the empty one, so that guidance works. 0 = none."""

    global_batch_size: int = 16
    """Samples of one update, over all processes and micro-batches."""
    per_device_batch_size: int = 0
    """Samples of one micro-batch on one process. 0 = the process's whole share."""
    max_steps: int = 2000
    """Optimizer updates."""
    learning_rate: float = 1e-3
    """Peak rate."""
    weight_decay: float = 0.01
    """Decoupled decay of matrices and convolutions, not of embeddings, those of timesteps among them, norms and biases.
    0 = none."""
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
from torch import Tensor, nn

from shared.data.batches import to_device
from shared.data.randomness import derive_seed, normal_numbers
from shared.data.updates import load_updates
from shared.diffusion import latent_cache
from shared.diffusion.captions import encode_captions, load_text_encoder, token_ids
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
# Stable Diffusion 1.x's (CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml).
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
NUM_BANDS = 4  # of timesteps, which evaluation tells apart
NUM_SHOWN = 8
USAGE = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("path/of/this/folder")
image = pipeline({!r}, guidance_scale={}, num_inference_steps={}).images[0]"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what can be told wrong from the fields alone."""
    fields.check_run_control(cfg)
    cli.expect_at_least(cfg, 1, "eval_samples", "text_hidden_size", "text_num_layers", "text_num_heads")
    cli.expect_at_least(cfg, 1, "layers_per_block", "num_heads", "norm_num_groups", "global_batch_size", "max_steps")
    cli.expect_at_least(cfg, 0, "per_device_batch_size", "warmup_steps", "weight_decay", "max_grad_norm", "snr_gamma")
    cli.expect_at_least(cfg, 3, "caption_length")
    cli.expect_at_least(cfg, 1, "sample_steps", "guidance_scale")
    cli.expect(cfg.learning_rate > 0, "learning_rate", cfg.learning_rate, "more than 0")
    for field in ("ema_decay", "caption_dropout"):
        cli.expect(0 <= getattr(cfg, field) < 1, field, getattr(cfg, field), "a share in [0, 1)")
    cli.expect(0 < cfg.eval_fraction < 1, "eval_fraction", cfg.eval_fraction, "a share in (0, 1)")
    cli.expect(0 <= cfg.decay_fraction <= 1, "decay_fraction", cfg.decay_fraction, "a share in [0, 1]")
    known = ("epsilon", "v_prediction")
    cli.expect(cfg.prediction_type in known, "prediction_type", cfg.prediction_type, " or ".join(known))
    is_guidable = cfg.guidance_scale == 1 or cfg.caption_dropout > 0
    expected = "1 with caption_dropout 0: a model that never sees the empty caption cannot be guided by it"
    cli.expect(is_guidable, "guidance_scale", cfg.guidance_scale, expected)
    fits = cfg.text_hidden_size % cfg.text_num_heads == 0
    cli.expect(fits, "text_hidden_size", cfg.text_hidden_size, f"a multiple of text_num_heads {cfg.text_num_heads}")
    channels = cli.whole_numbers("block_out_channels", cfg.block_out_channels)
    for field, divisor in (("norm_num_groups", cfg.norm_num_groups), ("num_heads", cfg.num_heads)):
        fits = all(number % divisor == 0 for number in channels)
        cli.expect(fits, "block_out_channels", cfg.block_out_channels, f"multiples of {field} {divisor}")
    stages = cli.whole_numbers("attention_stages", cfg.attention_stages)
    expected = f"numbers of stages from 1 to {len(channels)}"
    cli.expect(all(1 <= stage <= len(channels) for stage in stages), "attention_stages", cfg.attention_stages, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(
    cfg: Config, accelerator: Any, vae: Any, text: tuple[Any, Any] | None
) -> tuple[Latents, dict[str, Latents], dict[str, Any]]:
    """Latents to train on, those to evaluate on by the names of their splits, and the manifest of the cache."""
    with collectives.node_main_first(accelerator):
        options = {"cached": CACHED, "cache_dir": cache_folder(cfg.cache_dir)}
        folder, manifest = open_latents(cfg.data, vae, text, **options)
        splits = latent_cache.open_splits(folder, manifest, cfg.data_split, cfg.eval_splits, cfg.eval_fraction)
    return *splits, manifest


def open_updates(
    cfg: Config, accelerator: Any, train: Latents, reading: dict[str, Any], micro_batch_size: int, step: int
) -> Iterator[list[dict[str, Tensor]]]:
    """Updates from `step` on: each this process's micro-batches."""
    rank = {"rank": accelerator.process_index, "num_processes": accelerator.num_processes}
    order = {"global_batch_size": cfg.global_batch_size, **rank}
    draws = {"caption_dropout": cfg.caption_dropout, "seed": cfg.seed}
    updates = LatentUpdates(train, reading, **draws, micro_batch_size=micro_batch_size, order=order)
    return load_updates(updates, range(step, cfg.max_steps), cfg.num_workers, accelerator.device)


# ----------------------------------------------------------------------------------------------------------------------
# Model


class Denoiser(nn.Module):
    """The networks that train together, as one module with one `forward`, in which engines gather weights.

    Args:
        unet: the diffusion model.
        text_encoder: trained along; None = captions come as embeddings.
    """

    def __init__(self, unet: Any, text_encoder: Any) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        # What FSDP2 shards as one; accelerate wants each of them to occur.
        units = {"BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"}
        self._no_split_modules = sorted(units & {type(module).__name__ for module in self.modules()})

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of blocks in the backward pass."""
        self.unet.enable_gradient_checkpointing()
        if self.text_encoder is not None:
            self.text_encoder.activation_checkpointing_enable()

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        """Predictions (B, C, h, w) for noisy latents, timesteps (B,), and tokens (B, L) or embeddings (B, L, D)."""
        states = text if self.text_encoder is None else self.text_encoder(input_ids=text).last_hidden_state
        return self.unet(latents, timesteps, encoder_hidden_states=states).sample


def build_model(cfg: Config, tokenizer: Any, frozen: Any, latent_shape: Sequence[int]) -> Denoiser:
    """Both networks from `init`, or new ones, in float32."""
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    channels = cli.whole_numbers("block_out_channels", cfg.block_out_channels)
    stages = cli.whole_numbers("attention_stages", cfg.attention_stages)
    attends = [stage in stages for stage in range(1, len(channels) + 1)]
    width = frozen.config.hidden_size if frozen is not None else cfg.text_hidden_size
    sizes = {
        "in_channels": latent_shape[0],
        "out_channels": latent_shape[0],
        "block_out_channels": tuple(channels),
        "down_block_types": tuple("CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        "up_block_types": tuple("CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        "layers_per_block": cfg.layers_per_block,
        "attention_head_dim": cfg.num_heads,  # which the library takes for the number of heads
        "cross_attention_dim": width,
        "norm_num_groups": cfg.norm_num_groups,
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
        ends["pad_token_id"] = tokenizer.pad_token_id
        text_config = transformers.CLIPTextConfig(**text_sizes, **ends)
        text_encoder = transformers.CLIPTextModel(text_config) if frozen is None else None
        unet = diffusers.UNet2DConditionModel(**sizes, sample_size=latent_shape[-1])
    else:
        unet = load_diffusion_model(diffusers.UNet2DConditionModel, cfg.init, "init", subfolder="unet")
        check_sizes(cfg.init, "a unet", unet.config, sizes)
        unet.register_to_config(sample_size=latent_shape[-1])  # of the images that the pipeline makes by default
        if frozen is None:
            _, text_encoder = load_text_encoder(cfg.init, "init")
            check_sizes(cfg.init, "a text encoder", text_encoder.config, text_sizes)
            text_encoder.train().requires_grad_(True)
    model = Denoiser(unet, text_encoder)
    if cfg.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def build_scheduler(cfg: Config) -> diffusers.DPMSolverMultistepScheduler:
    """The noise schedule, in the form in which images are made with it and it is saved."""
    return diffusers.DPMSolverMultistepScheduler(**NOISE, prediction_type=cfg.prediction_type)


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def forward(model: Any, noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """Predictions (B, C, h, w); see `Denoiser.forward`."""
    return model(latents=noisy, timesteps=timesteps, text=text)


def add_noise(latents: Tensor, noise: Tensor, kept: Tensor) -> Tensor:
    """Noisy latents (B, C, h, w), of whose variance the share `kept` (B,) is signal (Ho et al. 2020, equation 4)."""
    kept = kept[:, None, None, None]
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise


def targets(latents: Tensor, noise: Tensor, kept: Tensor, prediction_type: str) -> Tensor:
    """What the model is to predict (B, C, h, w): the noise, or v (Salimans and Ho 2022, appendix D)."""
    if prediction_type == "epsilon":
        return noise
    kept = kept[:, None, None, None]
    return kept.sqrt() * noise - (1 - kept).sqrt() * latents


def timestep_weights(kept: Tensor, snr_gamma: float, prediction_type: str) -> Tensor:
    """Weights (B,) that give no timestep more than min(SNR, gamma) of the error of the latents (Hang et al. 2023)."""
    if not snr_gamma:
        return torch.ones_like(kept)
    ratio = kept / (1 - kept)  # of signal to noise
    # The squared error of epsilon is SNR times that of the latents, of v SNR + 1 times (section 3.4 there).
    return ratio.clamp(max=snr_gamma) / (ratio if prediction_type == "epsilon" else ratio + 1)


def errors(cfg: Config, model: Any, batch: dict[str, Tensor], signal: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared error of each sample's prediction (B,), and the share of its latents that was signal (B,)."""
    timesteps = (batch["uniform"] * len(signal)).long().clamp(max=len(signal) - 1)
    kept = signal[timesteps]
    noisy = add_noise(batch["latents"], batch["noise"], kept)
    predicted = forward(model, noisy, timesteps, batch["text"])
    wanted = targets(batch["latents"], batch["noise"], kept, cfg.prediction_type)
    return (predicted.float() - wanted).square().mean((1, 2, 3)), kept


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.compiler.set_stance("force_eager")  # else compiled anew for each shape, and for no gradients
@torch.no_grad()
def evaluate(
    cfg: Config, accelerator: Any, model: Any, held_out: dict[str, FixedSamples], signal: Tensor
) -> dict[str, float]:
    """Errors, without weights, on the fixed noise of each split: over all timesteps and in each band of them."""
    model.eval()
    processes, totals = accelerator.num_processes, torch.zeros(len(held_out), NUM_BANDS, 2, dtype=torch.float64)
    for row, samples in enumerate(held_out.values()):
        steps = range(accelerator.process_index, math.ceil(len(samples) / processes) * processes, processes)
        batches = load_updates(samples, steps, cfg.num_workers, accelerator.device)
        for number, batch in zip(steps, batches, strict=True):
            error, _ = errors(cfg, model, to_device(batch, accelerator.device), signal)
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
    cfg: Config, accelerator: Any, model: Any, vae: Any, texts: Tensor, empty: Tensor, latent_shape: Sequence[int]
) -> list[np.ndarray]:
    """An image uint8 (H, W, 3) for each of some texts (N, ...), with guidance (Ho and Salimans 2022, equation 6).

    Every process makes all of them, since weights may be sharded; each begins with noise of its own.
    """
    model.eval()
    scheduler, device = build_scheduler(cfg), accelerator.device
    counters = np.arange(len(texts))
    noise = normal_numbers(derive_seed(cfg.seed, "pictures"), counters, count=math.prod(latent_shape))
    latents = torch.from_numpy(noise.astype(np.float32)).reshape(-1, *latent_shape).to(device)
    both = torch.cat([empty.expand_as(texts), texts]).to(device)
    scheduler.set_timesteps(cfg.sample_steps, device=device)
    for timestep in scheduler.timesteps:
        timesteps = timestep.expand(len(both))
        without, with_text = forward(model, torch.cat([latents, latents]), timesteps, both).float().chunk(2)
        predicted = without + cfg.guidance_scale * (with_text - without)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    model.train()
    pixels = vae.decode(latents / vae.config.scaling_factor).sample
    return list(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_update(
    cfg: Config, accelerator: Any, model: Any, optimizer: Any, batches: list[Any], signal: Tensor
) -> tuple[Tensor, float]:
    """One optimizer update: its mean weighted loss over all processes and micro-batches, and its gradient norm.

    A gradient that is not finite changes nothing, on all processes alike; DeepSpeed, which steps inside the backward
    pass, finds that by itself.
    """
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(model):
            error, kept = errors(cfg, model, batch, signal)
            loss = (error * timestep_weights(kept, cfg.snr_gamma, cfg.prediction_type)).sum()
            accelerator.backward(loss * scale)
        total += loss.detach()
    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm or math.inf))
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(total, "sum") / cfg.global_batch_size, grad_norm


def export(cfg: Config, accelerator: Any, model: Any, frozen: Any, vae: Any, tokenizer: Any, run_dir: Path) -> None:
    """Write all parts as a StableDiffusionPipeline. Every process calls this."""
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        shape = (vae.config.latent_channels, *(accelerator.unwrap_model(model).unet.config.sample_size,) * 2)
        bare = build_model(replace(cfg, init="scratch"), tokenizer, frozen, shape)
        bare.load_state_dict({name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()})
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=bare.text_encoder if frozen is None else frozen,
            tokenizer=tokenizer,
            unet=bare.unet,
            scheduler=build_scheduler(cfg),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
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
    empty = encode_captions([""], tokenizer, frozen)["text"][0]
    reading = {"scaling_factor": vae.config.scaling_factor, "tokenizer": tokenizer}
    reading["empty"] = None if frozen is None else empty.numpy()
    shape = min((shape for shape, _ in train.buckets()), key=lambda shape: abs(shape[1] - shape[2]))
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, reading, frozen, micro_batch_size)
        return
    model = build_model(cfg, tokenizer, frozen, shape)
    facts = describe(cfg, accelerator, model, train, empty)
    accelerator.print(summary.table(facts))
    if accelerator.distributed_type.value not in collectives.SHARDED_ENGINES:  # which cut weights into flat parts
        model = model.to(memory_format=torch.channels_last)
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
    texts = encode_captions(captions, tokenizer, frozen)["text"]
    shown = {"texts": texts, "empty": empty, "latent_shape": shape}
    signal = build_scheduler(cfg).alphas_cumprod.to(accelerator.device)
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
        loss, grad_norm = train_update(cfg, accelerator, model, optimizer, batches, signal)
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
                metrics |= evaluate(cfg, accelerator, model, fixed, signal)
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
                export(cfg, accelerator, model, frozen, vae, tokenizer, run_dir)
                pusher.push(run_dir, f"step {step}", f"step-{step}")
        if profiler:
            profiler.step()
        skipped.check(step)
        if is_stopping and step < cfg.max_steps:
            raise cli.RunStopped(f"saved at step {step} of {cfg.max_steps}; the same command goes on from there")

    with average.in_place():
        images = make_images(cfg, accelerator, model, vae, **shown)
        export(cfg, accelerator, model, frozen, vae, tokenizer, run_dir)
    if accelerator.is_main_process:
        figures.image_grid(images, captions, run_dir / "figures" / "images.png")
    flops = facts["flops_per_sample"] * cfg.global_batch_size * step
    results = {"steps": step, "training_seconds": state["training_seconds"], "training_flops": flops}
    usage = USAGE.format(captions[0], cfg.guidance_scale, cfg.sample_steps)
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
        tokenizer = train_clip_tokenizer(train.captions(), cfg.vocab_size, cfg.caption_length)
    some = latent_cache.some_captions([train], 10_000)
    _, num_cut = token_ids(tokenizer, some)
    if num_cut:
        share = num_cut / len(some)
        logger.warning("%.1f %% of the captions are longer than %d tokens and cut", 100 * share, cfg.caption_length)
    return tokenizer


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW as Stable Diffusion 1.x has it (its model card: AdamW), with decay of matrices alone."""
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


def describe(cfg: Config, accelerator: Any, model: Any, train: Latents, empty: Tensor) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    shape = train.buckets()[0][0]
    inputs = {"latents": torch.zeros(1, *shape), "timesteps": torch.zeros(1, dtype=torch.int64), "text": empty[None]}
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latents": " x ".join(map(str, shape)),
        "flops_per_sample": training_flops(model, inputs),
        "samples_per_update": cfg.global_batch_size,
        "updates_per_epoch": round(len(train) / cfg.global_batch_size, 1),
        **summary.describe_engine(accelerator),
    }


def report_costs(
    cfg: Config, accelerator: Any, train: Latents, reading: dict[str, Any], frozen: Any, micro_batch_size: int
) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    cfg = replace(cfg, num_workers=0)
    first, *_ = next(open_updates(cfg, accelerator, train, reading, micro_batch_size, 0))
    batch = to_device(first, accelerator.device)
    inputs = {"latents": batch["latents"], "timesteps": batch["uniform"].long(), "text": batch["text"]}
    tokenizer, shape, empty = reading["tokenizer"], batch["latents"].shape[1:], batch["text"][0]
    with dry_run.without_memory():
        model = build_model(cfg, tokenizer, frozen, shape)
        facts = describe(cfg, accelerator, model, train, empty)
        state = 12 if cfg.ema_decay else 8  # AdamW's, and the average
        costs = dry_run.costs(accelerator, model, inputs, optimizer_bytes_per_parameter=state)
    rows = {**facts, **{name: dry_run.human_bytes(size) for name, size in costs.items()}}
    if dry_run.can_time(accelerator, facts["flops_per_sample"] * micro_batch_size, costs["memory: total"]):
        model = build_model(cfg, tokenizer, frozen, shape)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
        rows["one update"] = dry_run.human_seconds(seconds) + (", not compiled" if cfg.compile else "")
        rows["all updates"] = dry_run.human_seconds(seconds * cfg.max_steps)
    accelerator.print(f"first caption: {train.captions()[0]}\n\n{summary.table(rows)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
