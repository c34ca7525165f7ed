r"""Pre-train a text-to-image model from scratch: flow matching with a transformer that reads captions.

Papers: Liu et al. 2022 and Lipman et al. 2022 (flow matching), Esser et al. 2024 (its times), Krause et al. 2025
(routed tokens), Ho and Salimans 2022 (guidance); the transformer is Photoroom's PRX. With no arguments it trains on the
embedded emoji, whose latents it makes at the first start, on two CPU cores in minutes.

    accelerate launch recipes/text_to_image/pretrain_transformer.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/text_to_image/pretrain_transformer.py \
        --config recipes/text_to_image/configs/transformer_300m_256.yaml --data me/latents --output_dir outputs/300m
"""

# Shapes: B samples of a micro-batch, C, h, w of the latents, N image tokens, K of them that skip no block, L tokens of
# a caption, D width of the text encoder.
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place
from shared.fields import (
    Amount,
    Count,
    FromOne,
    Natural,
    Positive,
    RateOfNewWeights,
    RateOfNewWeightsByMuon,
    Share,
    ShareToOne,
)

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.LatentData, fields.RunControl):
    """Fields of the method; LatentData says where the latents are, RunControl what every training stage has."""

    output_dir: Place = "outputs/text_to_image_transformer"
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
    training unless cache_latents.py made its embeddings. Its captions are not cleaned: skip_text_cleaning=True."""
    vocab_size: Annotated[int, fields.at_least(514)] = 2048
    """Tokens of the tokenizer that is trained on the captions, for a text encoder from scratch."""
    caption_length: Annotated[int, fields.at_least(3)] = 32
    """Tokens of a caption, start and end included, for a text encoder from scratch; longer ones are cut."""
    text_hidden_size: Count = 128  # Width of the text encoder from scratch.
    text_num_layers: Count = 2  # Layers of the text encoder from scratch.
    text_num_heads: Count = 4  # Attention heads of the text encoder from scratch.
    patch_size: Count = 2  # Side of the squares of latents that are one image token.
    hidden_size: Count = 128
    """Width of the transformer; a multiple of 4 x num_heads, since positions turn half of a head for each axis."""
    mlp_ratio: Positive = 3.0  # Width inside the gated MLP, in hidden sizes.
    num_layers: Count = 8  # Blocks of the transformer.
    num_heads: Count = 4  # Attention heads.
    init: Place = "scratch"  # scratch, or a run folder or Hub id of a pipeline of these sizes to start from.

    # Objective
    logit_mean: float = 0.0  # Mean of the logits of the times that are trained; higher = more noise.
    logit_std: Positive = 1.0  # Standard deviation of these logits.
    shift: Positive = 1.0
    """By how much times are moved to more noise, in training and in the sampler: sqrt(m / n) for m image tokens where n
    need no shift. 1 = not at all."""
    routed_fraction: Share = 0.5  # Share of the image tokens that skip routed_layers in training. 0 = none.
    routed_layers: str = "2,7"  # First and last of the blocks, from 1, that routed tokens skip.
    caption_dropout: Share = 0.1
    """Share of the captions that are replaced by the empty one, so that guidance works. 0 = none."""

    # Optimization
    global_batch_size: Count = 16
    max_steps: Count = 2500
    max_grad_norm: Amount = 1.0
    optimizer: Literal["muon", "adamw"] = "adamw"
    """adamw = AdamW for all; muon = Muon for the matrices of the blocks and of the text encoder's layers, AdamW for the
    rest."""
    learning_rate: RateOfNewWeights = 2e-3  # Peak rate of AdamW.
    muon_learning_rate: RateOfNewWeightsByMuon = 0.02  # Peak rate of Muon.
    weight_decay: Amount = 0.01  # Decoupled decay of matrices, not of embeddings, norms and biases. 0 = none.
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

import math

import diffusers
import numpy as np
import torch
from diffusers.models.transformers.transformer_prx import get_image_ids, img2seq, seq2img
from torch import Tensor, nn

from shared.data import left_out
from shared.data.batches import to_device
from shared.data.randomness import derive_seed, uniform_numbers
from shared.diffusion import captions, latent_updates
from shared.diffusion.fixed_evaluation import BandErrors, fixed_batches
from shared.diffusion.generation import decode_images, starting_noise
from shared.diffusion.latent_cache import Latents, fingerprints, some_captions
from shared.diffusion.latent_encoding import load_autoencoder, open_latents
from shared.diffusion.latent_updates import FixedSamples
from shared.metrics.figures import image_grid
from shared.models.averaged_weights import AveragedWeights
from shared.models.export import export_pipeline, new_like, whole_weights
from shared.models.pretrained import check_sizes, load_diffusion_model
from shared.optim import schedules
from shared.optim.muon import MuonWithAdamW, for_engine
from shared.optim.optimizers import clip_and_step, decay_of_matrices, set_learning_rates, state_bytes_per_parameter
from shared.performance import dry_run
from shared.performance.flops import training_flops
from shared.run import summary
from shared.run.best import Best
from shared.run.training_run import Run, start
from shared.runtime.cache_folder import cache_folder
from shared.runtime.signals import until_stopped

TRAINED, SHIPPED = Path("outputs/vae"), Path(__file__).parent / "assets" / "vae"
CACHED = Path("outputs/latents")
NUM_BANDS = 4  # of times, which evaluation tells apart
NUM_SHOWN = 8
NEXT = "generate: python recipes/text_to_image/generate.py --model {}"
USAGE = """from diffusers import PRXPipeline

