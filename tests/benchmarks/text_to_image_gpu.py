"""Measure Stable Diffusion 1.x's UNet of recipes/text_to_image on one GPU: images a second on cached latents.

    python tests/benchmarks/text_to_image_gpu.py                             # 256 pixels, minutes on an H100
    python tests/benchmarks/text_to_image_gpu.py --per_device_batch_size 128 --num_workers 16

Sizes, precision, compilation and optimizer are those of configs/sd1_256.yaml; latents and embeddings of captions are
random numbers. In memory, one update's batches lie on the GPU and `train_update` gets them again and again. Through the
input path, the recipe itself reads a generated cache by data workers on this machine's cores, and averages weights; the
smaller figure says what limits. A figure is the median over the updates after the first ten, which compile and warm up.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from harness import GPU_WARM_UPDATES, ROOT, commit_of_the_tree, load_recipe, run_on_gpu, say

CONFIG = "sd1_256"
RECIPE = ROOT / "recipes" / "text_to_image" / "pretrain.py"
LATENTS, CAPTION = (4, 32, 32), (77, 768)  # of a picture of 256 pixels, and of CLIP ViT-L/14
NUM_PICTURES = {"train": 2048, "validation": 64}
SHARD = 256  # pictures of a file


def write_data(folder: Path) -> dict[str, Path]:
    """Frozen networks of random weights, small but for what the UNet sees of them, and a cache of random numbers.

    Returns:
        Values of the recipe's fields `vae`, `text_encoder` and `data`.
    """
    import diffusers
    import numpy as np
    import transformers

    load_recipe(RECIPE, [])  # finds `shared`
    from shared import latent_cache
    from shared.clip_tokenizer import train_clip_tokenizer
    from shared.text_encoding import text_identity

    paths = {name: folder / name for name in ("vae", "text_encoder", "data")}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=LATENTS[0], **blocks)
    vae.save_pretrained(paths["vae"])
    captions = [f"picture {number}" for number in range(max(NUM_PICTURES.values()))]
    length, width = CAPTION
    tokenizer = train_clip_tokenizer(captions, vocab_size=600, max_length=length)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 12}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": length}
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, **ends))
    encoder.save_pretrained(paths["text_encoder"])
    tokenizer.save_pretrained(paths["text_encoder"])

    draw = np.random.default_rng(0)
    shapes = {"mean": LATENTS, "std": LATENTS, "text": CAPTION}
    identity = {
        "vae": latent_cache.weights_digest(vae),
        "latent_channels": LATENTS[0],
        **text_identity(tokenizer, encoder),
        "buckets": [[256, 256]],
        "mirrored": False,
        "pictures_per_shard": SHARD,
        "data": dict.fromkeys(NUM_PICTURES, "random"),
    }
    latent_cache.begin_cache(paths["data"], identity)
    shards = latent_cache.plan_shards(NUM_PICTURES, SHARD)
    for shard in shards:
        rows = [
            {
                "index": index,
                "caption": captions[index],
                "height": LATENTS[1],
                "width": LATENTS[2],
                **{name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()},
            }
            for index in shard.indices
        ]
        latent_cache.write_shard(paths["data"], shard, rows, list(shapes))
    latent_cache.finish_cache(paths["data"], identity, shards, max_bad_fraction=0.0)
    return paths


def run_in_memory(flags: list[str], updates: int) -> dict[str, float]:
    """Seconds of `train_update`, its median, on batches that lie on the device, and model FLOPs utilisation."""
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    recipe, cfg = load_recipe(RECIPE, flags)
    size, accumulation = cfg.per_device_batch_size, cfg.global_batch_size // cfg.per_device_batch_size
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_plugin=plugin)
    tokenizer, frozen = recipe.load_text_encoder(cfg.text_encoder, "text_encoder")
    model = recipe.build_model(cfg, tokenizer, frozen, LATENTS)
    one = {"latents": torch.zeros(1, *LATENTS), "timesteps": torch.zeros(1, dtype=torch.int64)}
    flops = recipe.training_flops(model, {**one, "text": torch.zeros(1, *CAPTION)})
    model = model.to(memory_format=torch.channels_last)
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, recipe.build_optimizer(cfg, model))
    signal = recipe.build_scheduler(cfg).alphas_cumprod.to(accelerator.device)
    shapes = {"latents": LATENTS, "noise": LATENTS, "text": CAPTION}
    batches = [
        {
            **{name: torch.randn(size, *shape, device=accelerator.device) for name, shape in shapes.items()},
            "uniform": torch.rand(size, device=accelerator.device),
        }
        for _ in range(accumulation)
    ]
    seconds = []
    for _ in range(updates):
        started = time.perf_counter()
        loss, _ = recipe.train_update(cfg, accelerator, model, optimizer, batches, signal)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[GPU_WARM_UPDATES:])
    peak = recipe.launch.peak(accelerator)
    return {"seconds_per_update": median, "mfu": flops * cfg.global_batch_size / median / peak}


def main() -> None:
    """Print a line of the README's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=40, help="of each; more than ten")
    parser.add_argument("--global_batch_size", type=int, default=256, help="samples of an update")
    parser.add_argument("--per_device_batch_size", type=int, default=64, help="samples of a micro-batch")
    parser.add_argument("--num_workers", type=int, default=8, help="data workers of the input path")
    options = parser.parse_args()
    if options.updates <= GPU_WARM_UPDATES:
        parser.error(f"--updates: {options.updates}: expected more than {GPU_WARM_UPDATES}")
    if options.global_batch_size % options.per_device_batch_size:
        parser.error(f"--global_batch_size: {options.global_batch_size}: expected a multiple of the other")
    with tempfile.TemporaryDirectory(prefix="text_to_image_gpu_") as folder:
        fields = {**write_data(Path(folder)), "global_batch_size": options.global_batch_size}
        sizes = {"per_device_batch_size": options.per_device_batch_size}
        flags = {"config": RECIPE.parent / "configs" / f"{CONFIG}.yaml", **fields, **sizes}
        quick = {"num_workers": options.num_workers, "eval_samples": 8, "sample_steps": 1}
        path = run_on_gpu("text_to_image", CONFIG, options.updates, **sizes, **fields, **quick)
        memory = run_in_memory([f"--{name}={value}" for name, value in flags.items()], options.updates)
    rates = [options.global_batch_size / found["seconds_per_update"] for found in (memory, path)]
    limit = "the input path" if rates[1] < 0.95 * rates[0] else "the GPU"
    cells = (
        "Stable Diffusion 1.x's UNet at 256 pixels, bf16, channels-last, compiled: images a second on cached latents "
        f"with data in memory, and through the input path with {options.num_workers} data workers; MosaicML 137.5 on "
        "an A100, 2.0's UNet",
        f"{rates[0]:,.0f} (MFU {memory['mfu']:.1%}), {rates[1]:,.0f} (MFU {path['perf/mfu']:.1%}, waiting for data "
        f"{path['perf/data_wait_fraction']:.1%}); {limit} limits",
        "300 on an H100",
        "`python tests/benchmarks/text_to_image_gpu.py`",
        commit_of_the_tree(),
        path["hardware"],
    )
    say(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
