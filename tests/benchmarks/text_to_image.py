"""Measure recipes/text_to_image/pretrain.py against a plain diffusers loop that encodes at every step.

    python tests/benchmarks/text_to_image.py                     # everything: about 35 minutes on two quiet cores
    python tests/benchmarks/text_to_image.py --parts shipped,sd  # some of it
    python tests/benchmarks/text_to_image.py --seconds 2         # whether it runs; such numbers mean nothing

Rules:
* The plain loop is that of diffusers' example for text to image: `datasets` with a transform, torch's DataLoader, the
  frozen autoencoder and text encoder in every step, `DDPMScheduler`, min-SNR weights by `compute_snr`, fused AdamW,
  `EMAModel`, clipping, accelerate. It is tried with no data worker and with one, and goes on with the faster. Model,
  objective, caption dropout, batch, precision, shape of the learning rate's schedule and decay of the average are the
  recipe's defaults, and so are the sizes of the text encoder, of random weights, which is frozen on both sides. Both
  use all cores.
* The recipe reads latents and embeddings that cache_latents.py has made. Making them is timed, from the start to the
  end of that program, and told as the number of epochs after which it has paid for itself; speeds are without it.
* Speed: images a second from the end of the fifth update on; both sides in turns, the median of three ratios. At
  Stable Diffusion's proportions the autoencoder has random weights and such sizes that an image's and a caption's way
  through the encoders take about the share of the UNet's training FLOPs that they take in Stable Diffusion 1.x at 256
  pixels.
* Quality is the recipe's `evaluate()` on both sides, of averaged weights, on 50 samples of each split. The plain loop
  trains as long as the recipe's default run, at the rate that is the best of several (more are tried while it is the
  first or last) in runs of an eighth of that time, each with a schedule of its own. Then the recipe runs for fewer
  updates than the plain loop, and for as many, until a run ends as good; its time counts. So does, in a row of its own,
  when the full-length run passes that loss, of 20 evaluations. The clock runs from before the first batch to the last
  update, without evaluation and saving, on both sides.
"""

import argparse
import functools
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import (
    ROOT,
    WARM_UPDATES,
    Row,
    answer_child,
    execute,
    in_child,
    load_recipe,
    measure_parts,
    peak_bytes,
    read_options,
    say,
    speed,
    update_times,
)

RECIPE = ROOT / "recipes" / "text_to_image" / "pretrain.py"
README = RECIPE.with_name("README.md")
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
NO_PAUSES = ["--eval_every=0", "--save_every=0"]
QUICK_EVALUATION = ["--eval_rows=50", "--sample_steps=1"]
EVALUATIONS = 20
TRIAL_SHARE = 1 / 8  # of the time, for a learning rate
SHORTER = (0.8, 1.0)  # runs tried, as shares of the plain loop's updates
TURNS, TURN_SECONDS = 3, 15
SIDE = 64  # of the embedded emoji in pixels
# Three of the stages 128, 256, 512, 512 of Stable Diffusion's autoencoder, for a factor of 4, each 7/32 as wide.
SD_LIKE = {"channels": (28, 56, 112), "layers_per_block": 1, "norm_num_groups": 4}
NAMES = {
    "shipped": "the shipped sizes",
    "sd": "Stable Diffusion's proportions",
    "published": "Stable Diffusion 1.x at 256 pixels",
}
GOALS = {"shipped": "none set", "sd": "at least 1.4"}

# ----------------------------------------------------------------------------------------------------------------------
# In child processes, so that each side's memory is its own. Imports are late for the same reason.


