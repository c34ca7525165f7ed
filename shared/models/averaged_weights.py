"""An exponential moving average of the weights, which is what is evaluated and saved (Polyak and Juditsky 1992)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from shared.command_line import UsageError
from shared.runtime.collectives import placed_like


class AveragedWeights:
    """The average of parameters and floating-point buffers over updates, in the precision of the weights.

    Args:
        accelerator: knows the engine.
        model: prepared; its weights are where the average begins.
        decay: share of the old average that an update keeps, less in the beginning; 0 = there is no average, and the
            weights themselves are used.
        saved: what `tensors` gave, of the run that goes on; empty = begin.

    Raises:
        UsageError: the engine keeps no whole weights between updates (ZeRO-3).
    """

    def __init__(self, accelerator: Any, model: nn.Module, decay: float, saved: dict[str, Tensor]) -> None:
        plugin = getattr(accelerator.state, "deepspeed_plugin", None)
        if decay and plugin and plugin.zero_stage == 3:
            raise UsageError(
                f"ema_decay: {decay}: expected 0 under ZeRO-3, which keeps no whole weights between updates"
            )
        self._decay = decay
        everything = (*model.named_parameters(), *model.named_buffers()) if decay else ()
        self._weights = {_plain(name): tensor for name, tensor in everything if tensor.is_floating_point()}
        self._average = {name: tensor.detach().clone() for name, tensor in self._weights.items()}
        for name, tensor in saved.items():
            self._average[name].copy_(placed_like(tensor.to(self._average[name].device), self._average[name]))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after `step` updates into the average."""
        # Slower with time, as TensorFlow's ExponentialMovingAverage: the first weights are worth little.
        average = get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))  # a few kernels for many tensors
        for is_sharded in (True, False):  # which no kernel takes together
            names = [name for name, tensor in self._average.items() if hasattr(tensor, "full_tensor") is is_sharded]
            if names:
                average([self._average[name] for name in names], [self._weights[name] for name in names], step)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averaged weights during the block."""
        kept = {name: tensor.detach().clone() for name, tensor in self._weights.items()}
        self._copy(self._average)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, source: dict[str, Tensor]) -> None:
        for name, weight in self._weights.items():
            weight.copy_(source[name])

    def tensors(self) -> dict[str, Tensor]:
        """The average for a checkpoint, gathered to the CPU. Every process calls this."""
        return {
            name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().contiguous()
            for name, tensor in self._average.items()
        }


def _plain(name: str) -> str:
    """A weight's name without the prefixes of wrappers, so that a run goes on with or without them."""
    return name.replace("module.", "").replace("_orig_mod.", "")
