"""Measure recipes/text_to_image/finetune.py against the loop of diffusers' train_text_to_image_lora.py.

    python tests/benchmarks/text_to_image_finetune.py               # a quarter of an hour on two quiet cores
    python tests/benchmarks/text_to_image_finetune.py --seconds 5   # whether it runs; such numbers mean nothing

Rules:
* Both start from outputs/text_to_image_two_styles and learn an adapter of the recipe's default rank, beside the same
  matrices, on the same images of the style that it has not seen, on all cores.
* The plain loop is that of the example: `datasets` with a transform, torch's DataLoader, the frozen autoencoder and
  text encoder in every step, `DDPMScheduler`, min-SNR weights by `compute_snr`, `LoraConfig` with a Gaussian start,
  AdamW, clipping, accelerate. It is tried with no data worker and with one, and goes on with the faster. Batch,
  objective, caption dropout and the shape of the rate's schedule are the recipe's.
* Speed: images a second from the end of the fifth update on; both sides in turns, the median of three ratios. The
  recipe reads latents that it has encoded before; how long that took is told.
* Quality: `eval/loss` of the held-out images of the style, by the recipe's `evaluate()`, after the training seconds of
  the recipe's default run, in which the plain loop does as many updates as it can, at its best of several rates.
"""

import itertools
import json
import os
import random
import statistics
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from harness import (
    ROOT,
    WARM_UPDATES,
    Row,
    answer_child,
    in_child,
    load_recipe,
    measure_parts,
    peak_bytes,
    read_options,
    say,
    speed,
    update_times,
)

RECIPE = ROOT / "recipes" / "text_to_image" / "finetune.py"
QUIET = ["--eval_every=0", "--save_every=0", "--sample_steps=1"]
TURNS, TURN_SECONDS = 3, 15


# ----------------------------------------------------------------------------------------------------------------------
# In child processes; imports are late, so that each side has its own.


def prepare(folder: str) -> dict[str, Any]:
    """What the other parts need; the latents are made on the way, unless they were before."""
    from accelerate import Accelerator

    recipe, cfg = load_recipe(RECIPE, [f"--output_dir={folder}/none"])
    from shared.run.folder import hardware

    cfg, init, started = recipe.with_defaults(cfg), recipe.open_init(cfg), time.perf_counter()
    splits, _, _ = recipe.open_data(cfg, Accelerator(cpu=True), init)
    return {
        "encoding_seconds": time.perf_counter() - started,
        "images": len(splits[cfg.data_split]),
        "batch": cfg.global_batch_size,
        "max_steps": cfg.max_steps,
        "learning_rate": cfg.learning_rate,
        "parameters": sum(weight.numel() for weight in recipe.build_model(cfg, init).parameters()),
        "hardware": hardware(),
    }


def run_recipe(flags: list[str], updates: int) -> dict[str, Any]:
    """Run the recipe's own `main()` for some updates; its speed."""
    recipe, cfg = load_recipe(RECIPE, flags)
    return {**speed(update_times(recipe, cfg, updates)), "peak_bytes": peak_bytes()}


def run_to_the_end(flags: list[str]) -> dict[str, Any]:
    """Run the recipe's own `main()` to its end: the last evaluation and the seconds of training."""
    recipe, cfg = load_recipe(RECIPE, flags)
    recipe.main(cfg)
    lines = (Path(cfg.output_dir) / "metrics.jsonl").read_text().splitlines()
    before = json.loads((Path(cfg.output_dir) / "run.json").read_text())["eval_loss_before"]
    return {**json.loads(lines[-1]), "before": before}


