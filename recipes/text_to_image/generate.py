r"""Make images from prompts with a run of pretrain.py, or with any text-to-image pipeline's folder or Hub id.

python recipes/text_to_image/generate.py --prompt "3D Fluent emoji, red apple"
python recipes/text_to_image/generate.py --prompts_file prompts.txt --images_per_prompt 1 --num_steps 50
python recipes/text_to_image/generate.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --guidance_scale 7.5
accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/text_to_image/generate.py \
    --prompts_file prompts.txt
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared.command_line import Place
from shared.fields import Count, Natural


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to make."""

    # Data
    prompt: str = "3D Fluent emoji, red apple"  # What the images are to show.
    prompts_file: Place = ""  # Text file with a prompt on each line, instead of prompt. "" = prompt.
    negative_prompt: str = ""  # What the images are to be guided away from. "" = the empty prompt.
    images_per_prompt: Count = 4  # Images of each prompt.

    # Model
    model: Place = "outputs/text_to_image"
    """Run folder, folder of save_pretrained, or Hub id of a text-to-image pipeline of diffusers."""
    lora: Place = ""
    """Adapter of finetune.py to add to the model: its run folder, a file, or a Hub id. "" = none."""
    lora_scale: float = 1.0  # How much of the adapter is added. 1 = as it was trained.
    num_steps: Count = 25  # Steps in which an image is made.
    guidance_scale: float = 4.0
    """How far images follow the prompt's prediction beyond the empty prompt's. 1 = no guidance."""
    scheduler: str = ""  # Sampler: ddim, dpm, euler or unipc. "" = the model's own.

    # Run
    config: Place = ""  # YAML file with differences from the defaults; flags override it. "" = none.
    output_dir: Place = "outputs/images"
    """Folder for the images, grid.png and prompts.jsonl; files of the same names are replaced."""
    seed: Natural = 0  # The same seed gives the same images, whatever the batch size.
    batch_size: Count = 8  # Images that are made at a time.


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import json
import logging
import re

import numpy as np
from PIL import Image

from shared.data.randomness import derive_seed
from shared.diffusion.generation import (
    add_adapter,
    check_guidance,
    check_steps,
    load_pipeline,
    lost_text,
    make_images,
    read_prompts,
    set_scheduler,
)
from shared.metrics.figures import image_grid
from shared.run.folder import check_writable
from shared.runtime.launch import start_accelerator
from shared.runtime.precision import type_of_products

TIMEOUT_MINUTES = 30  # that a process waits for the others' shares
NUM_SHOWN = 64  # images of the grid, at most
SETTINGS = (
    "model",
    "lora",
    "lora_scale",
    "num_steps",
    "guidance_scale",
    "negative_prompt",
    "scheduler",
)  # noted for each image

logger = logging.getLogger(__name__)


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what can be told wrong before the model is loaded."""
    cli.check_limits(cfg)
    check_writable(Path(cfg.output_dir))
    check_guidance(cfg.model, cfg.guidance_scale)
    is_heard = not cfg.negative_prompt or cfg.guidance_scale > 1
    cli.expect(is_heard, "negative_prompt", cfg.negative_prompt, '"" with guidance_scale 1, which does without it')


def file_name(index: int, prompt: str) -> str:
    """Such as 00012-red-apple.png; names sort as the images come."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")
    return f"{index:05d}-{slug[:60].strip('-') or 'image'}.png"


def main(cfg: Config) -> None:
    """Load the model, make this process's share of the images and write each as soon as it is there."""
    check_config(cfg)
    prompts, folder = read_prompts(cfg.prompts_file) if cfg.prompts_file else [cfg.prompt], Path(cfg.output_dir)
    accelerator = start_accelerator(TIMEOUT_MINUTES, report_to="", logging_dir="", deterministic=False)
    pipeline = load_pipeline(cfg.model, "model", type_of_products(accelerator))
    if cfg.lora:
        add_adapter(pipeline, cfg.lora, cfg.lora_scale)
    if cfg.scheduler:
        set_scheduler(pipeline, cfg.scheduler)
    check_steps(pipeline, cfg.num_steps)
    for prompt in prompts if accelerator.is_main_process else ():
        if lost := lost_text(pipeline, prompt):
            logger.warning("prompt %r is longer than the text encoder takes and cut: without %r", prompt, lost)
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [prompt for prompt in prompts for _ in range(cfg.images_per_prompt)]
    names = [file_name(index, prompt) for index, prompt in enumerate(prompts)]
    seeds = [derive_seed(cfg.seed, index) for index in range(len(prompts))]
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    images = make_images(
        pipeline.to(accelerator.device),
        prompts[mine],
        seeds[mine],
        num_steps=cfg.num_steps,
        guidance_scale=cfg.guidance_scale,
        negative_prompt=cfg.negative_prompt,
        batch_size=cfg.batch_size,
    )
    for name, image in zip(names[mine], images, strict=True):
        Image.fromarray(image).save(folder / name)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        settings = {name: getattr(cfg, name) for name in SETTINGS} | {"precision": accelerator.mixed_precision}
        write_overview(settings, prompts, seeds, names, folder)
    accelerator.print(f"{len(prompts)} images, and together in grid.png: {folder}/")


def write_overview(
    settings: dict[str, Any], prompts: list[str], seeds: list[int], names: list[str], folder: Path
) -> None:
    """Write prompts.jsonl, of every image what it was made from, and grid.png, with the first ones."""
    records = zip(names, prompts, seeds, strict=True)
    lines = [json.dumps({"file": name, "prompt": prompt, "seed": seed, **settings}) for name, prompt, seed in records]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shown = [np.asarray(Image.open(folder / name)) for name in names[:NUM_SHOWN]]
    titles = [prompt if len(prompt) <= 36 else f"{prompt[:35]}..." for prompt in prompts]
    image_grid(shown, titles, folder / "grid.png")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
