"""Measure Stable Diffusion 1.x's UNet of recipes/text_to_image on one GPU: images a second on cached latents.

    python tests/benchmarks/text_to_image_gpu.py                             # 256 pixels, minutes on an H100
    python tests/benchmarks/text_to_image_gpu.py --per_device_batch_size 128 --num_workers 16

Sizes, compilation and optimizer are those of configs/sd1_256.yaml, precision that of single_gpu.yaml. The recipe itself
trains, on a cache of random latents and embeddings that data workers on this machine's cores read; how long it waits
for them says whether they limit. The cache is small, so the system keeps it in memory. The figure is the median over
the updates after the first ten, which compile and warm up.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from harness import GPU_WARM_UPDATES, ROOT, commit_of_the_tree, load_recipe, run_on_gpu, say

CONFIG = "sd1_256"
RECIPE = ROOT / "recipes" / "text_to_image" / "pretrain.py"
LATENTS, CAPTION = (4, 32, 32), (77, 768)  # of an image of 256 pixels, and of CLIP ViT-L/14
NUM_IMAGES = {"train": 2048, "validation": 64}
SHARD = 256  # images of a file


def write_data(folder: Path) -> dict[str, Path]:
    """Frozen networks of random weights, small but for what the UNet sees of them, and a cache of random numbers.

    Returns:
        Values of the recipe's fields `vae`, `text_encoder` and `data`.
    """
    import diffusers
    import numpy as np
    import transformers

    load_recipe(RECIPE, [])  # finds `shared`
    from shared.diffusion import latent_cache
    from shared.diffusion.captions import text_identity
    from shared.diffusion.clip_tokenizer import train_clip_tokenizer

    paths = {name: folder / name for name in ("vae", "text_encoder", "data")}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=LATENTS[0], **blocks)
    vae.save_pretrained(paths["vae"])
    captions = [f"image {number}" for number in range(max(NUM_IMAGES.values()))]
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
        "sampled": False,
        "images_per_shard": SHARD,
        "data": dict.fromkeys(NUM_IMAGES, "random"),
    }
    latent_cache.begin_cache(paths["data"], identity)
    shards = latent_cache.plan_shards(NUM_IMAGES, SHARD)
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


def main() -> None:
    """Print a line of the README's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=40, help="more than ten")
    parser.add_argument("--global_batch_size", type=int, default=256, help="samples of an update")
    parser.add_argument("--per_device_batch_size", type=int, default=64, help="samples of a micro-batch")
    parser.add_argument("--num_workers", type=int, default=8, help="data workers")
    options = parser.parse_args()
    if options.updates <= GPU_WARM_UPDATES:
        parser.error(f"--updates: {options.updates}: expected more than {GPU_WARM_UPDATES}")
    if options.global_batch_size % options.per_device_batch_size:
        parser.error(f"--global_batch_size: {options.global_batch_size}: expected a multiple of per_device_batch_size")
    with tempfile.TemporaryDirectory(prefix="text_to_image_gpu_") as folder:
        fields = {**write_data(Path(folder)), "global_batch_size": options.global_batch_size}
        fields |= {"per_device_batch_size": options.per_device_batch_size, "num_workers": options.num_workers}
        found = run_on_gpu("text_to_image", CONFIG, options.updates, **fields)
    cells = (
        "UNet of Stable Diffusion 1.x at 256 pixels on cached latents, bf16, channels-last, compiled: images a second, "
        "MFU; MosaicML 137.5 on an A100, 2.0's UNet",
        f"{options.global_batch_size / found['seconds_per_update']:,.0f}, {found['perf/mfu']:.1%} (waiting for data "
        f"{found['perf/data_wait_fraction']:.1%})",
        "300 on an H100",
        f"`python {' '.join(['tests/benchmarks/text_to_image_gpu.py', *sys.argv[1:]])}`",
        commit_of_the_tree(),
        found["hardware"],
    )
    say(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
