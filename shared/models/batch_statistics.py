"""Running statistics of batch normalisation that do not depend on how an update is cut into processes.

Layers keep a moving average over the batches that one process happens to see, one after the other, so two processes, or
one with twice as many micro-batches, end with different statistics. Here an update counts once, with the mean over its
micro-batches on all processes.
"""

import math
from typing import Any

import torch
from torch import nn

MOMENTUM = 0.1  # share of the newest update: torch's default, and that of He et al. 2016's released code


class RunningStatistics:
    """Moving averages of all batch normalisation layers of a model, over updates.

    Args:
        model: before or after `accelerator.prepare`; its layers are changed to average within an update.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
        for layer in self._layers:
            layer.momentum = None  # torch's way to say: the mean over all batches since the last reset
        self._before: list[torch.Tensor] = []

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for layer in self._layers for buffer in (layer.running_mean, layer.running_var)]

    def begin_update(self) -> None:
        """Call this before the first forward pass of an update."""
        self._before = [buffer.clone() for buffer in self._buffers()]
        for layer in self._layers:
            layer.num_batches_tracked.zero_()

    def end_update(self, accelerator: Any, grad_norm: float) -> None:
        """Call this after the last one, on every process. An update without a finite gradient changes nothing."""
        if not self._layers:
            return
        if not math.isfinite(grad_norm):
            for buffer, before in zip(self._buffers(), self._before, strict=True):
                buffer.copy_(before)
            return
        buffers = self._buffers()
        of_update = accelerator.reduce(torch.cat([buffer.double() for buffer in buffers]), "mean")
        sizes = [buffer.numel() for buffer in buffers]
        for buffer, before, new in zip(buffers, self._before, of_update.split(sizes), strict=True):
            buffer.copy_(before.double().lerp(new, MOMENTUM))
