r"""Encode captioned images once with a trained autoencoder, so that training never does.

Rombach et al. 2022 train on latents; encoding them at every step costs about 1.4 times the time and money (MosaicML
2023, training Stable Diffusion from scratch). A run that was stopped or killed goes on with the same command, on any
number of processes, with no image lost or doubled.

    accelerate launch recipes/text_to_image/cache_latents.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/text_to_image/cache_latents.py \
        --data me/captioned --vae stabilityai/sd-vae-ft-mse --image_size 256 --bucket_multiple 64
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared.command_line import Place
from shared.fields import Count, Natural, Positive, Share, at_least

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to encode with what."""

    # Data
    data: Place = "sample"
    """sample, a .parquet or .tar file, a folder of them or of images with metadata.jsonl, or a Hub data set id."""
    data_config: str = ""  # Configuration of a Hub data set. "" = its only one.
    data_splits: str = ""  # Splits to encode, comma-separated. "" = all.
    image_column: str = ""  # Column of the images. "" = the only one that holds images.
    caption_column: str = ""  # Column of the captions. "" = the one called caption, text or txt.
    max_bad_fraction: Share = 0.01
    """Share of the images that may be damaged, and of the captions that may be empty; they are left out.
    0 = not one."""
    image_size: Count = 64  # Side of the images in pixels, cut as the largest square in the middle.
    bucket_multiple: Natural = 0
    """Cut images not to squares but to rectangles of about that area, each to the one nearest to its aspect
    ratio, whose sides are multiples of so many pixels; 64 in SDXL. 0 = squares."""
    mirrored: bool = True  # Encode the mirror images as well, from which training then takes half of the images.
    sampled: bool = False
    """Keep one sample of an image's posterior, half of the size, and not its mean and deviation, of which training
    draws another one each epoch."""

    # Model
    vae: Place = ""
    """Run folder of train_vae.py, or Hub id of an autoencoder. "" = outputs/vae, or the shipped one if that is not
    there."""
    text_encoder: Place = ""
    """Run folder or Hub id of a frozen CLIP text encoder, or of a pipeline that has one, to encode the captions as
    well; each takes 118 KB with CLIP ViT-L/14. "" = the captions alone, which the text encoder reads in training."""

    # Run
    config: Place = ""  # YAML file with differences from the defaults; flags override it. "" = none.
    output_dir: Place = "outputs/latents"  # Folder of the cache; on several nodes it must be one that all of them see.
    batch_size: Count = 32  # Images, or captions, that are encoded at a time.
    images_per_shard: Count = 1024
    """Images of one file; what a killed run has to do again, at most, on each process."""
    num_workers: Annotated[int, at_least(-1)] = -1
    """Data worker processes for each process. 0 = decode in the process that encodes; -1 = one for each of its
    cores."""
    timeout_minutes: Positive = 600  # Minutes that a process that is ready waits for the others.
    dry_run: bool = False  # Show the first caption and the room on disk, write nothing.


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)


from shared.diffusion import latent_cache
from shared.diffusion.captions import load_text_encoder
from shared.diffusion.latent_encoding import cache_identity, encode_shards, load_autoencoder
from shared.images import files as image_files
from shared.images.aspect_ratios import aspect_ratio_buckets
from shared.images.captioned import CaptionedImages, open_captioned, source_of
from shared.performance.dry_run import human_bytes
from shared.run import folder as run_folder
from shared.run import summary
from shared.runtime import collectives, launch, precision

TRAINED, SHIPPED = Path("outputs/vae"), Path(__file__).parent / "assets" / "vae"


# ----------------------------------------------------------------------------------------------------------------------
# Data and model


def plan_buckets(cfg: Config) -> list[tuple[int, int]]:
    """Heights and widths in pixels that images are cut to."""
    if cfg.bucket_multiple:
        return aspect_ratio_buckets(cfg.image_size, cfg.bucket_multiple)
    return [(cfg.image_size, cfg.image_size)]


def open_data(cfg: Config, buckets: list[tuple[int, int]], accelerator: Any) -> dict[str, CaptionedImages]:
    """The images of each split."""
    source = source_of(cfg.data)
    options = {"config": cfg.data_config, "image_column": cfg.image_column, "caption_column": cfg.caption_column}
    with collectives.node_main_first(accelerator):
        names = [name.strip() for name in cfg.data_splits.split(",") if name.strip()]
        names = names or image_files.list_splits(source, cfg.data_config)
        options["max_bad_fraction"] = cfg.max_bad_fraction
        splits = {name: open_captioned(source, split=name, **options) for name in names}
        for images in splits.values():
            image_files.check_buckets(source, images.files, buckets)
    return splits


