"""Trackers of accelerate: one run in each, however often training stops and goes on; configuration and samples too."""

import os
from pathlib import Path
from typing import Any

import numpy as np

PROJECT = "pretraining"


def start_trackers(
    accelerator: Any, run_dir: Path, config: dict[str, Any], *, project: str, name: str, run_id: str, step: int
) -> None:
    """Begin this run in each tracker, or go on with it. Every process calls this.

    What WANDB_PROJECT, WANDB_NAME, WANDB_RUN_ID, WANDB_RESUME and WANDB_DIR say comes before what is given here.

    Args:
        accelerator: made with the trackers' names; it has none where there are none.
        run_dir: the run folder, where those that write files write them.
        config: of the run.
        project: under which a tracker keeps runs; "" = WANDB_PROJECT, or `PROJECT`.
        name: of the run in it; "" = that of the run folder.
        run_id: by which a tracker knows the run again.
        step: updates done so far. Metrics of later steps, of before a kill, are to be logged again.
    """
    if not accelerator.log_with:
        return
    name = name or run_dir.resolve().name
    of_wandb = {"name": name, "run_id": run_id, "resume": "allow", "dir": str(run_dir)}
    said = {key: os.environ.get(f"WANDB_{key.upper()}", value) for key, value in of_wandb.items()}
    options = {
        "wandb": {key.removeprefix("run_"): value for key, value in said.items()},
        "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
        "tensorboard": {"purge_step": step + 1},
    }
    accelerator.init_trackers(project or os.environ.get("WANDB_PROJECT") or PROJECT, init_kwargs=options)
    for tracker in accelerator.trackers:
        if step == 0 or tracker.name != "tensorboard":  # which would list the run once more
            tracker.store_init_configuration(config)


def show_image(accelerator: Any, file: Path, step: int) -> None:
    """Send an image to the trackers that take some, as the samples of `step`."""
    from PIL import Image

    with Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"))[None]
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=step, **options)