def prepare(folder: str) -> dict[str, Any]:
    """Make the frozen networks of both kinds; what the other parts need."""
    import diffusers
    import torch
    import transformers

    recipe, cfg = load_recipe(RECIPE, [])
    from shared.diffusion.clip_tokenizer import train_clip_tokenizer
    from shared.diffusion.latent_encoding import sample_splits
    from shared.run.folder import hardware

    captions = sample_splits()[cfg.data_split].captions
    tokenizer = train_clip_tokenizer(captions, cfg.vocab_size, cfg.caption_length)
    shipped = diffusers.AutoencoderKL.from_pretrained(recipe.SHIPPED)
    own = recipe.build_model(cfg, tokenizer, None, (shipped.config.latent_channels, SIDE // 4, SIDE // 4))
    text_encoder = own.text_encoder
    text_encoder.save_pretrained(Path(folder, "text_encoder"))
    tokenizer.save_pretrained(Path(folder, "text_encoder"))
    torch.manual_seed(0)
    sd_like = build_vae(**SD_LIKE)
    sd_like.save_pretrained(Path(folder, "sd_vae"))
    with recipe.dry_run.without_memory():
        vae = build_vae((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))  # of ViT-L/14: 77 tokens
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)  # the library's defaults are Stable Diffusion's
        of_sd = encoding_shares(vae, clip, unet, side=256)
    frozen = {
        kind: [f"--text_encoder={Path(folder, 'text_encoder')}", f"--vae={vae}"]
        for kind, vae in (("shipped", recipe.SHIPPED), ("sd", Path(folder, "sd_vae")))
    }
    shares = {
        kind: encoding_shares(vae, text_encoder, own.unet, SIDE)
        for kind, vae in (("shipped", shipped), ("sd", sd_like))
    }
    return {
        "frozen": frozen,
        "latents": {kind: str(Path(folder, f"{kind}_latents")) for kind in frozen},
        "shares": {**shares, "published": of_sd},
        "images": len(captions),
        "batch": cfg.global_batch_size,
        "max_steps": cfg.max_steps,
        "parameters": own.unet.num_parameters(),
        "hardware": hardware(),
    }


def build_vae(channels: tuple[int, ...], layers_per_block: int, norm_num_groups: int) -> Any:
    """An autoencoder of Stable Diffusion's form, with attention in the middle."""
    from diffusers import AutoencoderKL

    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }
    sizes = {"layers_per_block": layers_per_block, "norm_num_groups": norm_num_groups, "latent_channels": 4}
    return AutoencoderKL(block_out_channels=channels, **blocks, **sizes)


def encoding_shares(vae: Any, text_encoder: Any, unet: Any, side: int) -> tuple[float, float]:
    """FLOPs of encoding an image of `side` pixels, and a caption, by those of training the UNet on them."""
    import torch

    from shared.performance.flops import training_flops

    latent_side = side // 2 ** (len(vae.config.block_out_channels) - 1)
    length, width = text_encoder.config.max_position_embeddings, text_encoder.config.hidden_size
    inputs = {
        "sample": torch.zeros(1, vae.config.latent_channels, latent_side, latent_side),
        "timestep": torch.zeros(1, dtype=torch.int64),
        "encoder_hidden_states": torch.zeros(1, length, width),
    }
    training = training_flops(unet, inputs)
    encoders = (
        (vae.encoder, {"sample": torch.zeros(1, 3, side, side)}),
        (text_encoder, {"input_ids": torch.zeros(1, length, dtype=torch.int64)}),
    )
    # Training counts as three forward passes.
    image, caption = (training_flops(encoder, sample) / 3 / training for encoder, sample in encoders)
    return image, caption


