r"""Teach a text-to-image model a new style or subject from few images: an adapter beside its weights, or all of them.

Papers: Hu et al. 2021 (LoRA), Ruiz et al. 2023 (DreamBooth: a rare word for a subject, and images of its class, so that
the class is not forgotten; section 3.2). With no arguments it starts from outputs/text_to_image_two_styles, which
pretrain.py leaves with configs/emoji_two_styles.yaml, and learns the third drawing style of the embedded emoji.

    accelerate launch recipes/text_to_image/finetune.py
    accelerate launch recipes/text_to_image/finetune.py --init stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --data me/dog --caption "a photo of sks dog" --prior_caption "a photo of a dog" --eval_fraction 0 \
        --max_steps 400 --global_batch_size 4
    python recipes/text_to_image/generate.py --model outputs/text_to_image_two_styles --lora outputs/text_to_image_lora
"""

# Shapes: B samples of a micro-batch, C, h, w of the latents, L tokens of a caption, D width of the text encoder.
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place
from shared.fields import Amount, Count, FromOne, Natural, Share, ShareToOne

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.LatentData, fields.RunControl):
    """Fields of the method; LatentData says where the latents are, RunControl what every training stage has."""

    output_dir: Place = "outputs/text_to_image_lora"
    log_every: Count = 20
    eval_every: Natural = 100
    save_every: Natural = 200
    num_workers: Natural = 1

    # Data
    data: Place = "sample"
    """Images with captions, encoded once into cache_dir: sample, a .parquet or .tar file, a folder of them or of images
    with metadata.jsonl, or a Hub id; or a folder that cache_latents.py made with init's autoencoder."""
    data_config: str = ""  # Configuration of a Hub data set. "" = its only one.
    captions_with: str = ""
    """Take only samples whose caption has this text, also to evaluate on. "" = all, but of sample 3D Fluent."""
    image_column: str = ""  # Column of the images. "" = the only one that holds images.
    caption_column: str = ""  # Column of the captions. "" = the one called caption, text or txt.
    caption: str = ""
    """Caption of all images, with a rare word for what they show: a photo of sks dog. "" = each has its own."""
    max_bad_fraction: Share = 0.01
    """Share of the images that may be damaged, and of the captions that may be empty; they are left out.
    0 = not one."""
    image_size: Natural = 0  # Side in pixels to which images are cut, as the largest square. 0 = what init makes.
    mirrored: bool = True  # Encode the mirror images too; not where left and right differ, as in text and faces.
    train_images: Natural = 0  # Images to train on, chosen by the seed. 0 = all.
    prior_data: Place = ""
    """Images that the model is not to forget, such as others of a subject's class, in the forms of `data`. "" = none,
    or with prior_caption those that init makes of it."""
    prior_caption: str = ""  # Caption of all images of the prior: a photo of a dog. "" = each has its own.
    prior_images: Count = 100  # Images that init makes of prior_caption, where there is no prior_data.

    # Model
    init: Place = "outputs/text_to_image_two_styles"
    """Run folder or Hub id of the pipeline to start from: Stable Diffusion 1 or 2, or PRX with a text encoder of CLIP.
    What it predicts, its noise and its sizes are kept."""
    lora_rank: Natural = 16
    """Rank of an adapter that is trained beside the frozen model. 0 = the model itself is trained."""
    lora_alpha: Natural = 0  # The adapter's product is scaled by lora_alpha / lora_rank. 0 = lora_rank.
    lora_dropout: Share = 0.0  # Probability with which an input of the adapter is dropped. 0 = none.
    merge: bool = False  # Export the whole pipeline, the adapter added to its matrices; else the adapter alone.
    train_text_encoder: bool = False  # Train the text encoder along, or an adapter of it.

    # Objective
    snr_gamma: Amount = 5.0
    """Signal-to-noise ratio above which a timestep's weight stops to grow, of diffusion. 0 = all weigh the same."""
    prior_weight: Amount = 1.0  # Weight of the prior's loss beside that of the images. 0 = it is evaluated alone.
    caption_dropout: Share = 0.1
    """Share of the captions that are replaced by the empty one, so that guidance goes on to work. 0 = none."""

    # Optimization
    global_batch_size: Count = 16
    max_steps: Count = 600
    max_grad_norm: Amount = 1.0
    learning_rate: Amount = 0.0
    """Peak rate. 0 = 1e-4 for an adapter and 1e-5 for a model, as is usual; of a run folder as much as that run's for
    an adapter, and 0.3 of it for a model."""
    weight_decay: Amount = 0.0  # Decoupled decay of matrices. 0 = none.
    warmup_steps: Natural = 20  # Updates over which the rate rises linearly.
    decay_fraction: ShareToOne = 0.5
    """Share of the updates, at the end, over which the rate falls linearly to 0. 0 = it never falls."""

    # Evaluation
    best_metric: Literal["", "loss"] = ""
    """Metric whose best evaluation is kept too, in best/ of the run folder. "" = the last weights alone."""
    eval_fraction: Share = 0.05
    """Share of the samples held out where there is no split to evaluate on. 0 = none: the loss of the images to train
    on is told, as of a subject of which there are few."""
    prompts_file: Place = ""
    """Text file with a prompt on each line, of which images are shown. "" = captions of held-out images."""
    sample_steps: Count = 25  # Steps in which each of the shown images is made.
    guidance_scale: FromOne = 4.0
    """How far shown images follow the caption's prediction beyond the empty caption's. 1 = no guidance."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import diffusers
import numpy as np
import torch
import yaml
from torch import Tensor, nn

from shared.data import left_out
from shared.data.batches import to_device
from shared.data.randomness import derive_seed, shuffled_indices
from shared.diffusion import captions
from shared.diffusion.adapters import add_lora, merge_lora, write_lora
from shared.diffusion.fixed_evaluation import BandErrors, fixed_batches
from shared.diffusion.generation import decode_images, load_pipeline, read_prompts, reads_as_written, starting_noise
from shared.diffusion.latent_cache import Latents, fingerprints, some_captions
from shared.diffusion.latent_encoding import open_cache, open_images
from shared.diffusion.latent_updates import FixedSamples, open_updates
from shared.diffusion.prior import make_prior
from shared.metrics.figures import image_grid
from shared.models.export import export_pipeline, whole_weights
from shared.models.pretrained import check_sizes, load_diffusion_model, load_errors, load_scheduler
from shared.optim import schedules
from shared.optim.optimizers import clip_and_step, decay_of_matrices, set_learning_rates, state_bytes_per_parameter
from shared.performance import dry_run
from shared.performance.flops import training_flops
from shared.run import summary
from shared.run.best import Best
from shared.run.training_run import Run, start
from shared.runtime.cache_folder import cache_folder
from shared.runtime.collectives import SHARDED_ENGINES, node_main_first
from shared.runtime.signals import until_stopped

# Of diffusers' train_text_to_image_lora.py (its default), and of train_text_to_image.py (its README).
ADAPTER_RATE, MODEL_RATE = 1e-4, 1e-5
ADAPTER_SHARE, MODEL_SHARE = 1.0, 0.3  # of the rate of a run folder; three times as much for an adapter learns less
# A UNet that has one of these wants more than latents, timesteps and text.
TEXT_ALONE = dict.fromkeys(("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type"))
TEXT_ALONE["dual_cross_attention"] = False
# For samplers made from the saved scheduler: DDIM's defaults clip latents to [-1, 1], as if they were pixels.
UNCLIPPED = {"clip_sample": False, "set_alpha_to_one": False}
PREDICTIONS = ("epsilon", "v_prediction")
NEW_STYLE = "3D Fluent"  # of the embedded emoji, which configs/emoji_two_styles.yaml leaves out
PRIOR = "prior"  # as a split
NUM_BANDS = 4  # of timesteps, which evaluation tells apart
NUM_SHOWN = 8
NEXT_OF_ADAPTER = "generate: python recipes/text_to_image/generate.py --model {} --lora {}"
NEXT = "generate: python recipes/text_to_image/generate.py --model {}"
USAGE_OF_ADAPTER = """from diffusers import {}

