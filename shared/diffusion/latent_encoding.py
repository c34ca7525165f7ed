"""Encoding images and their captions into the shards of a latent cache, and opening one with its autoencoder."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from shared.data import left_out
from shared.data.batches import to_device
from shared.data.randomness import derive_seed, normal_numbers
from shared.data.updates import load_updates
from shared.diffusion import latent_cache
from shared.diffusion.captions import encode_text, note_cut_captions, text_identity, token_ids
from shared.diffusion.latent_cache import Latents, Shard
from shared.fields import LatentData
from shared.images.captioned import SAMPLE, CaptionedImages, open_captioned, source_of
from shared.images.crops import BucketCrops
from shared.images.files import check_sides, list_splits
from shared.images.pixel_range import from_minus_one
from shared.models.pretrained import load_diffusion_model
from shared.runtime.atomic_folder import written_aside
from shared.runtime.collectives import node_main_first

SAMPLE_SIDE = 64  # of the embedded emoji in pixels
_IMAGES_PER_SHARD = 1024

logger = logging.getLogger(__name__)


def cache_identity(
    vae: Any,
    text: tuple[Any, Any] | None,
    splits: dict[str, CaptionedImages],
    *,
    buckets: Sequence[tuple[int, int]],
    mirrored: bool,
    sampled: bool,
    precision: str,
    images_per_shard: int,
) -> dict[str, Any]:
    """What a cache is made of; another one must not be mixed with it.

    Args:
        vae: `diffusers.AutoencoderKL`.
        text: tokenizer and encoder, see `captions.load_text_encoder`; None = the captions alone.
        splits: images of each split.
        buckets: heights and widths in pixels that images are cut to.
        mirrored: whether mirror images are encoded as well.
        sampled: see `latent_cache.posterior_columns`.
        precision: in which the networks compute, no, bf16 or fp16 as accelerate calls them.
        images_per_shard: see `latent_cache.plan_shards`.
    """
    return {
        "vae": latent_cache.weights_digest(vae),
        "latent_channels": vae.config.latent_channels,
        **(text_identity(*text) if text else {"text_encoder": None, "text_shape": None}),
        "buckets": [list(bucket) for bucket in buckets],
        "mirrored": mirrored,
        "sampled": sampled,
        "precision": precision,
        "images_per_shard": images_per_shard,
        "data": {split: images.fingerprint for split, images in splits.items()},
    }


def encode_shards(
    folder: Path,
    shards: Iterable[Shard],
    splits: dict[str, CaptionedImages],
    vae: Any,
    text: tuple[Any, Any] | None,
    *,
    buckets: Sequence[tuple[int, int]],
    mirrored: bool,
    sampled: bool,
    batch_size: int,
    num_workers: int,
    shows_progress: bool,
) -> int:
    """Encode and write shards one after the other; an image that cannot be decoded has no row and is named in the log.

    Args:
        folder: of the cache.
        shards: those to write.
        splits: images of each split.
        vae: `diffusers.AutoencoderKL`, on the device that is to encode.
        text: tokenizer and encoder, on that device; None = the captions alone.
        buckets: heights and widths in pixels; each image is cut to the one nearest to its aspect ratio.
        mirrored: whether to encode the mirror images as well.
        sampled: see `latent_cache.posterior_columns`; its noise depends on the split and the index alone.
        batch_size: images, or captions, that are encoded at a time.
        num_workers: data worker processes; 0 = decode here.
        shows_progress: whether this process shows a bar on the terminal.

    Returns:
        How many captions were cut, for they are longer than the text encoder takes.
    """
    prefixes = ["", "mirrored_"] if mirrored else [""]
    columns = latent_cache.posterior_columns(sampled)
    arrays = [f"{prefix}{name}" for prefix in prefixes for name in columns] + (["text"] if text else [])
    shards, cut = list(shards), 0
    parts = [splits[shard.split].subset(np.array(shard.indices)) for shard in shards]
    crops = [BucketCrops(images.files, buckets, batch_size) for images in parts]
    # One loader for all of them: data workers that begin anew with each shard would let a GPU wait.
    items = load_updates(ConcatDataset(crops), range(sum(map(len, crops))), num_workers, vae.device) if shards else []
    shown = tqdm(shards, desc="encoding", unit="shard", disable=None if shows_progress else True)
    for shard, images, part in zip(shown, parts, crops, strict=True):
        found = _encode_images(itertools.islice(items, len(part)), vae, prefixes, batch_size)
        for position in range(len(images)):
            if position not in found:
                logger.warning("%s cannot be decoded and is left out", images.files.name(position))
        rows = [
            {"index": shard.indices[position], "caption": images.captions[position], **found[position]}
            for position in sorted(found)
        ]
        if sampled:
            rows = [_draw_sample(row, shard.split, prefixes) for row in rows]
        if text:
            cut += _encode_captions(rows, *text, batch_size)
        latent_cache.write_shard(folder, shard, rows, arrays)
    return cut


def _encode_images(
    items: Iterable[Any], vae: Any, prefixes: Sequence[str], batch_size: int
) -> dict[int, dict[str, Any]]:
    """Columns of the images by their position in the shard, those of mirror images where there is a prefix for it."""
    found: dict[int, dict[str, Any]] = {}
    for batch in _full_batches(itertools.chain.from_iterable(items), batch_size):
        pixels = to_device(batch, vae.device)["pixel_values"]
        columns: dict[str, np.ndarray] = {}
        for prefix in prefixes:
            columns |= _posterior(vae, pixels.flip(2) if prefix else pixels, prefix)
        height, width = columns["mean"].shape[2:]
        for row, position in enumerate(batch["indices"].tolist()):
            values = {name: column[row] for name, column in columns.items()}
            found[position] = {"height": height, "width": width, **values}
    return found


def _full_batches(parts: Iterable[dict[str, Tensor]], batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Join parts of at most `batch_size` images to batches of so many of one size; the last of a size may be less."""
    waiting: dict[Any, dict[str, Tensor]] = {}
    for part in parts:
        size, joined = part["pixel_values"].shape[1:], part
        if size in waiting:
            joined = {name: torch.cat([values, part[name]]) for name, values in waiting.pop(size).items()}
        if len(joined["indices"]) >= batch_size:
            yield {name: values[:batch_size] for name, values in joined.items()}
            joined = {name: values[batch_size:] for name, values in joined.items()}
        if len(joined["indices"]):
            waiting[size] = joined
    yield from waiting.values()


