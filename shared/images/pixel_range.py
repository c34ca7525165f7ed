"""Pixels as networks that draw images take and give them, from -1 to 1, and as bytes."""

import torch
from torch import Tensor


def from_minus_one(pixels: Tensor) -> Tensor:
    """uint8 images (B, H, W, 3) as float32 (B, 3, H, W) from -1 to 1, channels-last in memory."""
    return pixels.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """Images (B, 3, H, W) from -1 to 1, cut off beyond that, as uint8 (B, H, W, 3)."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
