r"""Pre-train a text-to-image model from scratch: latent diffusion with a UNet that reads captions.

Papers: Ho et al. 2020 (diffusion), Rombach et al. 2022 (latent diffusion; section 3.3 for the text), Salimans and Ho
2022 (v-prediction), Ho and Salimans 2022 (guidance), Hang et al. 2023 (weights of timesteps), Lin et al. 2024 (the last
timestep). With no arguments it trains on the embedded emoji, whose latents it makes at the first start, on two CPU
cores in minutes.

    accelerate launch recipes/text_to_image/pretrain.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/text_to_image/pretrain.py \
        --config recipes/text_to_image/configs/sd1_256.yaml --data me/latents --output_dir outputs/sd1
"""

# Shapes: B samples of a micro-batch, C, h, w of the latents, L tokens of a caption, D width of the text encoder.
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place
from shared.fields import Amount, Count, FromOne, Natural, RateOfNewWeights, Share, ShareToOne

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.LatentData, fields.RunControl):
    """Fields of the method; LatentData says where the latents are, RunControl what every training stage has."""

    output_dir: Place = "outputs/text_to_image"
    log_every: Count = 20
    eval_every: Natural = 500
    save_every: Natural = 500
    num_workers: Natural = 1

    # Data
    vae: Place = ""
    """Run folder of train_vae.py, or Hub id of an autoencoder, with which the latents were made. "" = outputs/vae, or
    the shipped one if that is not there."""

    # Model
    text_encoder: Place = "scratch"
    """scratch = a CLIP text encoder trained along, or a run folder or Hub id of one that stays as it is; it runs in
    training unless cache_latents.py made its embeddings."""
    vocab_size: Annotated[int, fields.at_least(514)] = 2048
    """Tokens of the tokenizer that is trained on the captions, for a text encoder from scratch."""
    caption_length: Annotated[int, fields.at_least(3)] = 32
    """Tokens of a caption, start and end included, for a text encoder from scratch; longer ones are cut."""
    text_hidden_size: Count = 128  # Width of the text encoder from scratch.
    text_num_layers: Count = 2  # Layers of the text encoder from scratch.
    text_num_heads: Count = 4  # Attention heads of the text encoder from scratch.
    block_out_channels: str = "48,96,96"
    """Channels after each stage of the UNet; every stage but the last halves the side."""
    attention_stages: str = "2,3"
    """Stages, from 1, whose blocks attend to the caption and to all places; the middle always does."""
    layers_per_block: Count = 1  # Residual blocks of each stage on the way down, one more on the way up.
    num_heads: Count = 4  # Heads of each attention.
    norm_num_groups: Count = 16  # Groups of each normalisation; all block_out_channels are multiples of it.
    init: Place = "scratch"
    """scratch, or a run folder or Hub id of a pipeline of these sizes and this prediction_type to start from."""

    # Objective
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"
    """What the model predicts: epsilon (the noise) or v_prediction."""
    zero_terminal_snr: bool = False
    """Make the last timestep noise alone and begin images there (Lin et al. 2024), with v_prediction and snr_gamma 0;
    else a little of the image is left in it, and images keep the mean brightness of the noise that they begin with."""
    snr_gamma: Amount = 5.0
    """Signal-to-noise ratio above which a timestep's weight stops to grow. 0 = all timesteps weigh the same."""
    caption_dropout: Share = 0.1
    """Share of the captions that are replaced by the empty one, so that guidance works. 0 = none."""

    # Optimization
    global_batch_size: Count = 16
    max_steps: Count = 2000
    max_grad_norm: Amount = 1.0
    learning_rate: RateOfNewWeights = 1e-3  # Peak rate.
    weight_decay: Amount = 0.01
    """Decoupled decay of matrices and convolutions, not of embeddings, those of timesteps among them, norms and biases.
    0 = none."""
    warmup_steps: Natural = 100  # Updates over which the rate rises linearly.
    decay_fraction: ShareToOne = 0.5
    """Share of the updates, at the end, over which the rate falls linearly to 0. 0 = it never falls."""
    ema_decay: Share = 0.995
    """Share of the old average that an update keeps; the averaged weights are evaluated and saved. 0 = no average."""

    # Evaluation
    sample_steps: Count = 25  # Steps in which each of the shown images is made.
    guidance_scale: FromOne = 4.0
    """How far shown images follow the caption's prediction beyond the empty caption's. 1 = no guidance."""
    best_metric: Literal["", "loss"] = ""
    """Metric whose best evaluation is kept too, in best/ of the run folder. "" = the last model alone."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

from shared.data import left_out
from shared.data.batches import to_device
from shared.data.randomness import derive_seed
from shared.diffusion import captions
from shared.diffusion.fixed_evaluation import BandErrors, fixed_batches
from shared.diffusion.generation import decode_images, starting_noise
from shared.diffusion.latent_cache import Latents, fingerprints, some_captions
from shared.diffusion.latent_encoding import load_autoencoder, open_latents
from shared.diffusion.latent_updates import FixedSamples, open_updates
from shared.metrics.figures import image_grid
from shared.models.averaged_weights import AveragedWeights
from shared.models.export import export_pipeline, new_like, whole_weights
from shared.models.pretrained import check_sizes, load_diffusion_model, load_scheduler
from shared.optim import schedules
from shared.optim.optimizers import clip_and_step, decay_of_matrices, set_learning_rates, state_bytes_per_parameter
from shared.performance import dry_run
from shared.performance.flops import training_flops
from shared.run import summary
from shared.run.best import Best
from shared.run.training_run import Run, start
from shared.runtime.cache_folder import cache_folder
from shared.runtime.collectives import SHARDED_ENGINES
from shared.runtime.signals import until_stopped

TRAINED, SHIPPED = Path("outputs/vae"), Path(__file__).parent / "assets" / "vae"
CACHED = Path("outputs/latents")
# Stable Diffusion 1.x's (CompVis/stable-diffusion, configs/stable-diffusion/v1-inference.yaml).
TRAINED_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TRAINED_NOISE |= {"num_train_timesteps": 1000, "trained_betas": None}
NOISE = {**TRAINED_NOISE, "steps_offset": 1}
# For samplers made from the saved scheduler: DDIM's defaults clip latents to [-1, 1], as if they were pixels.
UNCLIPPED = {"clip_sample": False, "set_alpha_to_one": False}
# A UNet that has one of these wants more than latents, timesteps and text.
TEXT_ALONE = dict.fromkeys(("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"))
TEXT_ALONE["dual_cross_attention"] = False
NUM_BANDS = 4  # of timesteps, which evaluation tells apart
NUM_SHOWN = 8
NEXT = "generate: python recipes/text_to_image/generate.py --model {}"
USAGE = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("path/of/this/folder")
image = pipeline({!r}, guidance_scale={}, num_inference_steps={}).images[0]"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    is_guidable = cfg.guidance_scale == 1 or cfg.caption_dropout > 0
    expected = "1 with caption_dropout 0: a model that never sees the empty caption cannot be guided by it"
    cli.expect(is_guidable, "guidance_scale", cfg.guidance_scale, expected)
    if cfg.zero_terminal_snr:  # of noise alone to predict the noise teaches nothing, and an SNR of 0 weighs nothing
        has_target = cfg.prediction_type == "v_prediction"
        cli.expect(has_target, "prediction_type", cfg.prediction_type, "v_prediction with zero_terminal_snr")
        cli.expect(cfg.snr_gamma == 0, "snr_gamma", cfg.snr_gamma, "0 with zero_terminal_snr")
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


def open_tokenizer(cfg: Config, train: Latents) -> Any:
    """The tokenizer of the text encoder that trains along: that of `init`, or one trained on the captions."""
    tokenizer = captions.load_or_train_tokenizer(cfg.init, train.captions(), cfg.vocab_size, cfg.caption_length)
    captions.note_cut_captions(tokenizer, some_captions([train], 10_000))
    return tokenizer


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
    text_encoder = captions.build_text_encoder(cfg.init, tokenizer, text_sizes) if frozen is None else None
    if cfg.init == "scratch":
        unet = diffusers.UNet2DConditionModel(**sizes, sample_size=latent_shape[-1])
    else:
        unet = load_diffusion_model(diffusers.UNet2DConditionModel, cfg.init, "init", subfolder="unet")
        if not isinstance(unet.config.attention_head_dim, int):  # Stable Diffusion 2 has others in each stage
            del sizes["attention_head_dim"]
        check_sizes(cfg.init, "a unet", unet.config, {**sizes, **TEXT_ALONE})
        noise = load_scheduler(diffusers.DDPMScheduler, cfg.init).config
        trained = {**TRAINED_NOISE, "prediction_type": cfg.prediction_type}
        if not cfg.zero_terminal_snr:  # to which a model that was trained without is brought by training on
            trained["rescale_betas_zero_snr"] = False
        check_sizes(cfg.init, "a scheduler", noise, trained)
        unet.register_to_config(sample_size=latent_shape[-1])  # of the images that the pipeline makes by default
    model = Denoiser(unet, text_encoder)
    if cfg.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def build_scheduler(cfg: Config) -> diffusers.DPMSolverMultistepScheduler:
    """The noise schedule, in the form in which images are made with it and it is saved."""
    steps = {"rescale_betas_zero_snr": cfg.zero_terminal_snr}
    steps["timestep_spacing"] = "trailing" if cfg.zero_terminal_snr else "linspace"  # trailing: from the last timestep
    return diffusers.DPMSolverMultistepScheduler.from_config(
        {**NOISE, **UNCLIPPED, **steps, "prediction_type": cfg.prediction_type}
    )


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
    cfg: Config, accelerator: Any, model: Any, frozen: Any, held_out: dict[str, FixedSamples], signal: Tensor
) -> dict[str, float]:
    """Errors, without weights, on the fixed noise of each split: over all timesteps and in each band of them.

    A text encoder that is `frozen` makes the embeddings that are not cached.
    """
    model.eval()
    found = BandErrors(held_out)
    for place, batch in until_stopped(accelerator, fixed_batches(accelerator, held_out, cfg.num_workers)):
        error, _ = errors(cfg, model, captions.embed_captions(accelerator, batch, frozen), signal)
        found.add(place, error)
    model.train()
    return found.metrics(accelerator, [cfg.data_split])


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
    latents = starting_noise(cfg.seed, len(texts), latent_shape).to(device)
    both = torch.cat([empty.expand_as(texts), texts]).to(device)
    scheduler.set_timesteps(cfg.sample_steps, device=device)
    for timestep in scheduler.timesteps:
        timesteps = timestep.expand(len(both))
        without, with_text = forward(model, torch.cat([latents, latents]), timesteps, both).float().chunk(2)
        predicted = without + cfg.guidance_scale * (with_text - without)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    model.train()
    return decode_images(vae, latents)


def draw(accelerator: Any, images: list[np.ndarray], prompts: list[str], file: Path) -> None:
    """Write images under their prompts into one; the main process draws."""
    if accelerator.is_main_process:
        image_grid(images, prompts, file)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW as Stable Diffusion 1.x has it (its model card: AdamW), with decay of matrices alone."""
    return torch.optim.AdamW(decay_of_matrices(model, cfg.weight_decay), lr=cfg.learning_rate, fused=True)