@torch.no_grad()
def _posterior(vae: Any, pixels: Tensor, prefix: str) -> dict[str, np.ndarray]:
    """Mean and standard deviation of uint8 images (B, H, W, 3): float16 (B, C, h, w) each."""
    posterior = vae.encode(from_minus_one(pixels)).latent_dist
    return {f"{prefix}{name}": getattr(posterior, name).half().cpu().numpy() for name in ("mean", "std")}


def _draw_sample(row: dict[str, Any], split: str, prefixes: Sequence[str]) -> dict[str, Any]:
    """The row with a `sample` of each posterior in place of its mean and deviation."""
    row = dict(row)
    for prefix in prefixes:
        mean, std = (row.pop(prefix + name).astype(np.float32) for name in ("mean", "std"))
        seed = derive_seed("sample of the posterior", split, prefix)
        drawn = normal_numbers(seed, np.array([row["index"]]), count=mean.size).reshape(mean.shape)
        row[f"{prefix}sample"] = mean + std * drawn
    return row


def _encode_captions(rows: list[dict[str, Any]], tokenizer: Any, encoder: Any, batch_size: int) -> int:
    """Add the column `text`, float16 (L, D), and say how many captions were cut."""
    total = 0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        ids, cut = token_ids(tokenizer, [row["caption"] for row in batch])
        embeddings = encode_text(encoder, torch.from_numpy(ids).to(encoder.device)).half().cpu().numpy()
        for row, embedding in zip(batch, embeddings, strict=True):
            row["text"] = embedding
        total += cut
    return total


def load_autoencoder(name: str, trained: Path, shipped: Path) -> Any:
    """A frozen `diffusers.AutoencoderKL` in evaluation mode, on the CPU.

    Args:
        name: folder or Hub id; "" = `trained`, or `shipped` if that is not there.
        trained: folder that may be there.
        shipped: folder that is there.

    Raises:
        UsageError: it is not there, or is no autoencoder; naming vae.
    """
    import diffusers

    name = name or str(trained if trained.is_dir() else shipped)
    return load_diffusion_model(diffusers.AutoencoderKL, name, "vae").eval().requires_grad_(False)


def open_latents(
    accelerator: Any, source: LatentData, vae: Any, text: tuple[Any, Any] | None, *, cached: Path, cache_dir: Path
) -> tuple[Latents, dict[str, Latents], dict[str, Any], Any]:
    """Latents to train on, those to evaluate on by the names of their splits, and the manifest of their cache.

    Last comes the text encoder if it must run in training, for there are no embeddings, on the accelerator's device;
    else None. Every process calls this; those of a node make or find the latents once.

    Args:
        accelerator: knows the processes.
        source: which latents; the sample's are in `cached`, which must be of the embedded emoji, or, if it is not
            there, are made in `cache_dir`.
        vae: see `encode_once`.
        text: see `encode_once`.
        cached: folder that may be there.
        cache_dir: for data that is made once.

    Raises:
        UsageError: see `open_cache`.
    """
    with node_main_first(accelerator):
        folder, of_sample = Path(source.data), {}
        if source.data == "sample":
            splits = sample_splits()
            form: dict[str, Any] = {"side": SAMPLE_SIDE, "mirrored": True, "max_bad_fraction": 0.0}
            folder = cached if cached.is_dir() else encode_once(cache_dir, splits, vae, text, **form)
            of_sample["data"] = {name: images.fingerprint for name, images in splits.items()}
        train, held_out, manifest = open_cache(folder, source, vae, text, of_sample)
    if text is None or manifest["text_encoder"]:
        return train, held_out, manifest, None
    note_cut_captions(text[0], latent_cache.some_captions([train], 10_000))
    return train, held_out, manifest, text[1].to(accelerator.device)


