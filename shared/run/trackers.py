"""Trackers of accelerate, with configuration and samples; in some it stays one run, however often training stops."""

import os
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = "pretraining"


def start_trackers(
    accelerator: Any, run_dir: Path, config: dict[str, Any], *, project: str, name: str, run_id: str, step: int
) -> None:
    """Begin this run in each tracker; tensorboard, wandb and trackio go on with it. Every process calls this.

    Steps that are done again after a kill stand once in tensorboard and wandb, twice in trackio.

    Args:
        accelerator: made with the trackers' names; it has none where there are none.
        run_dir: the run folder, where those that write files write them.
        config: of the run.
        project: under which a tracker keeps runs; "" = what WANDB_PROJECT says, or `PROJECT`.
        name: of the run in it; "" = what WANDB_NAME says, or that of the run folder.
        run_id: by which a tracker knows the run again, unless WANDB_RUN_ID says another.
        step: updates done so far. Metrics of later steps, of before a kill, are to be logged again.
    """
    if not accelerator.log_with:
        return
    said = os.environ
    name = name or said.get("WANDB_NAME") or run_dir.resolve().name
    options = {
        "wandb": {
            "name": name,
            "id": said.get("WANDB_RUN_ID", run_id),
            "resume": said.get("WANDB_RESUME", "allow"),
            "dir": said.get("WANDB_DIR", str(run_dir)),
        },
        "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
        "tensorboard": {"purge_step": step + 1},
    }
    accelerator.init_trackers(project or said.get("WANDB_PROJECT") or PROJECT, init_kwargs=options)
    for tracker in accelerator.trackers:
        if step == 0 or tracker.name != "tensorboard":  # which would list the run once more
            tracker.store_init_configuration(config)


def show_image(accelerator: Any, file: Path, step: int) -> None:
    """Send an image to tensorboard and wandb, as the samples of `step`; others take other forms, or none."""
    from PIL import Image

    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))[None]
    for tracker in accelerator.trackers:
        if tracker.name in ("tensorboard", "wandb"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=step, **options)
