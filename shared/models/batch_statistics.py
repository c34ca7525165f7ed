"""Running statistics of batch normalisation that do not depend on how an update is cut into processes.

Layers keep a moving average over the batches that one process happens to see, one after the other, so two processes, or
one with twice as many micro-batches, end with different statistics. Here an update counts once, with the mean over its
micro-batches on all processes.
"""

from typing import Any

import torch
from torch import nn

MOMENTUM = 0.1  # share of the newest update: torch's default, and that of He et al. 2016's released code


class RunningStatistics:
    """Moving averages of all batch normalisation layers of a model, over updates.

    Nothing here makes the host wait for the device, or torch.compile break its graph.

    Args:
        model: before or after `accelerator.prepare`; its layers are changed to keep the statistics of the newest batch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        for layer in self._layers:
            layer.momentum = 1.0
        self._before: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []
        self._micro_batches = 0

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for layer in self._layers for buffer in (layer.running_mean, layer.running_var)]

    def begin_update(self) -> None:
        """Call this before the first forward pass of an update."""
        self._before = [buffer.clone() for buffer in self._buffers()]
        self._sums = [torch.zeros_like(buffer, dtype=_type_of_sums(buffer)) for buffer in self._before]
        self._micro_batches = 0

    def add_micro_batch(self) -> None:
        """Call this after each forward pass."""
        for total, buffer in zip(self._sums, self._buffers(), strict=True):
            total.add_(buffer)
        self._micro_batches += 1

    def end_update(self, accelerator: Any, grad_norm: torch.Tensor) -> None:
        """Call this after the last one, on every process. An update without a finite norm (scalar) changes nothing."""
        if not self._layers:
            return
        of_update = accelerator.reduce(torch.cat(self._sums) / self._micro_batches, "mean")
        means = of_update.split([total.numel() for total in self._sums])
        for buffer, before, mean in zip(self._buffers(), self._before, means, strict=True):
            buffer.copy_(torch.where(grad_norm.isfinite(), before.to(mean.dtype).lerp(mean, MOMENTUM), before))


def _type_of_sums(buffer: torch.Tensor) -> torch.dtype:
    return torch.float32 if buffer.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
