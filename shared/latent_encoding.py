"""Encoding pictures into the shards of a latent cache."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from shared import latent_cache
from shared.atomic_folder import written_aside
from shared.batches import to_device
from shared.captioned_pictures import SAMPLE, CaptionedPictures, open_captioned
from shared.command_line import expect
from shared.crops import Squares
from shared.latent_cache import Shard
from shared.picture_files import list_splits
from shared.updates import load_updates

_SAMPLE_SIDE, _SAMPLE_SHARD = 64, 1024  # side of the embedded emoji in pixels; pictures of a file

logger = logging.getLogger(__name__)


def cache_identity(
    vae: Any, splits: dict[str, CaptionedPictures], *, image_size: int, mirrored: bool, pictures_per_shard: int
) -> dict[str, Any]:
    """What a cache is made of; another one must not be mixed with it.

    Args:
        vae: `diffusers.AutoencoderKL`.
        splits: pictures of each split.
        image_size: side of the pictures in pixels, cut as the largest square in the middle.
        mirrored: whether mirror images are encoded as well.
        pictures_per_shard: see `latent_cache.plan_shards`.

    Raises:
        UsageError: the autoencoder cannot halve this side so often.
    """
    times = 2 ** (len(vae.config.block_out_channels) - 1)
    expect(image_size % times == 0, "image_size", image_size, f"a multiple of {times}, for the autoencoder halves it")
    return {
        "vae": latent_cache.weights_digest(vae),
        "latent_shape": [vae.config.latent_channels, image_size // times, image_size // times],
        "image_size": image_size,
        "mirrored": mirrored,
        "pictures_per_shard": pictures_per_shard,
        "data": {split: pictures.fingerprint for split, pictures in splits.items()},
    }


def encode_shards(
    folder: Path,
    shards: Iterable[Shard],
    splits: dict[str, CaptionedPictures],
    vae: Any,
    *,
    image_size: int,
    mirrored: bool,
    batch_size: int,
    num_workers: int,
    shows_progress: bool,
) -> None:
    """Encode and write shards one after the other; a picture that cannot be decoded has no row and is named in the log.

    Args:
        folder: of the cache.
        shards: those to write.
        splits: pictures of each split.
        vae: `diffusers.AutoencoderKL`, on the device that is to encode.
        image_size: side of the pictures in pixels, cut as the largest square in the middle.
        mirrored: whether to encode the mirror images as well.
        batch_size: pictures that are encoded at a time.
        num_workers: data worker processes; 0 = decode here.
        shows_progress: whether this process shows a bar on the terminal.
    """
    for shard in tqdm(list(shards), desc="encoding", unit="shard", disable=None if shows_progress else True):
        pictures = splits[shard.split].subset(np.array(shard.indices))
        squares = Squares(pictures.files, image_size, batch_size)
        rows = _encode(squares, pictures, vae, mirrored, -(-len(pictures) // batch_size), num_workers)
        named = ({"index": shard.indices[position], **row} for position, row in rows)
        latent_cache.write_shard(folder, shard, named, mirrored=mirrored)


def _encode(
    squares: Squares, pictures: CaptionedPictures, vae: Any, mirrored: bool, num_batches: int, num_workers: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Positions in the shard, and the columns of each."""
    found = -1
    for batch in load_updates(squares, range(num_batches), num_workers, vae.device):
        pixels = to_device(batch, vae.device)["pixel_values"]
        columns = _posterior(vae, pixels, "")
        if mirrored:
            columns |= _posterior(vae, pixels.flip(2), "mirrored_")
        for row, position in enumerate(batch["indices"].tolist()):
            if position >= 0:
                _name_bad(pictures, range(found + 1, position))
                found = position
                values = {name: column[row] for name, column in columns.items()}
                yield position, {"caption": pictures.captions[position], **values}
    _name_bad(pictures, range(found + 1, len(pictures)))


@torch.no_grad()
def _posterior(vae: Any, pixels: Tensor, prefix: str) -> dict[str, np.ndarray]:
    """Mean and standard deviation of uint8 pictures (B, S, S, 3): (B, C, s, s) each."""
    posterior = vae.encode(pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1).latent_dist
    return {f"{prefix}mean": posterior.mean.cpu().numpy(), f"{prefix}std": posterior.std.cpu().numpy()}


def _name_bad(pictures: CaptionedPictures, positions: range) -> None:
    for position in positions:
        logger.warning("%s cannot be decoded and is left out", pictures.files.name(position))


def sample_latents(cache_dir: Path, vae: Any) -> Path:
    """The latents of the embedded emoji and of their mirror images, made in `cache_dir` unless they are there.

    Args:
        cache_dir: for data that is made once.
        vae: `diffusers.AutoencoderKL`, on the device that is to encode.

    Returns:
        The folder of a complete cache.
    """
    splits = sample_splits()
    form = {"image_size": _SAMPLE_SIDE, "mirrored": True}
    identity = cache_identity(vae, splits, **form, pictures_per_shard=_SAMPLE_SHARD)
    folder = cache_dir / f"latents-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        logger.warning("encoding the embedded emoji, once, into %s", folder)
        with written_aside(folder) as aside:
            latent_cache.begin_cache(aside, identity)
            sizes = {name: len(pictures) for name, pictures in splits.items()}
            shards = latent_cache.plan_shards(sizes, _SAMPLE_SHARD)
            speed = {"batch_size": 32, "num_workers": 0}
            encode_shards(aside, shards, splits, vae, **form, **speed, shows_progress=True)
            latent_cache.finish_cache(aside, identity, shards, max_bad_fraction=0.0)
    return folder


def sample_splits() -> dict[str, CaptionedPictures]:
    """The embedded emoji."""
    columns = {"config": "", "image_column": "", "caption_column": "", "max_bad_fraction": 0.0}
    return {name: open_captioned(str(SAMPLE), split=name, **columns) for name in list_splits(str(SAMPLE), "")}
