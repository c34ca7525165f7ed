r"""Measure a text-to-image model on captions that it was not trained on: are its images like true ones, and which?

It makes one image for each caption and compares, in the features of a classifier, how all of them are spread
(Heusel et al. 2017: Frechet distance) and whether each is nearer to the true image of its caption than to the others.
The autoencoder's reconstructions of the true images show what its diffusion model could reach at best.

    python recipes/text_to_image/evaluate.py
    python recipes/text_to_image/evaluate.py --data_split test_unseen_concept --max_images 300
    python recipes/text_to_image/evaluate.py --model outputs/sd1 --data me/captioned --image_size 256 \
        --features inception --max_images 10000
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/text_to_image/evaluate.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared.command_line import Place
from shared.fields import Count, Natural, Share, at_least

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure on what."""

    # Data
    data: Place = "sample"
    """sample, a .parquet or .tar file, a folder of them or of images with metadata.jsonl, or a Hub data set id."""
    data_config: str = ""  # Configuration of a Hub data set. "" = its only one.
    data_split: str = ""
    """Split of held-out images. "" = test_unseen_combination of the sample, else the first whose name begins with
    validation, val or test."""
    image_column: str = ""  # Column of the images. "" = the only one that holds images.
    caption_column: str = ""  # Column of the captions. "" = the one called caption, text or txt.
    captions_with: str = ""  # Measure only images whose caption has this text. "" = all.
    max_bad_fraction: Share = 0.01  # Share of the captions that may be empty; they are left out. 0 = not one.
    image_size: Count = 64
    """Side of the model's images in pixels; true ones are cut to it as the largest square in the middle."""

    # Model
    model: Place = "outputs/text_to_image"
    """Run folder, folder of save_pretrained, or Hub id of a latent diffusion pipeline of diffusers."""
    lora: Place = ""
    """Adapter of finetune.py to add to the model: its run folder, a file, or a Hub id. "" = none."""
    num_steps: Count = 25  # Steps in which an image is made.
    guidance_scale: float = 4.0
    """How far images follow the caption's prediction beyond the empty caption's. 1 = no guidance."""

    # Evaluation
    max_images: Annotated[int, at_least(2)] = 200
    """Captions that an image is made for, at most, spread over the split."""
    others_split: str = ""
    """Split whose images can also be taken for those of the captions. "" = train of the sample, else none."""
    features: Place = ""
    """Whose features images are compared in: a run folder of recipes/resnet or Hub id of a ResNet classifier, or
    inception. "" = of the sample alone: a classifier of the embedded emoji that lies in assets."""
    classifier: Place = ""
    """What tells kinds of images, such as drawing styles: a run folder of recipes/resnet or Hub id of a ResNet
    classifier; it is told how many are taken for each. "" = of the sample alone: one of its styles in assets."""

    # Run
    config: Place = ""  # YAML file with differences from the defaults; flags override it. "" = none.
    output_dir: Place = ""
    """Folder for evaluation.json and figures/evaluation.png. "" = the model's, if that is a folder."""
    seed: Natural = 0  # The same seed gives the same images, whatever the batch size.
    batch_size: Count = 25  # Images that are made, or looked at, at a time.


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import logging
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from shared.data.randomness import derive_seed
from shared.diffusion.generation import (
    add_adapter,
    check_guidance,
    check_steps,
    load_pipeline,
    lost_text,
    make_images,
    without_bars,
)
from shared.images.captioned import open_captioned, source_of
from shared.images.crops import Squares
from shared.images.files import check_sides, spread, validation_split
from shared.metrics import figures
from shared.metrics.image_features import (
    caption_match,
    frechet_distance,
    load_classifier,
    load_features,
    share_of_classes,
)
from shared.run import folder as run_folder
from shared.run import summary
from shared.runtime.collectives import gather_objects
from shared.runtime.launch import start_accelerator
from shared.runtime.precision import type_of_products

SHIPPED = Path(__file__).parent / "assets" / "emoji_resnet"
SHIPPED_OF_STYLES = Path(__file__).parent / "assets" / "emoji_style_resnet"
SAMPLE_SPLIT = "test_unseen_combination"
TIMEOUT_MINUTES = 30  # that a process waits for the others' shares
NUM_SHOWN = 16  # pairs of images in the grid

