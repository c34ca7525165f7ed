"""The library's ResNet for classification, made ready to train, and what turns images into its input.

The normalisation is the one of the exported image processor, so checkpoints of either kind are read alike.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import interpolate

from shared.command_line import expect, whole_numbers

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, from 0 to 1: what checkpoints expect


class ResNetForImageClassification(transformers.ResNetForImageClassification):
    """The library's class, under its name, which is what config.json will say."""

    # accelerate asks for them under FSDP2, and the library has no answer for a model without embeddings.
    get_input_embeddings: Any = lambda self: None
    get_output_embeddings: Any = lambda self: None
    _no_split_modules: Any = ("ResNetStage",)


def stage_sizes(depths: str, hidden_sizes: str) -> dict[str, list[int]]:
    """Blocks and channels of each stage, as the library's configuration takes them.

    Args:
        depths: comma-separated blocks.
        hidden_sizes: comma-separated channels.

    Raises:
        UsageError: they are no whole numbers above 0, or not as many of both.
    """
    sizes = {"depths": whole_numbers("depths", depths), "hidden_sizes": whole_numbers("hidden_sizes", hidden_sizes)}
    stages = len(sizes["depths"])
    is_even = len(sizes["hidden_sizes"]) == stages
    expect(is_even, "hidden_sizes", hidden_sizes, f"as many numbers as depths has: {stages}")
    return sizes


def activate_in_place(model: ResNetForImageClassification) -> ResNetForImageClassification:
    """The model, whose ReLUs now overwrite what they get: less memory to hold and to move, and no gradient needs it."""
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = True
    return model


def normalize(
    pixels: Tensor, enlarge: int, image_mean: Sequence[float] = MEAN, image_std: Sequence[float] = STD
) -> Tensor:
    """What the model takes.

    Args:
        pixels: (B, S, S, 3), from 0 to 255.
        enlarge: times by which the images are enlarged, bilinearly; 1 = not.
        image_mean: of the channels, from 0 to 1.
        image_std: likewise.

    Returns:
        float32 (B, 3, E * S, E * S), channels-last in memory.
    """
    mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (image_mean, image_std))
    scaled = torch.addcmul(-mean / std, pixels.permute(0, 3, 1, 2).to(torch.float32), 1 / (255 * std))
    return interpolate(scaled, scale_factor=enlarge, mode="bilinear") if enlarge > 1 else scaled


def build_processor(
    size: int, crop_fraction: float, image_mean: Sequence[float] = MEAN, image_std: Sequence[float] = STD
) -> transformers.BitImageProcessorPil:
    """What `AutoImageProcessor` loads: the middle crop of `images.crops.CenterCrops`, normalised.

    Not the library's own for ResNet, `ConvNextImageProcessor`: from 384 pixels on it warps whole images to squares.

    Args:
        size: side of the crop in pixels.
        crop_fraction: of the shorter side that it keeps.
        image_mean: of the channels, from 0 to 1.
        image_std: likewise.
    """
    return transformers.BitImageProcessorPil(
        size={"shortest_edge": int(size / crop_fraction)},
        crop_size={"height": size, "width": size},
        resample=2,  # bilinear
        image_mean=list(image_mean),
        image_std=list(image_std),
    )
