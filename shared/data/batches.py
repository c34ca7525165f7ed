"""From samples to micro-batches on the device."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # label of what is no target, torch's default ignore_index


def micro_batches(samples: list[dict[str, np.ndarray]], micro_batch_size: int) -> list[dict[str, np.ndarray]]:
    """Stack samples of (...) into batches of (micro_batch_size, ...), in order; the last may be smaller."""
    starts = range(0, len(samples), micro_batch_size)
    groups = [samples[start : start + micro_batch_size] for start in starts]
    return [{name: np.stack([sample[name] for sample in group]) for name in group[0]} for group in groups]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """A batch as tensors on `device`; from pinned memory the copy overlaps with computation."""
    return {name: torch.as_tensor(values).to(device, non_blocking=True) for name, values in batch.items()}