pipeline = PRXPipeline.from_pretrained("path/of/this/folder")
options = {{"use_resolution_binning": False, "skip_text_cleaning": {}}}
image = pipeline({!r}, guidance_scale={}, num_inference_steps={}, **options).images[0]"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
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


def check_patches(patch_size: int, latents: list[Latents]) -> None:
    """Raise `UsageError` unless patches fill all latents."""
    for (_, *sides), _ in (bucket for part in latents for bucket in part.buckets()):
        fits = all(side % patch_size == 0 for side in sides)
        cli.expect(fits, "patch_size", patch_size, f"a divisor of the latents' sides, {sides}")


def open_tokenizer(cfg: Config, train: Latents) -> Any:
    """The tokenizer of the text encoder that trains along: that of `init`, or one trained on captions as cleaned."""
    cleaned = captions.clean_captions(train.captions())
    tokenizer = captions.load_or_train_tokenizer(cfg.init, cleaned, cfg.vocab_size, cfg.caption_length)
    captions.note_cut_captions(captions.CleanedCaptions(tokenizer), some_captions([train], 10_000))
    return tokenizer


def open_updates(
    cfg: Config, accelerator: Any, train: Latents, reading: dict[str, Any], micro_batch_size: int, step: int
) -> Iterator[list[dict[str, Tensor]]]:
    """Updates from `step` on: each this process's micro-batches."""
    sizes = {"caption_dropout": cfg.caption_dropout, "micro_batch_size": micro_batch_size}
    updates = latent_updates.open_updates(accelerator, cfg, train, reading, **sizes, step=step)
    return ([choose_kept(cfg, batch) for batch in batches] for batches in updates)


def first_inputs(
    cfg: Config, accelerator: Any, train: Latents, reading: dict[str, Any], micro_batch_size: int, empty: Tensor
) -> dict[str, Tensor]:
    """What the model gets in the first micro-batch, with the `empty` caption (1, ...) for every text."""
    batch, *_ = next(open_updates(replace(cfg, num_workers=0), accelerator, train, reading, micro_batch_size, 0))
    inputs = {"timesteps": batch["uniform"], **{name: batch[name] for name in batch.keys() - {"noise", "uniform"}}}
    return {**inputs, "text": empty.expand(len(batch["text"]), *empty.shape[1:])}


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
    if cfg.init == "scratch":
        transformer = diffusers.PRXTransformer2DModel(**sizes)
    else:
        transformer = load_diffusion_model(diffusers.PRXTransformer2DModel, cfg.init, "init", subfolder="transformer")
        check_sizes(cfg.init, "a transformer", transformer.config, sizes)
    text_encoder = captions.build_text_encoder(cfg.init, tokenizer, text_sizes) if frozen is None else None
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
def evaluate(
    cfg: Config, accelerator: Any, model: Any, frozen: Any, held_out: dict[str, FixedSamples]
) -> dict[str, float]:
    """Errors on the fixed noise of each split, of all tokens: over all times from 0 to 1 and in each band of them.

    A text encoder that is `frozen` makes the embeddings that are not cached.
    """
    model.eval()
    found = BandErrors(held_out)
    for place, batch in until_stopped(accelerator, fixed_batches(accelerator, held_out, cfg.num_workers)):
        found.add(place, errors(model, captions.embed_captions(accelerator, batch, frozen), batch["uniform"]))
    model.train()
    return found.metrics(accelerator, [cfg.data_split])


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
    latents = starting_noise(cfg.seed, number, latent_shape).to(device)
    both = {name: torch.cat([empty[name].expand_as(rows), rows]).to(device) for name, rows in texts.items()}
    scheduler.set_timesteps(cfg.sample_steps, device=device)
    for timestep in scheduler.timesteps:
        times = (timestep / scheduler.config.num_train_timesteps).expand(2 * number)
        without, with_text = forward(model, torch.cat([latents, latents]), times, both).float().chunk(2)
        velocity = without + cfg.guidance_scale * (with_text - without)
        latents = scheduler.step(velocity, timestep, latents).prev_sample
    model.train()
    return decode_images(vae, latents)