logger = logging.getLogger(__name__)


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what can be told wrong before anything is loaded."""
    cli.check_limits(cfg)
    check_guidance(cfg.model, cfg.guidance_scale)
    fits = bool(cfg.features) or cfg.data == "sample"
    cli.expect(
        fits, "features", cfg.features, "inception, or a classifier of such images, where data is not the sample"
    )
    is_clear = bool(cfg.output_dir) or Path(cfg.model).is_dir()
    cli.expect(is_clear, "output_dir", cfg.output_dir, f"a folder, for the model {cfg.model!r} is none")
    run_folder.check_writable(Path(cfg.output_dir or cfg.model))


# ----------------------------------------------------------------------------------------------------------------------
# Data


def pick_split(cfg: Config) -> str:
    """The split to measure on."""
    usual = SAMPLE_SPLIT if cfg.data == "sample" else validation_split(cfg.data, cfg.data_config)
    split = cfg.data_split or usual
    cli.expect(bool(split), "data_split", split, "a name, for no split's begins with validation, val or test")
    return split


def open_data(cfg: Config, split: str, most: int | None, wanted: str = "") -> tuple[list[str], list[int], Tensor]:
    """Captions with the text `wanted`, of at most so many of a split, their positions in it, and their images.

    These are uint8 (N, 3, S, S).
    """
    source = source_of(cfg.data)
    columns = {"image_column": cfg.image_column, "caption_column": cfg.caption_column}
    images = open_captioned(
        source, config=cfg.data_config, split=split, **columns, max_bad_fraction=cfg.max_bad_fraction
    )
    check_sides(source, images.files, cfg.image_size)
    having = [position for position, caption in enumerate(images.captions) if wanted in caption]
    positions = [having[index] for index in spread(len(having), most or len(having))]
    expected = f"text that at least two captions of split {split} have"
    cli.expect(not wanted or len(positions) >= 2, "captions_with", wanted, expected)
    images = images.subset(np.array(positions))
    squares = Squares(images.files, cfg.image_size, len(images))[0]
    for index in np.flatnonzero(squares["indices"] < 0).tolist():
        logger.warning("%s cannot be decoded and is left out", images.files.name(index))
    kept = np.flatnonzero(squares["indices"] >= 0).tolist()
    cli.expect(len(kept) >= 2, "data", cfg.data, f"at least two images that can be decoded in split {split}")
    true = torch.from_numpy(squares["pixel_values"][kept]).permute(0, 3, 1, 2)
    return [images.captions[index] for index in kept], [positions[index] for index in kept], true


# ----------------------------------------------------------------------------------------------------------------------
# Images


def make(
    cfg: Config, accelerator: Any, pipeline: Any, captions: list[str], positions: list[int], mine: slice
) -> Tensor:
    """An image of each caption, uint8 (N, 3, S, S), of which this process makes those that are `mine`.

    An image does not depend on which others are measured.
    """
    made = []
    for image in make_images(
        pipeline,
        captions[mine],
        [derive_seed(cfg.seed, position) for position in positions[mine]],
        num_steps=cfg.num_steps,
        guidance_scale=cfg.guidance_scale,
        negative_prompt="",
        batch_size=cfg.batch_size,
    ):
        sides = " x ".join(map(str, image.shape[:2]))
        fits = image.shape[:2] == (cfg.image_size, cfg.image_size)
        cli.expect(fits, "image_size", cfg.image_size, f"the sides of the model's images, {sides}")
        made.append(torch.from_numpy(image.copy()).permute(2, 0, 1))
    shares = gather_objects(accelerator, made)
    return torch.stack([shares[index % len(shares)][index // len(shares)] for index in range(len(captions))])


@torch.no_grad()
def reconstruct(vae: Any, true: Tensor, batch_size: int) -> Tensor:
    """What the autoencoder makes of images, from the mean of their latents; both uint8 (N, 3, S, S)."""
    made = []
    for batch in true.split(batch_size):
        encoded = vae.encode((batch.to(vae.device, torch.float32) / 127.5 - 1).to(vae.dtype))
        latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent  # of AutoencoderDC
        pixels = vae.decode(latents).sample.float()
        made.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(made)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def measure(
    network: Any, true: Tensor, others: Tensor, made: Tensor, batch_size: int, mine: slice
) -> tuple[dict[str, float], dict[str, float]]:
    """How near images come to the true ones of the same captions, all uint8 (N, 3, S, S), and images at random.

    `others` are true images of other captions, such as of the same thing in other styles; `mine` is this process's
    share of the images whose distance is measured. Every process calls this.
    """
    device = next(network.parameters()).device
    distance = frechet_distance(network, true[mine].split(batch_size), made[mine].split(batch_size))
    of_true, of_made = (
        torch.cat([network(batch.to(device)).cpu() for batch in images.split(batch_size)])
        for images in (torch.cat([true, others]), made)
    )
    match = caption_match(of_made, of_true, torch.arange(len(true)))
    found = {"eval/caption_match_top1": match["top1"], "eval/caption_match_top5": match["top5"]}
    chance = {"eval/caption_match_top1": match["top1_chance"], "eval/caption_match_top5": match["top5_chance"]}
    return {"eval/frechet_distance": distance, **found}, chance


def load_kinds(cfg: Config, device: Any) -> Any:
    """The classifier that tells kinds of images, if there is one."""
    usual = str(SHIPPED_OF_STYLES) if cfg.data == "sample" else ""
    return load_classifier(cfg.classifier or usual, "classifier").to(device) if cfg.classifier or usual else None


def table(made: dict[str, float], reconstructed: dict[str, float], chance: dict[str, float]) -> str:
    """The numbers side by side."""
    columns = {"made": made, "reconstructed": reconstructed, "chance": chance}
    rows = {"": "".join(f"{column:>15}" for column in columns)}
    for name in made:
        rows[name] = "".join(f"{values[name]:>15.3f}" if name in values else " " * 15 for values in columns.values())
    return summary.table(rows)


def show(true: Tensor, made: Tensor, captions: list[str], path: Path) -> None:
    """Draw some images beside the true ones into a PNG."""
    images, titles = [], []
    for index in spread(len(captions), NUM_SHOWN):
        images += [pixels[index].permute(1, 2, 0).numpy() for pixels in (true, made)]
        titles += [captions[index] if len(captions[index]) <= 36 else f"{captions[index][:35]}...", "made"]
    figures.image_grid(images, titles, path)


def main(cfg: Config) -> None:
    """Make an image of each caption, measure, and write what came out."""
    check_config(cfg)
    split = pick_split(cfg)
    captions, positions, true = open_data(cfg, split, cfg.max_images, cfg.captions_with)
    others_split = cfg.others_split or ("train" if cfg.data == "sample" else "")
    cli.expect(others_split != split, "others_split", others_split, f"another split than data_split, {split}")
    others = open_data(cfg, others_split, None)[2] if others_split else true[:0]
    accelerator = start_accelerator(TIMEOUT_MINUTES, report_to="", logging_dir="", deterministic=False)
    pipeline = load_pipeline(cfg.model, "model", type_of_products(accelerator)).to(accelerator.device)
    if cfg.lora:
        add_adapter(pipeline, cfg.lora, scale=1.0)
    has_latents = getattr(pipeline, "vae", None) is not None
    cli.expect(has_latents, "model", cfg.model, "a latent diffusion pipeline, which has an autoencoder")
    check_steps(pipeline, cfg.num_steps)
    with without_bars():
        network = load_features(cfg.features or str(SHIPPED), "features").to(accelerator.device)
        kinds = load_kinds(cfg, accelerator.device)
    num_cut = sum(bool(lost_text(pipeline, caption)) for caption in captions)
    if num_cut and accelerator.is_main_process:
        logger.warning("%d of %d captions are longer than the text encoder takes and cut", num_cut, len(captions))

    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    expected = f"an image at least for each of {accelerator.num_processes} processes, got {len(true)}"
    cli.expect(len(true) >= accelerator.num_processes, "max_images", cfg.max_images, expected)
    made = make(cfg, accelerator, pipeline, captions, positions, mine)
    metrics, chance = measure(network, true, others, made, cfg.batch_size, mine)
    reconstructed = reconstruct(pipeline.vae, true, cfg.batch_size)
    reached, _ = measure(network, true, others, reconstructed, cfg.batch_size, mine)
    if kinds:
        for results, images in ((metrics, made), (reached, reconstructed)):
            shares = share_of_classes(kinds, images.split(cfg.batch_size))
            results |= {f"eval/taken_for/{name}": share for name, share in shares.items()}
    if not accelerator.is_main_process:
        return
    settings = {name: value for name, value in asdict(cfg).items() if name not in ("config", "output_dir")}
    settings |= {"data_split": split, "others_split": others_split, "scheduler": type(pipeline.scheduler).__name__}
    settings["precision"] = accelerator.mixed_precision
    numbers = {"num_images": len(true), "num_others": len(others)}
    outcome = {"metrics": metrics, "reconstructions": reached, "chance": chance, **numbers}
    folder = Path(cfg.output_dir or cfg.model)
    show(true, made, captions, folder / "figures" / "evaluation.png")
    run_folder.write_json(folder / "evaluation.json", {**outcome, "settings": settings})
    lines = (
        table(metrics, reached, chance),
        f"{len(true)} images, {len(others)} others: {folder}/evaluation.json, figures/evaluation.png",
    )
    accelerator.print(*lines, sep="\n")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