def train_update(
    cfg: Config, accelerator: Any, model: Any, optimizer: Any, batches: list[Any], signal: Tensor
) -> tuple[Tensor, Tensor]:
    """One optimizer update: its mean weighted loss over all processes and micro-batches, and its gradient norm."""
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(model):
            error, kept = errors(cfg, model, batch, signal)
            loss = (error * timestep_weights(kept, cfg.snr_gamma, cfg.prediction_type)).sum()
            accelerator.backward(loss * scale)
        total += loss.detach()
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    return accelerator.reduce(total, "sum") / cfg.global_batch_size, grad_norm


def export(cfg: Config, accelerator: Any, model: Any, frozen: Any, vae: Any, tokenizer: Any, run_dir: Path) -> None:
    """Write all parts as a StableDiffusionPipeline. Every process calls this."""
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model)
        unet = new_like(diffusers.UNet2DConditionModel, trained.unet)
        bare = Denoiser(unet, captions.new_text_encoder(trained.text_encoder) if frozen is None else None)
        bare.load_state_dict(weights)
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
    accelerator, micro_batch_size = start(cfg)
    vae = load_autoencoder(cfg.vae, TRAINED, SHIPPED).to(accelerator.device)
    text = None if cfg.text_encoder == "scratch" else captions.load_text_encoder(cfg.text_encoder, "text_encoder")
    folders = {"cached": CACHED, "cache_dir": cache_folder(cfg.cache_dir)}
    train, held_out, manifest, encoder = open_latents(accelerator, cfg, vae, text, **folders)
    tokenizer, frozen = text or (open_tokenizer(cfg, train), None)
    empty = captions.encode_captions([""], tokenizer, frozen)["text"][0]
    reading = {"scaling_factor": vae.config.scaling_factor, "tokenizer": tokenizer}
    reading["empty"] = None if frozen is encoder else empty.numpy()  # an encoder that runs wants tokens
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, held_out, reading, frozen, micro_batch_size, empty)
        return
    model = build_model(cfg, tokenizer, frozen, train.squarest_shape())
    facts = describe(cfg, accelerator, model, train, empty)
    accelerator.print(summary.table(facts))
    if accelerator.distributed_type.value not in SHARDED_ENGINES:  # which cut weights into flat parts
        model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best, (due, metrics) = Best(cfg.best_metric and f"eval/{cfg.best_metric}", run.state), run.owed
    average = AveragedWeights(model, cfg.ema_decay, run.state.get("tensors", {}))
    sizes = {"caption_dropout": cfg.caption_dropout, "micro_batch_size": micro_batch_size}
    updates = open_updates(accelerator, cfg, train, reading, **sizes, step=run.step)
    splits, bands = {cfg.data_split: train} | held_out, (cfg.eval_rows, NUM_BANDS, reading)
    fixed = {name: FixedSamples(split, *bands, batch_size=micro_batch_size) for name, split in splits.items()}
    prompts = some_captions(held_out.values(), NUM_SHOWN)
    texts = captions.encode_captions(prompts, tokenizer, frozen)["text"]
    shown = {"vae": vae, "texts": texts, "empty": empty, "latent_shape": train.squarest_shape()}
    signal = build_scheduler(cfg).alphas_cumprod.to(accelerator.device)
    run.record(Path(__file__), {"data": cfg.data, **fingerprints(manifest), "init": cfg.init, **facts})
    model.train()
    for step, batches in run.updates(updates, facts["flops_per_sample"]):
        if batches:  # else the evaluation alone is left, which a signal had ended
            factor = schedules.warmup_stable_decay(step, cfg.max_steps, cfg.warmup_steps, cfg.decay_fraction)
            set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
            batches = [to_device(batch, accelerator.device) for batch in batches]
            batches = [captions.embed_captions(accelerator, batch, encoder) for batch in batches]
            loss, grad_norm = train_update(cfg, accelerator, model, optimizer, batches, signal)
            average.update(step + 1)

            due = run.count_update(grad_norm, samples=cfg.global_batch_size, units=cfg.global_batch_size)
            metrics = {}
            if due.log:
                metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
                metrics |= {"train/grad_norm": grad_norm.item(), **run.rates("images")}
        if due.evaluate:
            with run.evaluation(metrics), average.in_place():
                metrics |= evaluate(cfg, accelerator, model, encoder, fixed, signal)
                images = make_images(cfg, accelerator, model, **shown)
                draw(accelerator, images, prompts, run.folder / "samples" / f"step_{run.step:08d}.png")
                if best.is_better(run.step, metrics, ""):
                    export(cfg, accelerator, model, frozen, vae, tokenizer, run.folder / best.FOLDER)
        with run.pause():
            run.write(metrics)
            if due.save:
                run.save({"tensors": average.tensors(), **best.state()})
            if due.push:
                with average.in_place():
                    export(cfg, accelerator, model, frozen, vae, tokenizer, run.folder)
                run.push()

    with average.in_place():
        images = make_images(cfg, accelerator, model, **shown)
        export(cfg, accelerator, model, frozen, vae, tokenizer, run.folder)
    draw(accelerator, images, prompts, run.folder / "figures" / "images.png")
    results = {"training_flops": facts["flops_per_sample"] * cfg.global_batch_size * run.step, **best.kept()}
    card = {"samples": "\n".join(prompts), "figures": {"Images of held-out captions": "images.png"}}
    usage = USAGE.format(prompts[0], cfg.guidance_scale, cfg.sample_steps)
    run.finish("text-to-image", usage, results=results, **card, next_command=NEXT.format(shlex.quote(str(run.folder))))


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
        "left_out": left_out.counts(),
        **summary.describe_engine(accelerator),
    }