def run_plain(flags: list[str], learning_rate: float, max_steps: int, workers: int, evaluate: bool) -> dict[str, Any]:
    """Train the recipe's UNet by a plain diffusers loop; speed and, if asked for, the metrics at the end."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel, compute_snr
    from torch.nn.functional import mse_loss

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns of every data worker
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe, cfg = load_recipe(RECIPE, flags)
    from shared.optim import schedules

    set_seed(0)
    accelerator = Accelerator(cpu=True)
    vae = recipe.load_autoencoder(cfg.vae, recipe.TRAINED, recipe.SHIPPED)
    tokenizer, text_encoder = text = recipe.captions.load_text_encoder(cfg.text_encoder, "text_encoder")
    # The cache is for evaluation, and to see that it is of these networks.
    folders = {"cached": recipe.CACHED, "cache_dir": recipe.cache_folder(cfg.cache_dir)}
    train, held_out, *_ = recipe.open_latents(accelerator, cfg, vae, text, **folders)
    own = recipe.build_model(cfg, tokenizer, text_encoder, train.buckets()[0][0])
    noising = DDPMScheduler(**recipe.NOISE, prediction_type=cfg.prediction_type)
    assert cfg.prediction_type == "v_prediction"  # of which targets and weights below are
    loader = plain_loader(tokenizer, cfg.caption_dropout, cfg.global_batch_size, workers)
    optimizer = torch.optim.AdamW(own.unet.parameters(), learning_rate, weight_decay=cfg.weight_decay, fused=True)
    warmup_steps = round(max_steps * cfg.warmup_steps / cfg.max_steps)  # the recipe's share
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: schedules.warmup_stable_decay(step, max_steps, warmup_steps, cfg.decay_fraction),
    )
    unet, optimizer, loader, schedule = accelerator.prepare(own.unet, optimizer, loader, schedule)
    average = EMAModel(unet.parameters(), decay=cfg.ema_decay)
    unet.train()
    encoding, times = 0.0, [time.perf_counter()]
    epochs = itertools.repeat(loader)
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), max_steps):
        started = time.perf_counter()
        with torch.no_grad():
            latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
            states = text_encoder(batch["input_ids"]).last_hidden_state
        encoding += time.perf_counter() - started
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noising.config.num_train_timesteps, (len(latents),))
        noisy, wanted = (mix(latents, noise, timesteps) for mix in (noising.add_noise, noising.get_velocity))
        predicted = unet(noisy, timesteps, states).sample
        ratio = compute_snr(noising, timesteps)
        weights = ratio.clamp(max=cfg.snr_gamma) / (ratio + 1)
        loss = (mse_loss(predicted, wanted, reduction="none").mean((1, 2, 3)) * weights).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), cfg.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        times.append(time.perf_counter())
    seconds = times[-1] - times[0]
    result = {**speed(times[1:]), "seconds": seconds, "encoding": encoding / seconds, "peak_bytes": peak_bytes()}
    result |= {"learning_rate": learning_rate, "workers": workers}
    if evaluate:
        average.copy_to(own.unet.parameters())
        empty = recipe.captions.encode_captions([""], tokenizer, text_encoder)["text"][0].numpy()
        reading = {"scaling_factor": vae.config.scaling_factor, "tokenizer": tokenizer, "empty": empty}
        fixed = {
            name: recipe.FixedSamples(
                latents, cfg.eval_rows, recipe.NUM_BANDS, reading, batch_size=cfg.global_batch_size
            )
            for name, latents in held_out.items()
        }
        result |= recipe.evaluate(cfg, accelerator, own, None, fixed, recipe.build_scheduler(cfg).alphas_cumprod)
    return result


def plain_loader(tokenizer: Any, caption_dropout: float, batch_size: int, workers: int) -> Any:
    """Batches of the embedded emoji as they are decoded, cut, mirrored half of the time and tokenised on demand."""
    import datasets
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from shared.images.captioned import SAMPLE

    def to_tensor(image: Any) -> torch.Tensor:
        image = ImageOps.fit(image.convert("RGB"), (SIDE, SIDE), Image.Resampling.BILINEAR)
        image = ImageOps.mirror(image) if random.random() < 0.5 else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1

    def process(rows: dict[str, list[Any]]) -> dict[str, Any]:
        captions = ["" if random.random() < caption_dropout else caption for caption in rows["caption"]]
        form = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        ids = tokenizer(captions, **form, return_tensors="pt").input_ids
        return {"pixel_values": [to_tensor(image) for image in rows["image"]], "input_ids": ids}

    files = [str(file) for file in sorted(SAMPLE.glob("data/train-*.parquet"))]
    data = datasets.load_dataset("parquet", data_files=files, split="train").with_transform(process)
    return torch.utils.data.DataLoader(data, batch_size, shuffle=True, drop_last=True, num_workers=workers)


def run_recipe(flags: list[str], updates: int) -> dict[str, Any]:
    """Run the recipe's own `main()` for some updates; its speed."""
    recipe, cfg = load_recipe(RECIPE, flags)
    return {**speed(update_times(recipe, cfg, updates)), "peak_bytes": peak_bytes()}


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def make_cache(kind: str, facts: dict[str, Any]) -> float:
    """Run cache_latents.py, unless a part before has done so; the seconds it took."""
    seconds = facts.setdefault("cache_seconds", {})
    if kind not in seconds:
        flags = [*facts["frozen"][kind], f"--output_dir={facts['latents'][kind]}"]
        seconds[kind] = execute([*LAUNCH, str(RECIPE.with_name("cache_latents.py")), *flags])
        say(f"cache for {NAMES[kind]}: {seconds[kind]:.0f} s")
    return seconds[kind]