def open_cache(
    folder: Path,
    source: LatentData,
    vae: Any,
    text: tuple[Any, Any] | None,
    identity: dict[str, Any],
    field: str = "data",
) -> tuple[Latents, dict[str, Latents], dict[str, Any]]:
    """Latents to train on, those to evaluate on by the names of their splits, and the manifest of their cache.

    Args:
        folder: of the cache.
        source: which of its samples.
        vae: with which it must have been made.
        text: tokenizer and encoder with which its embeddings, if it has any, must have been made; None = whichever.
        identity: what else its manifest must say.
        field: the configuration field that the folder comes from, for the message.

    Raises:
        UsageError: there is no complete cache, or one of something else; or see `latent_cache.open_splits` and
            `latent_cache.matching_captions`.
    """
    manifest = latent_cache.read_manifest(folder, field)
    identity = {"vae": latent_cache.weights_digest(vae), **identity}
    if text and manifest["text_encoder"]:
        identity |= text_identity(*text)
    latent_cache.check_identity(manifest, identity, field, folder)
    for what, number in manifest.get("left_out", {}).items():  # caches of earlier versions say nothing of it
        left_out.note(what, number, where=str(folder))
    splits = (source.data_split, source.eval_splits, source.eval_fraction)
    train, held_out = latent_cache.open_splits(folder, manifest, *splits)
    asked = (source.captions_with, source.captions_without)
    return *latent_cache.matching_captions(train, held_out, *asked), manifest


def open_images(
    data: str,
    caption: str,
    columns: dict[str, str],
    *,
    cache_dir: Path,
    vae: Any,
    side: int,
    mirrored: bool,
    max_bad_fraction: float,
    field: str = "data",
) -> Path:
    """The folder of the latents of some data: itself, where it is one, else that of its images, encoded once.

    Args:
        data: a folder that cache_latents.py made, or images, see `open_captioned`, or sample.
        caption: of all images; "" = each has its own.
        columns: config, image_column and caption_column, see `open_captioned`.
        cache_dir: see `encode_once`.
        vae: see `encode_once`.
        side: see `encode_once`.
        mirrored: see `encode_once`.
        max_bad_fraction: share of damaged images, or of empty captions, above which the data is refused.
        field: the configuration field that it comes from, for the message.

    Raises:
        UsageError: see `open_captioned` and `check_sides`.
    """
    if latent_cache.is_cache(Path(data)):
        return Path(data)
    source = source_of(data)
    splits = {
        name: open_captioned(source, split=name, caption=caption, max_bad_fraction=max_bad_fraction, **columns)
        for name in list_splits(source, columns["config"])
    }
    for images in splits.values():
        check_sides(source, images.files, side)
    form: dict[str, Any] = {"side": side, "mirrored": mirrored, "max_bad_fraction": max_bad_fraction}
    return encode_once(cache_dir, splits, vae, None, **form)


def encode_once(
    cache_dir: Path,
    splits: dict[str, CaptionedImages],
    vae: Any,
    text: tuple[Any, Any] | None,
    *,
    side: int,
    mirrored: bool,
    max_bad_fraction: float,
) -> Path:
    """The latents of few images, cut to squares, made in `cache_dir` unless they are there.

    Args:
        cache_dir: for data that is made once.
        splits: images of each split.
        vae: `diffusers.AutoencoderKL`, on the device that is to encode.
        text: tokenizer and encoder, on that device; None = the captions alone.
        side: of the squares in pixels.
        mirrored: whether mirror images are encoded as well.
        max_bad_fraction: share of the images that may be damaged; they are left out.

    Returns:
        The folder of a complete cache.

    Raises:
        UsageError: more images are damaged.
    """
    form: dict[str, Any] = {"buckets": [(side, side)], "mirrored": mirrored, "sampled": False}
    identity = cache_identity(vae, text, splits, **form, precision="no", images_per_shard=_IMAGES_PER_SHARD)
    folder = cache_dir / f"latents-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        number = sum(len(images) for images in splits.values())
        logger.warning("encoding %s images, once, into %s", f"{number:,}", folder)
        with written_aside(folder) as aside:
            latent_cache.begin_cache(aside, identity)
            sizes = {name: len(images) for name, images in splits.items()}
            shards = latent_cache.plan_shards(sizes, _IMAGES_PER_SHARD)
            form |= {"batch_size": 32, "num_workers": 0, "shows_progress": True}
            encode_shards(aside, shards, splits, vae, text, **form)
            latent_cache.finish_cache(aside, identity, shards, max_bad_fraction)
    return folder


def sample_splits() -> dict[str, CaptionedImages]:
    """The embedded emoji."""
    names, data = list_splits(str(SAMPLE), ""), str(SAMPLE)
    usual: dict[str, Any] = {"config": "", "image_column": "", "caption_column": "", "max_bad_fraction": 0.0}
    return {name: open_captioned(data, split=name, **usual) for name in names}