def report_costs(
    cfg: Config,
    accelerator: Any,
    train: Latents,
    held_out: dict[str, Latents],
    reading: dict[str, Any],
    frozen: Any,
    micro_batch_size: int,
    empty: Tensor,
) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes.

    A frozen text encoder is in none of these numbers.
    """
    sizes = {"caption_dropout": cfg.caption_dropout, "micro_batch_size": micro_batch_size}
    first, *_ = next(open_updates(accelerator, replace(cfg, num_workers=0), train, reading, **sizes, step=0))
    batch, seconds = to_device(first, accelerator.device), None
    text = empty.to(accelerator.device).expand(len(batch["text"]), *empty.shape)
    inputs = {"latents": batch["latents"], "timesteps": batch["uniform"].long(), "text": text}
    parts = {"tokenizer": reading["tokenizer"], "frozen": frozen, "latent_shape": batch["latents"].shape[1:]}
    with dry_run.without_memory():
        model = build_model(cfg, **parts)
        facts = describe(cfg, accelerator, model, train, empty)
        state = state_bytes_per_parameter(build_optimizer(cfg, model)) + (4 if cfg.ema_decay else 0)  # of the average
        costs = dry_run.costs(accelerator, model, inputs, state)
    if dry_run.can_time(accelerator, facts["flops_per_sample"] * micro_batch_size, costs["memory: total"]):
        model = build_model(cfg, **parts)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    bands = (cfg.eval_rows, NUM_BANDS, reading)
    fixed = [FixedSamples(split, *bands, batch_size=micro_batch_size) for split in (train, *held_out.values())]
    rows |= dry_run.evaluation_rows(cfg, seconds, dry_run.num_batches(accelerator, map(len, fixed), 1))
    accelerator.print(f"first caption: {train.captions()[0]}\n\n{summary.table(rows)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