pipeline = {}.from_pretrained({!r})
pipeline.load_lora_weights("path/of/this/folder")
image = pipeline({!r}, guidance_scale={}, num_inference_steps={}{}).images[0]"""
USAGE = """from diffusers import {}

pipeline = {}.from_pretrained("path/of/this/folder")
image = pipeline({!r}, guidance_scale={}, num_inference_steps={}{}).images[0]"""


class Noise(NamedTuple):
    """What the model was trained on, and so is trained on here.

    Attributes:
        sampler: with which images are made; its prediction_type is what the model predicts.
        signal: the share of the variance of noisy latents that is signal, at each timestep; None = the model is one of
            flow matching, whose noisy latents lie on the line from latents to noise.
    """

    sampler: Any
    signal: Tensor | None


class Init(NamedTuple):
    """What is kept of the pipeline to start from.

    Attributes:
        pipeline: its class.
        vae: frozen.
        tokenizer: as the pipeline reads captions.
        text: its bare tokenizer, and the text encoder, if that stays as it is; else None.
        noise: that it was trained on.
        side: pixels of a side of the images.
    """

    pipeline: Any
    vae: Any
    tokenizer: Any
    text: tuple[Any, Any] | None
    noise: Noise
    side: int


class Noisy(NamedTuple):
    """Noisy latents (B, C, h, w), their timesteps (B,), what is to be predicted of them, and weights of errors (B,)."""

    latents: Tensor
    timesteps: Tensor
    wanted: Tensor
    weights: Tensor


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    is_guidable = cfg.guidance_scale == 1 or cfg.caption_dropout > 0
    expected = "1 with caption_dropout 0, with which a model forgets to be guided by the empty caption"
    cli.expect(is_guidable, "guidance_scale", cfg.guidance_scale, expected)
    for name, unset in {"lora_alpha": 0, "lora_dropout": 0.0, "merge": False}.items():
        is_used = cfg.lora_rank > 0 or getattr(cfg, name) == unset
        cli.expect(is_used, name, getattr(cfg, name), f"{unset} without lora_rank, which makes an adapter")
    base = not cfg.push_to_hub or not cfg.lora_rank or cfg.merge or not Path(cfg.init).is_dir()
    cli.expect(base, "merge", cfg.merge, "True where init is a folder, which those who get the pushed adapter lack")
    has_prompts = cfg.eval_fraction > 0 or bool(cfg.prompts_file or cfg.caption or cfg.eval_splits)
    expected = "a file of prompts with eval_fraction 0, where no caption is held out"
    cli.expect(has_prompts, "prompts_file", cfg.prompts_file, expected)


def with_defaults(cfg: Config) -> Config:
    """The configuration with the rate and the style that it leaves open, as config.yaml records them."""
    record = Path(cfg.init) / "config.yaml"
    before = (yaml.safe_load(record.read_text(encoding="utf-8")) or {}) if record.is_file() else {}
    if rate := before.get("learning_rate", 0.0):
        rate *= ADAPTER_SHARE if cfg.lora_rank else MODEL_SHARE
    usual = ADAPTER_RATE if cfg.lora_rank else MODEL_RATE
    wanted = cfg.captions_with or (NEW_STYLE if cfg.data == "sample" else "")
    return replace(cfg, learning_rate=cfg.learning_rate or rate or usual, captions_with=wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(
    cfg: Config, accelerator: Any, init: Init
) -> tuple[dict[str, Latents], dict[str, Latents], dict[str, Any]]:
    """Latents to train on, those of the prior among them, and to evaluate on, by splits; and what they were made of."""
    columns = {"config": cfg.data_config, "image_column": cfg.image_column, "caption_column": cfg.caption_column}
    form = {"side": init.side, "mirrored": cfg.mirrored, "max_bad_fraction": cfg.max_bad_fraction}
    folders = {"cache_dir": cache_folder(cfg.cache_dir), "vae": init.vae}
    with node_main_first(accelerator):
        folder = open_images(cfg.data, cfg.caption, columns, **folders, **form)
        train, held_out, manifest = open_cache(folder, cfg, init.vae, init.text, {})
        order = shuffled_indices(np.arange(len(train)), len(train), derive_seed(cfg.seed, "few images"))
        splits, prior = {cfg.data_split: train.subset(np.sort(order[: cfg.train_images or len(train)]))}, cfg.prior_data
        if cfg.prior_caption and not prior:
            made = {"number": cfg.prior_images, "num_steps": cfg.sample_steps, "guidance_scale": cfg.guidance_scale}
            prior = str(make_prior(folders["cache_dir"], cfg.init, cfg.prior_caption, accelerator.device, **made))
        if prior:
            folder = open_images(prior, cfg.prior_caption, columns, **folders, **form, field="prior_data")
            all_of_it = replace(cfg, captions_with="", captions_without="", eval_fraction=0.0, data_split="train")
            splits[PRIOR], _, of_prior = open_cache(folder, all_of_it, init.vae, init.text, {}, field="prior_data")
            manifest = {**manifest, "data": {**manifest["data"], PRIOR: of_prior["data"]}}
    shapes = [[shape for shape, _ in latents.buckets()] for latents in splits.values()]
    fits = len(splits) == 1 or (shapes[0] == shapes[1] and len(shapes[0]) == 1)
    cli.expect(fits, "prior_data", prior, f"latents of the one shape of data, {shapes[0]}, got {shapes[-1]}")
    return splits, held_out, manifest


def read_updates(cfg: Config, accelerator: Any, splits: dict[str, Latents], reading: Any, size: int, step: int) -> Any:
    """Updates from `step` on: each this process's micro-batches of the images and, if there are any, of the prior."""
    sizes = {"caption_dropout": cfg.caption_dropout, "micro_batch_size": size, "step": step}
    seeds = {PRIOR: derive_seed(cfg.seed, PRIOR)}  # else it would have the noise of the images
    each = [(replace(cfg, seed=seeds.get(name, cfg.seed)), split) for name, split in splits.items()]
    return zip(*(open_updates(accelerator, some, split, reading, **sizes) for some, split in each), strict=True)


