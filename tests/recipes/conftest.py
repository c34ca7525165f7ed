"""What the tests of text to image share: an autoencoder, captioned pictures, and their latents."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.recipes.runs import run


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of random weights that halves the sides once."""
    import diffusers
    import torch

    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = diffusers.AutoencoderKL(**sizes, **blocks, mid_block_add_attention=False)
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits of 40 and 7 noisy pictures of 20 x 16 pixels with captions."""
    from PIL import Image

    folder, draw = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    for split, number in (("train", 40), ("test", 7)):
        (folder / split).mkdir()
        entries = []
        for index in range(number):
            name = f"{index:02d}.png"
            Image.fromarray(draw.integers(0, 256, (16, 20, 3), dtype=np.uint8)).save(folder / split / name)
            entries.append({"file_name": name, "caption": f"{split} picture {index}"})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def cache_flags(captioned: Path, tiny_vae: Path, target: Path) -> dict[str, Any]:
    common = {"data": str(captioned), "vae": str(tiny_vae), "output_dir": str(target)}
    return {**common, "image_size": 16, "batch_size": 4, "pictures_per_shard": 16, "num_workers": 0}


@pytest.fixture(scope="session")
def latents(
    cache_latents: ModuleType, captioned: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache of those pictures."""
    target = tmp_path_factory.mktemp("cache") / "latents"
    run(cache_latents, cache_latents.Config(**cache_flags(captioned, tiny_vae, target)))
    return target