def draw(accelerator: Any, images: list[np.ndarray], prompts: list[str], file: Path) -> None:
    """Write images under their prompts into one; the main process draws."""
    if accelerator.is_main_process:
        image_grid(images, prompts, file)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW with its usual betas, as micro_diffusion has it (Sehwag et al. 2024), and decay of matrices alone.

    Or Muon for the matrices of layers and AdamW for the rest (Jordan et al. 2024).
    """
    groups = decay_of_matrices(model, cfg.weight_decay)
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.learning_rate, fused=True)
    # Modulations read one vector a sample and begin at zero: AdamW's, as is all that is outside of layers.
    named = [(name, weight) for name, weight in model.named_parameters() if ".blocks." in name or ".layers." in name]
    of_layers = [(name, weight) for name, weight in named if weight.ndim == 2 and "modulation" not in name]
    of_muon = {"lr": cfg.muon_learning_rate, "weight_decay": cfg.weight_decay, "use_muon": True}
    taken: set[int] = set()
    kept = []
    for part, number in ((".img_qkv_proj.", 3), (".txt_kv_proj.", 2), ("", 1)):  # matrices that are joined in one
        weights = [weight for name, weight in of_layers if part in name and id(weight) not in taken]
        taken |= {id(weight) for weight in weights}
        kept.append({**of_muon, "params": weights, "num_parts": number})
    for group in groups:
        rest = [weight for weight in group["params"] if id(weight) not in taken]
        kept.append({**group, "params": rest, "lr": cfg.learning_rate, "use_muon": False})
    return MuonWithAdamW(kept, betas=(0.9, 0.999), eps=1e-8)


def train_update(
    cfg: Config, accelerator: Any, model: Any, optimizer: Any, batches: list[Any]
) -> tuple[Tensor, Tensor]:
    """One optimizer update: its mean loss over all processes and micro-batches, and its gradient norm."""
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / cfg.global_batch_size
    total = torch.zeros((), device=accelerator.device)
    for batch in batches:
        with accelerator.accumulate(model):
            times = trained_times(batch["uniform"], cfg.logit_mean, cfg.logit_std, cfg.shift)
            loss = errors(model, batch, times).sum()
            accelerator.backward(loss * scale)
        total += loss.detach()
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    return accelerator.reduce(total, "sum") / cfg.global_batch_size, grad_norm


def export(
    cfg: Config, accelerator: Any, model: Any, frozen: Any, vae: Any, tokenizer: Any, side: int, run_dir: Path
) -> None:
    """Write all parts as a PRXPipeline for images of `side` pixels. Every process calls this."""
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model)
        transformer = new_like(diffusers.PRXTransformer2DModel, trained.transformer)
        text_encoder = captions.new_text_encoder(trained.text_encoder) if frozen is None else None
        bare = Denoiser(transformer, text_encoder, trained.routed)
        bare.load_state_dict(weights)
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
    accelerator, micro_batch_size = start(cfg)
    vae = load_autoencoder(cfg.vae, TRAINED, SHIPPED).to(accelerator.device)
    text = None if cfg.text_encoder == "scratch" else captions.load_text_encoder(cfg.text_encoder, "text_encoder")
    folders = {"cached": CACHED, "cache_dir": cache_folder(cfg.cache_dir)}
    train, held_out, manifest, encoder = open_latents(accelerator, cfg, vae, text, **folders)
    check_patches(cfg.patch_size, [train, *held_out.values()])
    tokenizer, frozen = text or (open_tokenizer(cfg, train), None)
    reader = tokenizer if text else captions.CleanedCaptions(tokenizer)  # embeddings are of captions as they are
    empty = captions.encode_captions([""], reader, frozen)
    reading = {"scaling_factor": vae.config.scaling_factor, "tokenizer": reader}
    reading["empty"] = None if frozen is encoder else empty["text"][0].numpy()  # an encoder that runs wants tokens
    inputs = first_inputs(cfg, accelerator, train, reading, micro_batch_size, empty["text"])
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, held_out, to_device(inputs, accelerator.device), tokenizer, frozen)
        return
    shape = train.squarest_shape()
    model = build_model(cfg, tokenizer, frozen, shape[0])
    accelerator.print(summary.table(facts := describe(cfg, accelerator, model, train, inputs)))
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, for_engine(accelerator, build_optimizer(cfg, model)))

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best, (due, metrics) = Best(cfg.best_metric and f"eval/{cfg.best_metric}", run.state), run.owed
    average = AveragedWeights(model, cfg.ema_decay, run.state.get("tensors", {}))
    updates = open_updates(cfg, accelerator, train, reading, micro_batch_size, run.step)
    splits, bands = {cfg.data_split: train} | held_out, (cfg.eval_rows, NUM_BANDS, reading)
    fixed = {name: FixedSamples(split, *bands, batch_size=micro_batch_size) for name, split in splits.items()}
    prompts = some_captions(held_out.values(), NUM_SHOWN)
    texts = captions.encode_captions(prompts, reader, frozen)
    shown = {"vae": vae, "texts": texts, "empty": empty, "latent_shape": shape}
    exported = (frozen, vae, tokenizer, shape[1] * 2 ** (len(vae.config.block_out_channels) - 1))
    run.record(Path(__file__), {"data": cfg.data, **fingerprints(manifest), "init": cfg.init, **facts})
    model.train()
    for step, batches in run.updates(updates, facts["flops_per_sample"]):
        if batches:  # else the evaluation alone is left, which a signal had ended
            factor = schedules.warmup_stable_decay(step, cfg.max_steps, cfg.warmup_steps, cfg.decay_fraction)
            set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
            batches = [to_device(batch, accelerator.device) for batch in batches]
            batches = [captions.embed_captions(accelerator, batch, encoder) for batch in batches]
            loss, grad_norm = train_update(cfg, accelerator, model, optimizer, batches)
            average.update(step + 1)

            due = run.count_update(grad_norm, samples=cfg.global_batch_size, units=cfg.global_batch_size)
            metrics = {}
            if due.log:
                metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
                metrics |= {"train/grad_norm": grad_norm.item(), **run.rates("images")}
        if due.evaluate:
            with run.evaluation(metrics), average.in_place():
                metrics |= evaluate(cfg, accelerator, model, encoder, fixed)
                images = make_images(cfg, accelerator, model, **shown)
                draw(accelerator, images, prompts, run.folder / "samples" / f"step_{run.step:08d}.png")
                if best.is_better(run.step, metrics, ""):
                    export(cfg, accelerator, model, *exported, run.folder / best.FOLDER)
        with run.pause():
            run.write(metrics)
            if due.save:
                run.save({"tensors": average.tensors(), **best.state()})
            if due.push:
                with average.in_place():
                    export(cfg, accelerator, model, *exported, run.folder)
                run.push()

    with average.in_place():
        images = make_images(cfg, accelerator, model, **shown)
        export(cfg, accelerator, model, *exported, run.folder)
    draw(accelerator, images, prompts, run.folder / "figures" / "images.png")
    results = {"training_flops": facts["flops_per_sample"] * cfg.global_batch_size * run.step, **best.kept()}
    card = {"samples": "\n".join(prompts), "figures": {"Images of held-out captions": "images.png"}}
    usage = USAGE.format(cfg.text_encoder != "scratch", prompts[0], cfg.guidance_scale, cfg.sample_steps)
    run.finish("text-to-image", usage, results=results, **card, next_command=NEXT.format(shlex.quote(str(run.folder))))


def describe(cfg: Config, accelerator: Any, model: Any, train: Latents, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "latents": " x ".join(map(str, inputs["latents"].shape[1:])),
        "flops_per_sample": training_flops(model, {name: values[:1] for name, values in inputs.items()}),
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
    inputs: dict[str, Tensor],
    tokenizer: Any,
    frozen: Any,
) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes.

    A frozen text encoder is in none of these numbers.
    """
    (number, channels, *_), seconds = inputs["latents"].shape, None
    with dry_run.without_memory():
        model = build_model(cfg, tokenizer, frozen, channels)
        facts = describe(cfg, accelerator, model, train, inputs)
        state = state_bytes_per_parameter(build_optimizer(cfg, model)) + (4 if cfg.ema_decay else 0)  # of the average
        costs = dry_run.costs(accelerator, model, inputs, state)
    if dry_run.can_time(accelerator, facts["flops_per_sample"] * number, costs["memory: total"]):
        model = build_model(cfg, tokenizer, frozen, channels)
        seconds = dry_run.time_update(accelerator, model, for_engine(accelerator, build_optimizer(cfg, model)), inputs)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    fixed = [
        FixedSamples(split, cfg.eval_rows, NUM_BANDS, {}, batch_size=number) for split in (train, *held_out.values())
    ]
    rows |= dry_run.evaluation_rows(cfg, seconds, dry_run.num_batches(accelerator, map(len, fixed), 1))
    accelerator.print(f"first caption: {train.captions()[0]}\n\n{summary.table(rows)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