# ----------------------------------------------------------------------------------------------------------------------
# Model


class Denoiser(nn.Module):
    """The networks that train together, as one module with one `forward`, in which engines gather weights.

    Args:
        network: the diffusion model, a UNet or a PRX transformer.
        text_encoder: trained along; None = captions come as embeddings.
    """

    def __init__(self, network: Any, text_encoder: Any) -> None:
        super().__init__()
        self.network, self.text_encoder = network, text_encoder
        # What FSDP2 shards as one; accelerate wants each of them to occur.
        units = {"BasicTransformerBlock", "ResnetBlock2D", "PRXBlock", "CLIPEncoderLayer"}
        self._no_split_modules = sorted(units & {type(module).__name__ for module in self.modules()})

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of blocks in the backward pass."""
        self.network.enable_gradient_checkpointing()
        if self.text_encoder is not None:
            self.text_encoder.activation_checkpointing_enable()

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """Predictions (B, C, h, w) at timesteps (B,), for tokens (B, L) or embeddings (B, L, D), and mask (B, L)."""
        states = text if self.text_encoder is None else self.text_encoder(input_ids=text).last_hidden_state
        masks = {"attention_mask": text_mask} if type(self.network).__name__ == "PRXTransformer2DModel" else {}
        return self.network(latents, timestep=timesteps, encoder_hidden_states=states, **masks).sample


def open_init(cfg: Config) -> Init:
    """All of `init` but the network that is trained, on the CPU."""
    with load_errors("init", cfg.init):
        index = diffusers.DiffusionPipeline.load_config(cfg.init)
    name, is_flow = index["_class_name"], index["_class_name"] == "PRXPipeline"
    known = ("StableDiffusionPipeline", "PRXPipeline")
    cli.expect(name in known, "init", cfg.init, f"a pipeline of {' or '.join(known)}, got {name}")
    by_library = not (is_flow and cfg.lora_rank) or cfg.merge
    cli.expect(by_library, "merge", cfg.merge, "True for PRX, of which diffusers loads no adapters")
    vae = load_diffusion_model(diffusers.AutoencoderKL, cfg.init, "init", subfolder="vae").eval().requires_grad_(False)
    shift = vae.config.shift_factor or 0  # which Stable Diffusion's pipeline does not look at
    is_centred = not is_flow or shift == 0
    cli.expect(is_centred, "init", cfg.init, f"an autoencoder whose latents are not shifted, got one by {shift}")
    halving = 2 ** (len(vae.config.block_out_channels) - 1)
    with load_errors("init", cfg.init):
        made = {} if is_flow else diffusers.UNet2DConditionModel.load_config(cfg.init, subfolder="unet")
    side = cfg.image_size or (index["default_sample_size"] if is_flow else halving * made["sample_size"])
    cli.expect(side % halving == 0, "image_size", side, f"a multiple of {halving}, for the autoencoder halves it")
    tokenizer, encoder = captions.load_text_encoder(cfg.init, "init")
    is_cleaned = is_flow and not reads_as_written(cfg.init)
    reader = captions.CleanedCaptions(tokenizer) if is_cleaned else tokenizer
    text = None if cfg.train_text_encoder else (tokenizer, encoder)
    return Init(getattr(diffusers, name), vae, reader, text, open_noise(cfg, is_flow), side)


def open_noise(cfg: Config, is_flow: bool) -> Noise:
    """The noise that `init` was trained on."""
    if is_flow:
        return Noise(load_scheduler(diffusers.FlowMatchEulerDiscreteScheduler, cfg.init), None)
    noise = load_scheduler(diffusers.DDPMScheduler, cfg.init)
    kind = noise.config.prediction_type
    cli.expect(kind in PREDICTIONS, "init", cfg.init, f"a model that predicts {' or '.join(PREDICTIONS)}, got {kind}")
    weighs_all = cfg.snr_gamma == 0 or not noise.config.rescale_betas_zero_snr
    expected = "0 for init, whose last timestep is noise alone, of which the weight would be 0"
    cli.expect(weighs_all, "snr_gamma", cfg.snr_gamma, expected)
    sampler = diffusers.DPMSolverMultistepScheduler.from_config({**noise.config, **UNCLIPPED})
    return Noise(sampler, noise.alphas_cumprod)


def load_network(cfg: Config, init: Init) -> Any:
    """The diffusion model of `init`, in float32."""
    if init.noise.signal is None:
        return load_diffusion_model(diffusers.PRXTransformer2DModel, cfg.init, "init", subfolder="transformer")
    unet = load_diffusion_model(diffusers.UNet2DConditionModel, cfg.init, "init", subfolder="unet")
    check_sizes(cfg.init, "a unet", unet.config, {**TEXT_ALONE, "in_channels": init.vae.config.latent_channels})
    return unet


def build_model(cfg: Config, init: Init) -> Denoiser:
    """The networks of `init`, of which adapters, or all weights, are to be trained."""
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    text_encoder = captions.load_text_encoder(cfg.init, "init")[1] if cfg.train_text_encoder else None
    model = with_adapters(cfg, Denoiser(load_network(cfg, init), text_encoder))
    if cfg.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def with_adapters(cfg: Config, model: Denoiser) -> Denoiser:
    """The model with adapters, which alone are trained, or where there is to be none with all weights to train."""
    for network in (model.network, model.text_encoder):
        if network is not None:
            network.requires_grad_(True)
            if cfg.lora_rank:
                alpha = cfg.lora_alpha or cfg.lora_rank
                add_lora(network, rank=cfg.lora_rank, alpha=alpha, dropout=cfg.lora_dropout)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def forward(model: Any, noisy: Noisy, batch: dict[str, Tensor]) -> Tensor:
    """Predictions (B, C, h, w); see `Denoiser.forward`."""
    return model(noisy.latents, noisy.timesteps, batch["text"], batch["text_mask"])


def diffuse(batch: dict[str, Tensor], signal: Tensor, prediction_type: str, snr_gamma: float) -> Noisy:
    """By diffusion: v (Salimans and Ho 2022) or the noise, weighted by min-SNR (Hang et al. 2023, section 3.4)."""
    timesteps = (batch["uniform"] * len(signal)).long().clamp(max=len(signal) - 1)
    kept, latents, noise = signal[timesteps], batch["latents"], batch["noise"]
    of_signal, of_noise = kept[:, None, None, None].sqrt(), (1 - kept[:, None, None, None]).sqrt()
    is_noise = prediction_type == "epsilon"
    wanted = noise if is_noise else of_signal * noise - of_noise * latents
    ratio = kept / (1 - kept)  # of signal to noise
    weights = ratio.clamp(max=snr_gamma) / (ratio if is_noise else ratio + 1) if snr_gamma else torch.ones_like(kept)
    return Noisy(of_signal * latents + of_noise * noise, timesteps, wanted, weights)


def flow(batch: dict[str, Tensor], times: Tensor) -> Noisy:
    """By flow matching: the velocity on the line from latents to noise (Liu et al. 2022), at times (B,) from 0 to 1."""
    share, latents, noise = times[:, None, None, None], batch["latents"], batch["noise"]
    return Noisy((1 - share) * latents + share * noise, times, noise - latents, torch.ones_like(times))


def trained_times(uniform: Tensor, shift: float) -> Tensor:
    """Times (B,) of numbers (B,) in [0, 1]: logit-normal (Esser et al. 2024, section 3.1), shifted (equation 23)."""
    times = torch.sigmoid(torch.special.ndtri(uniform))
    return shift * times / (1 + (shift - 1) * times)


def add_noise(cfg: Config, noise: Noise, batch: dict[str, Tensor]) -> Noisy:
    """What the model learns from."""
    if noise.signal is None:
        return flow(batch, trained_times(batch["uniform"], noise.sampler.config.shift))
    return diffuse(batch, noise.signal, noise.sampler.config.prediction_type, cfg.snr_gamma)


def add_even_noise(noise: Noise, batch: dict[str, Tensor]) -> Noisy:
    """What the model is evaluated on: times evenly from 0 to 1, of equal weight."""
    if noise.signal is None:
        return flow(batch, batch["uniform"])
    return diffuse(batch, noise.signal, noise.sampler.config.prediction_type, snr_gamma=0)


def errors(model: Any, noisy: Noisy, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared error of each sample's prediction (B,)."""
    return (forward(model, noisy, batch).float() - noisy.wanted).square().mean((1, 2, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def fixed_samples(
    cfg: Config, splits: dict[str, Latents], reading: dict[str, Any], batch_size: int
) -> dict[str, FixedSamples]:
    """Samples of each split with noise that is the same at every evaluation."""
    bands = (cfg.eval_rows, NUM_BANDS, reading)
    return {name: FixedSamples(split, *bands, batch_size=batch_size) for name, split in splits.items()}


def choose_prompts(cfg: Config, splits: list[Latents]) -> list[str]:
    """Of which images are shown."""
    return read_prompts(cfg.prompts_file)[:NUM_SHOWN] if cfg.prompts_file else some_captions(splits, NUM_SHOWN)


@torch.compiler.set_stance("force_eager")  # else compiled anew for each shape, and for no gradients
@torch.no_grad()
def evaluate(
    cfg: Config, accelerator: Any, model: Any, frozen: Any, splits: dict[str, FixedSamples], noise: Noise
) -> dict[str, float]:
    """Errors on the fixed noise of each split, over all times and in each band of them, those trained on among them.

    A text encoder that is `frozen` makes the embeddings that are not cached.
    """
    model.eval()
    found = BandErrors(splits)
    for place, batch in until_stopped(accelerator, fixed_batches(accelerator, splits, cfg.num_workers)):
        batch = captions.embed_captions(accelerator, batch, frozen)
        found.add(place, errors(model, add_even_noise(noise, batch), batch))
    model.train()
    trained = {cfg.data_split, PRIOR}
    return found.metrics(accelerator, trained if splits.keys() - trained else {PRIOR})


@torch.compiler.set_stance("force_eager")  # else compiled anew for each shape, and for no gradients
@torch.no_grad()
def make_images(
    cfg: Config, accelerator: Any, model: Any, noise: Noise, vae: Any, texts: Any, empty: Any, shape: Sequence[int]
) -> list[np.ndarray]:
    """An image uint8 (H, W, 3) for each of some texts, with guidance (Ho and Salimans 2022, equation 6).

    Every process makes all of them, since weights may be sharded; each begins with noise of its own.
    """
    model.eval()
    sampler, device, number = noise.sampler, accelerator.device, len(texts["text"])
    latents = starting_noise(cfg.seed, number, shape).to(device)
    both = {name: torch.cat([empty[name].expand_as(rows), rows]).to(device) for name, rows in texts.items()}
    sampler.set_timesteps(cfg.sample_steps, device=device)
    for timestep in sampler.timesteps:
        time = timestep if noise.signal is not None else timestep / sampler.config.num_train_timesteps
        predicted = model(torch.cat([latents, latents]), time.expand(2 * number), both["text"], both["text_mask"])
        without, with_text = predicted.float().chunk(2)
        predicted = without + cfg.guidance_scale * (with_text - without)
        latents = sampler.step(predicted, timestep, latents).prev_sample
    model.train()
    return decode_images(vae, latents)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW of what is trained, with decay of matrices alone."""
    return torch.optim.AdamW(decay_of_matrices(model, cfg.weight_decay), lr=cfg.learning_rate, fused=True)


def train_update(
    cfg: Config, accelerator: Any, model: Any, optimizer: Any, updates: list[list[Any]], noise: Noise
) -> tuple[Tensor, Tensor]:
    """One optimizer update: its mean loss over all processes and micro-batches, and its gradient norm.

    `updates` are micro-batches of the images and, if there are any, of the prior (Ruiz et al. 2023, equation 2).
    """
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    total = torch.zeros((), device=accelerator.device)
    for batches in zip(*updates, strict=True):
        with accelerator.accumulate(model):
            joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
            noisy = add_noise(cfg, noise, joined)
            weighted = (errors(model, noisy, joined) * noisy.weights).split([len(batch["text"]) for batch in batches])
            loss = weighted[0].sum() + cfg.prior_weight * sum(part.sum() for part in weighted[1:])
            accelerator.backward(loss * scale)
        total += loss.detach()
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    return accelerator.reduce(total, "sum") / cfg.global_batch_size, grad_norm


def export(cfg: Config, accelerator: Any, model: Any, init: Init, folder: Path) -> None:
    """Write the adapters as `load_lora_weights` reads them, or the whole pipeline. Every process calls this."""
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process and cfg.lora_rank and not cfg.merge:
        trained = accelerator.unwrap_model(model, keep_torch_compile=False)
        write_lora(init.pipeline, trained.network, trained.text_encoder, weights, folder)
    elif accelerator.is_main_process:
        pipeline = load_pipeline(cfg.init, "init")
        network = pipeline.transformer if init.noise.signal is None else pipeline.unet
        bare = with_adapters(cfg, Denoiser(network, pipeline.text_encoder if cfg.train_text_encoder else None))
        bare.load_state_dict(weights)
        for part in (bare.network, bare.text_encoder):
            if cfg.lora_rank and part is not None:
                merge_lora(part)
        if init.noise.signal is None:
            pipeline.register_to_config(default_sample_size=init.side)
        else:  # pixels that the pipeline makes by default, by latents
            network.register_to_config(sample_size=init.side // pipeline.vae_scale_factor)
        export_pipeline(pipeline, folder)
    accelerator.wait_for_everyone()


def main(cfg: Config) -> None:
    """Train, evaluate, save, and leave an adapter that `load_lora_weights` loads, or a pipeline."""
    check_config(cfg)
    cfg = with_defaults(cfg)
    accelerator, micro_batch_size = start(cfg)
    init = open_init(cfg)
    init.vae.to(accelerator.device)
    splits, held_out, manifest = open_data(cfg, accelerator, init)
    frozen = init.text and init.text[1].to(accelerator.device)
    encoder = None if manifest["text_encoder"] else frozen  # which must run in training
    empty = captions.encode_captions([""], init.tokenizer, frozen)
    reading = {"scaling_factor": init.vae.config.scaling_factor, "tokenizer": init.tokenizer}
    reading["empty"] = None if frozen is encoder else empty["text"][0].numpy()  # an encoder that runs wants tokens
    if cfg.dry_run:
        report_costs(cfg, accelerator, init, splits, held_out, reading, micro_batch_size, empty)
        return
    model = build_model(cfg, init)
    facts = describe(cfg, accelerator, model, splits, empty)
    accelerator.print(summary.table(facts))
    if accelerator.distributed_type.value not in SHARDED_ENGINES:  # which cut weights into flat parts
        model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))
    noise = init.noise._replace(signal=None if init.noise.signal is None else init.noise.signal.to(accelerator.device))
    fixed = fixed_samples(cfg, splits | held_out, reading, micro_batch_size)
    prompts = choose_prompts(cfg, list(held_out.values()) or [splits[cfg.data_split]])
    shown = {"texts": captions.encode_captions(prompts, init.tokenizer, frozen), "empty": empty}
    shown |= {"noise": noise, "vae": init.vae, "shape": splits[cfg.data_split].squarest_shape()}
    before = evaluate(cfg, accelerator, model, encoder, fixed, noise)  # of init, also where the run goes on
    images_before = make_images(cfg, accelerator, model, **shown)

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best, (due, metrics) = Best(cfg.best_metric and f"eval/{cfg.best_metric}", run.state), run.owed
    updates = read_updates(cfg, accelerator, splits, reading, micro_batch_size, run.step)
    facts |= {"eval_loss_before": before["eval/loss"]}
    run.record(Path(__file__), {"data": cfg.data, **fingerprints(manifest), "init": cfg.init, **facts})
    model.train()
    images = cfg.global_batch_size * len(splits)
    for step, parts in run.updates(updates, facts["flops_per_sample"]):
        if parts:  # else the evaluation alone is left, which a signal had ended
            factor = schedules.warmup_stable_decay(step, cfg.max_steps, cfg.warmup_steps, cfg.decay_fraction)
            set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
            parts = [[to_device(batch, accelerator.device) for batch in batches] for batches in parts]
            parts = [[captions.embed_captions(accelerator, batch, encoder) for batch in batches] for batches in parts]
            torch.manual_seed(derive_seed(cfg.seed, "dropout", step, accelerator.process_index))
            loss, grad_norm = train_update(cfg, accelerator, model, optimizer, parts, noise)

            due = run.count_update(grad_norm, samples=images, units=images)
            metrics = {}
            if due.log:
                metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
                metrics |= {"train/grad_norm": grad_norm.item(), **run.rates("images")}
        if due.evaluate:
            with run.evaluation(metrics):
                metrics |= evaluate(cfg, accelerator, model, encoder, fixed, noise)
                made = make_images(cfg, accelerator, model, **shown)
                show(accelerator, images_before, made, prompts, run.folder / "samples" / f"step_{run.step:08d}.png")
                if best.is_better(run.step, metrics, ""):
                    export(cfg, accelerator, model, init, run.folder / best.FOLDER)
        with run.pause():
            run.write(metrics)
            if due.save:
                run.save(best.state())
            if due.push:
                export(cfg, accelerator, model, init, run.folder)
                run.push()

    made = make_images(cfg, accelerator, model, **shown)
    export(cfg, accelerator, model, init, run.folder)
    show(accelerator, images_before, made, prompts, run.folder / "figures" / "images.png")
    results = {"training_flops": facts["flops_per_sample"] * images * run.step, **best.kept()}
    card = {"samples": "\n".join(prompts), "figures": {"Images before fine-tuning and after it": "images.png"}}
    run.finish("text-to-image", usage(cfg, init, prompts[0]), results=results, **card, next_command=next_command(cfg))


def show(accelerator: Any, before: list[Any], after: list[Any], prompts: list[str], path: Path) -> None:
    """Draw images that were made before fine-tuning, each beside the one after it; the main process draws."""
    if accelerator.is_main_process:
        pairs = [image for pair in zip(before, after, strict=True) for image in pair]
        image_grid(pairs, [title for prompt in prompts for title in (prompt, "fine-tuned")], path)


def usage(cfg: Config, init: Init, prompt: str) -> str:
    """Python that makes an image, for the card."""
    name, more = init.pipeline.__name__, ""
    if init.noise.signal is None:
        more = f", use_resolution_binning=False, skip_text_cleaning={reads_as_written(cfg.init)}"
    asked = (prompt, cfg.guidance_scale, cfg.sample_steps, more)
    is_adapter = cfg.lora_rank and not cfg.merge
    return USAGE_OF_ADAPTER.format(name, name, cfg.init, *asked) if is_adapter else USAGE.format(name, name, *asked)


def next_command(cfg: Config) -> str:
    """What the user may want to type."""
    output_dir, base = shlex.quote(cfg.output_dir), shlex.quote(cfg.init)
    return NEXT_OF_ADAPTER.format(base, output_dir) if cfg.lora_rank and not cfg.merge else NEXT.format(output_dir)


def describe(
    cfg: Config, accelerator: Any, model: Any, splits: dict[str, Latents], empty: dict[str, Tensor]
) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    train = splits[cfg.data_split]
    shape = train.buckets()[0][0]
    inputs = {"latents": torch.zeros(1, *shape), "timesteps": torch.zeros(1, dtype=torch.int64), **empty}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": trained,
        "latents": " x ".join(map(str, shape)),
        "flops_per_sample": training_flops(model, inputs),
        "samples_per_update": cfg.global_batch_size * len(splits),
        "images": len(train),
        "updates_per_epoch": round(len(train) / cfg.global_batch_size, 1),
        "left_out": left_out.counts(),
        **summary.describe_engine(accelerator),
    }


def report_costs(
    cfg: Config,
    accelerator: Any,
    init: Init,
    splits: dict[str, Latents],
    held_out: dict[str, Latents],
    reading: dict[str, Any],
    micro_batch_size: int,
    empty: dict[str, Tensor],
) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes.

    A frozen text encoder is in none of these numbers.
    """
    without_workers = replace(cfg, num_workers=0)
    parts = next(read_updates(without_workers, accelerator, splits, reading, micro_batch_size, 0))
    first, seconds = (
        to_device({name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}, "cpu"),
        None,
    )
    inputs = {"latents": first["latents"], "timesteps": first["uniform"], "text_mask": first["text_mask"]}
    if init.noise.signal is not None:
        inputs["timesteps"] = first["uniform"].long()
    inputs["text"] = empty["text"].expand(len(first["text"]), *empty["text"].shape[1:])
    inputs = to_device(inputs, accelerator.device)
    with dry_run.without_memory():
        model = build_model(cfg, init)
        facts = describe(cfg, accelerator, model, splits, empty)
        costs = dry_run.costs(accelerator, model, inputs, state_bytes_per_parameter(build_optimizer(cfg, model)))
    if dry_run.can_time(accelerator, facts["flops_per_sample"] * len(first["text"]), costs["memory: total"]):
        model = build_model(cfg, init)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    fixed = fixed_samples(cfg, splits | held_out, reading, micro_batch_size)
    rows |= dry_run.evaluation_rows(cfg, seconds, dry_run.num_batches(accelerator, map(len, fixed.values()), 1))
    accelerator.print(f"first caption: {splits[cfg.data_split].captions()[0]}\n\n{summary.table(rows)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