def flags_of(kind: str, facts: dict[str, Any]) -> list[str]:
    """For the recipe: the frozen networks and what they have encoded."""
    return [*facts["frozen"][kind], f"--data={facts['latents'][kind]}"]


def measure_speed(
    kind: str, facts: dict[str, Any], options: argparse.Namespace, folder: Path
) -> tuple[dict, list[Row]]:
    """Images a second of the same UNet on both sides, in turns, and what the cache costs."""
    cache_seconds, common = make_cache(kind, facts), [*flags_of(kind, facts), *NO_PAUSES]
    trial = in_child(run_recipe, flags=[*common, f"--output_dir={folder / f'{kind}_trial'}"], updates=2 * WARM_UPDATES)
    updates = WARM_UPDATES + max(5, round((options.seconds or TURN_SECONDS) / trial["seconds_per_update"]))
    turns, workers = [], [0, 1]
    for turn in range(TURNS):
        flags = [*common, f"--output_dir={folder / f'{kind}_{turn}'}"]
        ours = in_child(run_recipe, flags=flags, updates=updates)
        settings = {"flags": flags, "learning_rate": 1e-3, "max_steps": updates, "evaluate": False}
        theirs = fastest([in_child(run_plain, workers=number, **settings) for number in workers])
        turns.append((ours, theirs))
        workers = [theirs["workers"]]  # the first turn tells
    ratio = statistics.median(theirs["seconds_per_update"] / ours["seconds_per_update"] for ours, theirs in turns)
    rates = [facts["batch"] / statistics.median(pair[side]["seconds_per_update"] for pair in turns) for side in (0, 1)]
    encoding = statistics.median(theirs["encoding"] for _, theirs in turns)
    shown = f"{ratio:.2f} ({rates[0]:,.0f} / {rates[1]:,.0f}, the plain loop with {workers[0]} data workers"
    shown += f" and {encoding:.0%} of its time in the encoders)"
    saved = facts["images"] / rates[1] - facts["images"] / rates[0]  # seconds an epoch
    paid = f"paid for after {cache_seconds / saved:.1f} epochs" if saved > 0 else "never paid for"
    rows = [
        (f"images a second at {NAMES[kind]}, recipe / plain diffusers loop", shown, GOALS[kind]),
        (f"encoding all emoji and their captions once, at {NAMES[kind]}", f"{cache_seconds:.0f} s, {paid}", "none set"),
    ]
    if kind == "sd":
        here, there = (describe_shares(facts["shares"][name]) for name in ("sd", "published"))
        what = "FLOPs of encoding an image and a caption, by the UNet's of training on them"
        rows.append((f"{what}: there / in {NAMES['published']}", f"{here} / {there}", "near"))
    return {"updates": updates, "turns": turns, "cache_seconds": cache_seconds}, rows


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the shortest updates."""
    return min(runs, key=lambda run: run["seconds_per_update"])


def describe_shares(shares: list[float]) -> str:
    """As in `encoding_shares`."""
    return f"{shares[0]:.3f} and {shares[1]:.3f}"


def measure_quality(facts: dict[str, Any], options: argparse.Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """How soon the recipe's default run is where the plain loop of the same time ends, in training seconds."""
    make_cache("shipped", facts)
    common = [*flags_of("shipped", facts), *QUICK_EVALUATION, "--save_every=0"]
    max_steps, evaluations = (4 * WARM_UPDATES, 2) if options.seconds else (facts["max_steps"], EVALUATIONS)
    curve = run_to_the_end(common, folder / "quality", max_steps, max_steps // evaluations)
    budget, last = curve[-1]["perf/training_seconds"], curve[-1]
    say(f"recipe: loss {last['eval/loss']:.4f} after {max_steps} updates in {budget:.0f} s")

    flags = [*common, f"--output_dir={folder / 'plain'}"]
    paces = [
        in_child(
            run_plain, flags=flags, workers=workers, learning_rate=1e-3, max_steps=6 * WARM_UPDATES, evaluate=False
        )
        for workers in (0, 1)
    ]
    pace = fastest(paces)

    def train(rate: float, share: float) -> dict[str, Any]:
        updates = max(2 * WARM_UPDATES, round(share * budget / pace["seconds_per_update"]))
        settings = {"flags": flags, "workers": pace["workers"], "max_steps": updates, "evaluate": True}
        run = in_child(run_plain, learning_rate=rate, **settings)
        say(f"plain loop at {rate:g}: loss {run['eval/loss']:.4f} after {updates} updates in {run['seconds']:.0f} s")
        return run

    rates = [float(rate) for rate in options.learning_rates.split(",")]
    trials = [train(rate, TRIAL_SHARE) for rate in rates]
    while not options.seconds and len(trials) < len(rates) + 2:
        tried, at_best = [run["learning_rate"] for run in trials], best(trials)["learning_rate"]
        if min(tried) < at_best < max(tried):
            break
        trials.append(train(at_best / 2 if at_best == min(tried) else at_best * 2, TRIAL_SHARE))
    plain = train(best(trials)["learning_rate"], 1.0)
    target = plain["eval/loss"]
    reached = next((entry["perf/training_seconds"] for entry in curve if entry["eval/loss"] <= target), 0)
    passed = f"{reached / plain['seconds']:.2f} ({reached:.0f} s of {plain['seconds']:.0f} s)" if reached else "never"

    shorter = []
    for part in SHORTER:
        shorter.append(run_to_the_end(common, folder / f"shorter_{part}", round(part * plain["updates"]), 0)[-1])
        say(f"recipe: loss {shorter[-1]['eval/loss']:.4f} after {shorter[-1]['perf/training_seconds']:.0f} s")
        if shorter[-1]["eval/loss"] <= target:
            break
    seconds, found = shorter[-1]["perf/training_seconds"], shorter[-1]["eval/loss"]
    share = f"{seconds / plain['seconds']:.2f}" if found <= target else "not reached"
    share += f" ({seconds:.0f} s to {found:.4f}, {plain['seconds']:.0f} s to {target:.4f})"
    losses = f"{last['eval/loss']:.4f} / {target:.4f} (plain loop at {plain['learning_rate']:g})"
    raw = {"curve": curve, "paces": paces, "trials": trials, "plain": plain, "shorter": shorter}
    return raw, [
        (
            "training time of a recipe run to the plain loop's final `eval/loss`, as a share of that loop's time",
            share,
            "none set",
        ),
        ("when the full-length run passes that loss, as a share of the same time", passed, "none set"),
        ("`eval/loss` after the same time, recipe / plain diffusers loop", losses, "lower"),
    ]


def run_to_the_end(flags: list[str], run_dir: Path, max_steps: int, eval_every: int) -> list[dict[str, float]]:
    """Run the recipe as a user would; what it logged when it evaluated."""
    options = [f"--output_dir={run_dir}", f"--max_steps={max_steps}", f"--eval_every={eval_every}"]
    execute([*LAUNCH, str(RECIPE), *flags, *options])
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "eval/loss" in entry]


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the lowest loss."""
    return min(runs, key=lambda run: run["eval/loss"])


PARTS = {
    "shipped": functools.partial(measure_speed, "shipped"),
    "sd": functools.partial(measure_speed, "sd"),
    "quality": measure_quality,
}


def main() -> None:
    """Measure the parts asked for."""
    options = read_options(__doc__, PARTS, "5e-4,1e-3,2e-3")
    if options.child:
        answer_child(options.child, [prepare, run_plain, run_recipe])
        return
    folder = Path(tempfile.mkdtemp(prefix="text_to_image_benchmark_"))
    facts = in_child(prepare, folder=str(folder))
    say("FLOPs of encoding an image and a caption, by the UNet's of training on them:")
    for name, shares in facts["shares"].items():
        say(f"  {NAMES[name]}: {describe_shares(shares)}")
    measure_parts(README, PARTS, facts, options, folder)


if __name__ == "__main__":
    main()
