"""What tests share: tiny pre-trained runs and labelled data; of text to image an autoencoder, images and latents."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import pipelines
from tests.recipes import test_bert_pretrain, test_gpt_finetune, test_resnet_pretrain
from tests.recipes.runs import run

# Those of a module that others use too.
causal, talks = test_gpt_finetune.causal, test_gpt_finetune.talks


@pytest.fixture(scope="session")
def messages(talks: Path) -> Path:
    """Conversations."""
    return talks / "messages"


@pytest.fixture(scope="session")
def encoder(bert: ModuleType, sentences_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of pre-training."""
    run_dir = tmp_path_factory.mktemp("encoder") / "run"
    run(
        bert,
        bert.Config(
            **{**test_bert_pretrain.TINY, "max_steps": 60, "data": str(sentences_file), "output_dir": str(run_dir)}
        ),
    )
    return run_dir


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences whose class is told by one of their words, and all kinds of labels beside it."""
    folder, draw = tmp_path_factory.mktemp("labelled"), random.Random(0)
    subjects = {"animal": ["cat", "dog"], "plant": ["tree", "house"]}
    for split, number in (("train", 124), ("test", 41)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for _ in range(number):
                kind = draw.choice(list(subjects))
                words = draw.choices(["the", "a", "big", "red", "sees", "small"], k=draw.randint(2, 14))
                words.insert(draw.randrange(len(words)), draw.choice(subjects[kind]))
                row = {"text": " ".join(words), "other": " ".join(reversed(words)), "words": words, "label": kind}
                row["tags"] = ["B-LIVING" if word in ("cat", "dog", "tree") else "O" for word in words]
                row["score"] = (1.5 if kind == "animal" else -0.5) + len(words) / 20
                file.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="session")
def classifier(resnet: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of pre-training, on two classes of noise."""
    folder, draw = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("rough", "smooth"):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(8):
                pixels = draw.integers(0, 255, (16, 16, 3)) if name == "rough" else np.full((16, 16, 3), 20 * index)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / split / name / f"{index}.png")
    fields = {
        **test_resnet_pretrain.TINY,
        "max_steps": 6,
        "data": str(folder / "data"),
        "output_dir": str(folder / "run"),
    }
    run(resnet, resnet.Config(**fields))
    return folder / "run"


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
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of random weights that makes images of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("pipeline")
    pipelines.stable_diffusion(pipelines.tiny_vae()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet of random weights for images of 16 x 16 pixels."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    folder = tmp_path_factory.mktemp("classifier")
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).save_pretrained(folder)
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    processor = transformers.ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=1.0, **statistics)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits of 40 and 7 noisy images of 20 x 16 pixels with captions."""
    folder = tmp_path_factory.mktemp("captioned")
    write_images(folder, [(16, 20)], lambda split, index: f"{split} image {index}")
    return folder


@pytest.fixture(scope="session")
def of_many_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits of 40 and 7 noisy images of six shapes; the captions of the last ten of training are long."""
    sizes = [(16, 20), (20, 20), (36, 18), (15, 25), (24, 30), (30, 17)]  # height and width
    folder = tmp_path_factory.mktemp("of_many_shapes")
    write_images(folder, sizes, lambda split, index: f"{split} image {index}{' of many' if index >= 30 else ''}")
    return folder


def write_images(folder: Path, sizes: list[tuple[int, int]], caption: Callable[[str, int], str]) -> None:
    """Splits of 40 and 7 noisy images, whose sizes take turns."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, number in (("train", 40), ("test", 7)):
        (folder / split).mkdir()
        entries = []
        for index in range(number):
            pixels = draw.integers(0, 256, (*sizes[index % len(sizes)], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{index:02d}.png")
            entries.append({"file_name": f"{index:02d}.png", "caption": caption(split, index)})
        (folder / split / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def cache_flags(captioned: Path, tiny_vae: Path, target: Path) -> dict[str, Any]:
    common = {"data": str(captioned), "vae": str(tiny_vae), "output_dir": str(target)}
    return {**common, "image_size": 16, "batch_size": 4, "images_per_shard": 16, "num_workers": 0}


@pytest.fixture(scope="session")
def full_flags(of_many_shapes: Path, tiny_vae: Path, tiny_text_encoder: Path) -> dict[str, Any]:
    """Those of a cache with buckets and text embeddings, without a folder for it."""
    more = {"bucket_multiple": 4, "text_encoder": str(tiny_text_encoder)}
    return {**cache_flags(of_many_shapes, tiny_vae, Path()), **more}


@pytest.fixture(scope="session")
def latents(
    cache_latents: ModuleType, captioned: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache of those images."""
    target = tmp_path_factory.mktemp("cache") / "latents"
    run(cache_latents, cache_latents.Config(**cache_flags(captioned, tiny_vae, target)))
    return target


@pytest.fixture(scope="session")
def full_latents(
    cache_latents: ModuleType, full_flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A cache with buckets and text embeddings."""
    target = tmp_path_factory.mktemp("full_cache") / "latents"
    run(cache_latents, cache_latents.Config(**{**full_flags, "output_dir": str(target)}))
    return target
