"""What a run says of itself before it begins: a table of what came up and of what follows from the configuration."""

from typing import Any

import torch

from shared.data import left_out
from shared.performance.flops import training_flops


def describe_engine(accelerator: Any) -> dict[str, Any]:
    """What came up: engine, processes, accumulation and precision."""
    return {
        "engine": accelerator.distributed_type.value,
        "processes": accelerator.num_processes,
        "accumulation": accelerator.gradient_accumulation_steps,
        "precision": accelerator.mixed_precision,
        "device": str(accelerator.device),
    }


def describe_classifier(
    accelerator: Any, model: Any, side: int, num_images: int, images_per_update: int
) -> dict[str, Any]:
    """What follows from the configuration of a model that classifies images, and `describe_engine`.

    Args:
        accelerator: knows the engine.
        model: of transformers, not prepared.
        side: of the images that it gets, in pixels.
        num_images: to train on; 0 = unknown.
        images_per_update: over all processes.

    Returns:
        parameters, classes, flops_per_image (forward and backward), images_per_update, updates_per_epoch and left_out,
        the counts of `shared/data/left_out.py`.
    """
    return {
        "parameters": model.num_parameters(),
        "classes": model.config.num_labels,
        "flops_per_image": training_flops(model, {"pixel_values": torch.zeros(1, 3, side, side)}),
        "images_per_update": images_per_update,
        "updates_per_epoch": round(num_images / images_per_update, 1) if num_images else "unknown, streamed",
        "left_out": left_out.counts(),
        **describe_engine(accelerator),
    }


def table(rows: dict[str, Any]) -> str:
    """Two columns as plain lines: names, and values that start at one column; counts by name as a list of words."""
    width = max(map(len, rows), default=0)
    shown = {name: listed(value) if isinstance(value, dict) else value for name, value in rows.items()}
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in shown.items())


def listed(counts: dict[str, int]) -> str:
    """Counts by name in words."""
    return ", ".join(f"{number:,} {name.replace('_', ' ')}" for name, number in counts.items()) or "nothing"