def open_vae(cfg: Config) -> Any:
    """The frozen autoencoder, which must be able to halve all sides as often as it does."""
    vae = load_autoencoder(cfg.vae, TRAINED, SHIPPED)
    times = 2 ** (len(vae.config.block_out_channels) - 1)
    field = "bucket_multiple" if cfg.bucket_multiple else "image_size"
    expected = f"a multiple of {times}, for the autoencoder halves it"
    cli.expect(getattr(cfg, field) % times == 0, field, getattr(cfg, field), expected)
    return vae


def room_on_disk(
    cfg: Config, splits: dict[str, CaptionedImages], vae: Any, text: Any, buckets: list[tuple[int, int]]
) -> dict[str, int]:
    """Bytes of an image's latents, of its caption's embedding, and of both for all images; captions are small.

    Of rectangles, which differ a little in their area, the mean counts.
    """
    halving = 2 ** (len(vae.config.block_out_channels) - 1)
    places = sum(height * width for height, width in buckets) // len(buckets) // halving**2  # the buckets' mean
    text_shape = (text[0].model_max_length, text[1].config.hidden_size) if text else None
    form = {"mirrored": cfg.mirrored, "sampled": cfg.sampled}
    sizes = latent_cache.bytes_of_image((vae.config.latent_channels, places, 1), text_shape, **form)
    num_bytes = sum(sizes) * sum(len(split) for split in splits.values())
    return dict(zip(("latents of an image", "embedding of a caption", "all images"), (*sizes, num_bytes), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Encoding


def main(cfg: Config) -> None:
    """Encode the shards that are missing, this process's share of them, and write the manifest."""
    cli.check_limits(cfg)
    folder, buckets = Path(cfg.output_dir), plan_buckets(cfg)
    launch.follow_launcher()
    accelerator = launch.start_accelerator(cfg.timeout_minutes, "", cfg.output_dir, deterministic=False)
    splits, vae = open_data(cfg, buckets, accelerator), open_vae(cfg).to(accelerator.device)
    text = load_text_encoder(cfg.text_encoder, "text_encoder") if cfg.text_encoder else None
    if text:
        text[1].to(accelerator.device)
    room = room_on_disk(cfg, splits, vae, text, buckets)
    if cfg.dry_run:
        rows = {name: human_bytes(size) for name, size in room.items()}
        numbers = {f"images of {name}": len(split) for name, split in splits.items()}
        first = next(iter(splits.values())).captions[0]
        accelerator.print(f"first caption: {first}\n\n{summary.table({**numbers, **rows})}")
        return
    form = {"buckets": buckets, "mirrored": cfg.mirrored, "sampled": cfg.sampled}
    made = {"precision": accelerator.mixed_precision, "images_per_shard": cfg.images_per_shard}
    identity = cache_identity(vae, text, splits, **form, **made)
    shards = latent_cache.plan_shards({name: len(split) for name, split in splits.items()}, cfg.images_per_shard)
    with collectives.raise_together(accelerator):
        if accelerator.is_main_process:
            missing = latent_cache.missing_shards(folder, shards)
            share = sum(len(shard.indices) for shard in missing) / sum(len(split) for split in splits.values())
            run_folder.check_room(folder, round(room["all images"] * share))
            latent_cache.begin_cache(folder, identity)
    missing = collectives.gather_objects(accelerator, latent_cache.missing_shards(folder, shards))[0]
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    num_workers = cfg.num_workers if cfg.num_workers >= 0 else launch.cores_of_process()
    speed = {"batch_size": cfg.batch_size, "num_workers": num_workers}
    with precision.autocast(accelerator, accelerator.device.type):
        cut = encode_shards(
            folder, mine, splits, vae, text, **form, **speed, shows_progress=accelerator.is_main_process
        )
    cut = sum(collectives.gather_objects(accelerator, cut))  # when all processes have written their shards
    with collectives.raise_together(accelerator):
        if accelerator.is_main_process:
            manifest = latent_cache.finish_cache(folder, identity, shards, cfg.max_bad_fraction)
            left = summary.listed(manifest["left_out"])
            accelerator.print(f"{manifest['rows']:,} images in {len(shards)} shards, left out: {left}: {folder}/")
            if cut:
                accelerator.print(f"{cut:,} captions of this run were cut to {manifest['text_shape'][0]} tokens")
    accelerator.end_training()


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
