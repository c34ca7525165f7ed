"""Images of a class that a pipeline makes itself, on which it is trained along so that it does not forget the class."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from PIL import Image

from shared.data.randomness import derive_seed
from shared.diffusion.generation import load_pipeline, make_images
from shared.diffusion.latent_cache import weights_digest
from shared.runtime.atomic_folder import written_aside

_AT_ONCE = 8  # images that are made at a time

logger = logging.getLogger(__name__)


def make_prior(
    cache_dir: Path, name: str, caption: str, device: Any, *, number: int, num_steps: int, guidance_scale: float
) -> Path:
    """Images for the loss that preserves what a model knows of a class (Ruiz et al. 2023, section 3.2), made once.

    Args:
        cache_dir: for data that is made once.
        name: of the pipeline, see `load_pipeline`.
        caption: what all of them show.
        device: that makes them.
        number: of images, each from a seed of its own.
        num_steps: see `make_images`.
        guidance_scale: see `make_images`.

    Returns:
        A folder of images.

    Raises:
        UsageError: see `load_pipeline`.
    """
    pipeline = load_pipeline(name, "init")
    networks = [pipeline.text_encoder, getattr(pipeline, "unet", None) or pipeline.transformer]
    settings: dict[str, Any] = {"num_steps": num_steps, "guidance_scale": guidance_scale}
    parts = [[weights_digest(network) for network in networks], caption, number, settings]
    folder = cache_dir / f"prior-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    logger.warning("making %d images of the prior, once, into %s", number, folder)
    seeds = [derive_seed("prior", index) for index in range(number)]
    prompts: dict[str, Any] = {
        "prompts": [caption] * number,
        "seeds": seeds,
        "negative_prompt": "",
        "batch_size": _AT_ONCE,
    }
    with written_aside(folder) as aside:
        for index, image in enumerate(make_images(pipeline.to(device), **prompts, **settings)):
            Image.fromarray(image).save(aside / f"{index:05d}.png")
    return folder