def run_plain(flags: list[str], learning_rate: float, max_steps: int, workers: int, evaluate: bool) -> dict[str, Any]:
    """Train an adapter by a plain diffusers loop; speed and, if asked for, the loss at the end."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr
    from peft import LoraConfig
    from torch.nn.functional import mse_loss

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns of every data worker
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    recipe, cfg = load_recipe(RECIPE, flags)
    cfg = recipe.with_defaults(cfg)
    from shared.optim import schedules

    set_seed(0)
    accelerator, init = Accelerator(cpu=True), recipe.open_init(cfg)
    unet = recipe.load_network(cfg, init)
    unet.requires_grad_(False)
    places = ["to_k", "to_q", "to_v", "to_out.0"]
    options = {"r": cfg.lora_rank, "lora_alpha": cfg.lora_rank, "init_lora_weights": "gaussian"}
    unet.add_adapter(LoraConfig(**options, target_modules=places))
    noising = DDPMScheduler.from_pretrained(cfg.init, subfolder="scheduler")
    assert noising.config.prediction_type == "v_prediction"  # of which targets and weights below are
    tokenizer, text_encoder = init.text
    loader = plain_loader(tokenizer, cfg, init.side, workers)
    trained = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=cfg.weight_decay)
    warmup_steps = round(max_steps * cfg.warmup_steps / cfg.max_steps)  # the recipe's share
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedules.warmup_stable_decay(step, max_steps, warmup_steps, cfg.decay_fraction)
    )
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    unet.train()
    times = [time.perf_counter()]
    for batch in itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), max_steps):
        with torch.no_grad():
            latents = init.vae.encode(batch["pixel_values"]).latent_dist.sample() * init.vae.config.scaling_factor
            states = text_encoder(batch["input_ids"]).last_hidden_state
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noising.config.num_train_timesteps, (len(latents),))
        noisy, wanted = (mix(latents, noise, timesteps) for mix in (noising.add_noise, noising.get_velocity))
        predicted = unet(noisy, timesteps, states).sample
        ratio = compute_snr(noising, timesteps)
        weights = ratio.clamp(max=cfg.snr_gamma) / (ratio + 1)
        loss = (mse_loss(predicted, wanted, reduction="none").mean((1, 2, 3)) * weights).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, cfg.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    result = {**speed(times[1:]), "seconds": times[-1] - times[0], "peak_bytes": peak_bytes()}
    result |= {"learning_rate": learning_rate, "workers": workers}
    if evaluate:
        splits, held_out, _ = recipe.open_data(cfg, accelerator, init)
        reading = {"scaling_factor": init.vae.config.scaling_factor, "tokenizer": tokenizer, "empty": None}
        bands = {"num_bands": recipe.NUM_BANDS, "reading": reading, "batch_size": cfg.global_batch_size}
        fixed = {
            name: recipe.FixedSamples(split, cfg.eval_rows, **bands) for name, split in (splits | held_out).items()
        }
        model = recipe.Denoiser(unet, None)
        result |= recipe.evaluate(cfg, accelerator, model, text_encoder, fixed, init.noise)
    return result


def plain_loader(tokenizer: Any, cfg: Any, side: int, workers: int) -> Any:
    """Batches of the emoji of the style as they are decoded, cut, mirrored half of the time and tokenised on demand."""
    import datasets
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    from shared.images.captioned import SAMPLE

    def to_tensor(image: Any) -> torch.Tensor:
        image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
        image = ImageOps.mirror(image) if random.random() < 0.5 else image
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1

    def process(rows: dict[str, list[Any]]) -> dict[str, Any]:
        captions = ["" if random.random() < cfg.caption_dropout else caption for caption in rows["caption"]]
        form = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        ids = tokenizer(captions, **form, return_tensors="pt").input_ids
        return {"pixel_values": [to_tensor(image) for image in rows["image"]], "input_ids": ids}

    files = [str(file) for file in sorted(SAMPLE.glob("data/train-*.parquet"))]
    data = datasets.load_dataset("parquet", data_files=files, split="train")
    kept = [row for row, caption in enumerate(data["caption"]) if cfg.captions_with in caption]
    data = data.select(kept).with_transform(process)
    return torch.utils.data.DataLoader(data, cfg.global_batch_size, shuffle=True, drop_last=True, num_workers=workers)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def measure_speed(facts: dict[str, Any], options: Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Images a second on both sides, in turns."""
    trial = in_child(run_recipe, flags=[*QUIET, f"--output_dir={folder / 'trial'}"], updates=2 * WARM_UPDATES)
    updates = WARM_UPDATES + max(5, round((options.seconds or TURN_SECONDS) / trial["seconds_per_update"]))
    turns, workers = [], [0, 1]
    for turn in range(TURNS):
        flags = [*QUIET, f"--output_dir={folder / f'speed_{turn}'}", f"--max_steps={updates + 1}"]
        ours = in_child(run_recipe, flags=flags, updates=updates)
        settings = {"flags": flags, "learning_rate": 1e-3, "max_steps": updates, "evaluate": False}
        theirs = fastest([in_child(run_plain, workers=number, **settings) for number in workers])
        turns.append((ours, theirs))
        workers = [theirs["workers"]]  # the first turn tells
    ratio = statistics.median(theirs["seconds_per_update"] / ours["seconds_per_update"] for ours, theirs in turns)
    rates = [facts["batch"] / statistics.median(pair[side]["seconds_per_update"] for pair in turns) for side in (0, 1)]
    memory = [turns[-1][side]["peak_bytes"] / 2**20 for side in (0, 1)]
    return {"turns": turns}, [
        (
            "fine-tuning an adapter, images a second, recipe / plain diffusers loop",
            f"{ratio:.2f} ({rates[0]:,.0f} / {rates[1]:,.0f}, the plain loop with {workers[0]} data workers; the recipe"
            f" encoded its latents before, in {facts['encoding_seconds']:.0f} s)",
            "none set",
        ),
        (
            "fine-tuning an adapter, peak memory of the process, recipe / plain diffusers loop",
            f"{memory[0] / memory[1]:.2f} ({memory[0]:,.0f} MiB / {memory[1]:,.0f} MiB)",
            "none set",
        ),
    ]


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the shortest updates."""
    return min(runs, key=lambda run: run["seconds_per_update"])


def measure_quality(facts: dict[str, Any], options: Namespace, folder: Path) -> tuple[dict, list[Row]]:
    """Held-out loss of both after the training seconds of the recipe's default run."""
    max_steps = 4 * WARM_UPDATES if options.seconds else facts["max_steps"]
    flags = [*QUIET, f"--max_steps={max_steps}", f"--output_dir={folder / 'quality'}"]
    ours = in_child(run_to_the_end, flags=flags)
    budget = ours["perf/training_seconds"]
    say(f"recipe: loss {ours['before']:.4f} before, {ours['eval/loss']:.4f} after {max_steps} updates, {budget:.0f} s")
    flags = [*QUIET, f"--output_dir={folder / 'plain'}"]
    settings = {"flags": flags, "learning_rate": 1e-3, "max_steps": 6 * WARM_UPDATES, "evaluate": False}
    pace = fastest([in_child(run_plain, workers=workers, **settings) for workers in (0, 1)])
    updates = max(2 * WARM_UPDATES, round(budget / pace["seconds_per_update"]))
    rates = [float(rate) for rate in options.learning_rates.split(",")] if options.learning_rates else []
    plain = []
    for rate in rates or [facts["learning_rate"] * share for share in (1 / 3, 1, 3)]:
        settings = {"flags": flags, "workers": pace["workers"], "max_steps": updates, "evaluate": True}
        plain.append(in_child(run_plain, learning_rate=rate, **settings))
        say(f"plain loop at {rate:g}: {plain[-1]['eval/loss']:.4f} after {updates} updates")
    best = min(plain, key=lambda run: run["eval/loss"])
    shown = f"{ours['before']:.4f}, {ours['eval/loss']:.4f} / {best['eval/loss']:.4f} (of the plain loop at"
    shown += f" {best['learning_rate']:g}, {updates} updates in {best['seconds']:.0f} s; of the recipe {max_steps} in"
    shown += f" {budget:.0f} s)"
    what = (
        "fine-tuning an adapter, `eval/loss` of a style before, and after the same time, recipe / plain diffusers loop"
    )
    return {"ours": ours, "plain": plain, "pace": pace}, [(what, shown, "lower")]


PARTS = {"speed": measure_speed, "quality": measure_quality}


def main() -> None:
    """Measure the parts asked for."""
    options = read_options(__doc__ or "", PARTS, "")
    if options.child:
        answer_child(options.child, [prepare, run_plain, run_recipe, run_to_the_end])
        return
    folder = Path(tempfile.mkdtemp(prefix="text_to_image_finetune_benchmark_"))
    facts = in_child(prepare, folder=str(folder))
    measure_parts(RECIPE.with_name("README.md"), PARTS, facts, options, folder)


if __name__ == "__main__":
    main()
