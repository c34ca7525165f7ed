"""The type in which products are computed, by the launcher's mixed precision; weights stay in float32."""

from typing import Any

import torch

TYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by accelerate's words


def type_of_products(accelerator: Any) -> torch.dtype:
    """That of the run; float32 products may still be computed as TF32."""
    return TYPES[accelerator.mixed_precision]


def autocast(accelerator: Any, device_type: str) -> torch.autocast:
    """A block in which modules compute in that type, for those that `accelerator.prepare` has not seen."""
    dtype = type_of_products(accelerator)
    return torch.autocast(device_type, dtype, enabled=dtype != torch.float32)
