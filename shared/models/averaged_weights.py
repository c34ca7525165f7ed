"""An exponential moving average of the weights, which is what is evaluated and saved (Polyak and Juditsky 1992)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from shared.runtime.collectives import placed_like


class AveragedWeights:
    """The average of parameters and floating-point buffers over updates, in the precision of the weights.

    Where an engine shards the weights (FSDP2, ZeRO-3), each process averages its own shards.

    Args:
        model: prepared; its weights are where the average begins.
        decay: share of the old average that an update keeps, less in the beginning; 0 = there is no average, and the
            weights themselves are used.
        saved: what `tensors` gave, of the run that goes on; empty = begin.
    """

    def __init__(self, model: nn.Module, decay: float, saved: dict[str, Tensor]) -> None:
        self._decay = decay
        everything = (*model.named_parameters(), *model.named_buffers()) if decay else ()
        self._model = {_plain(name): tensor for name, tensor in everything if tensor.is_floating_point()}
        self._weights = {name: _shard(tensor) for name, tensor in self._model.items()}
        self._average = {name: tensor.detach().clone() for name, tensor in self._weights.items()}
        for name, tensor in saved.items():
            self._average[name].copy_(_shard_like(tensor.to(self._average[name].device), self._model[name]))

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
        # ZeRO-3 keeps small weights whole beside their shards.
        whole: list[Any] = [tensor for tensor in self._model.values() if getattr(tensor, "ds_persist", False)]
        if whole:
            whole[0].partition(whole)
            whole[0].all_gather(whole)

    def tensors(self) -> dict[str, Tensor]:
        """The average for a checkpoint, gathered to the CPU. Every process calls this."""
        return {name: _whole(shard, self._model[name]).cpu().contiguous() for name, shard in self._average.items()}


def _shard(tensor: Tensor) -> Tensor:
    """What this process holds of a weight: under ZeRO-3 a flat part, else the tensor, which FSDP2 shards itself."""
    return getattr(tensor, "ds_tensor", tensor)


def _shard_like(whole: Tensor, tensor: Any) -> Tensor:
    """What this process holds of `whole`, as `_shard` is of `tensor`."""
    if not hasattr(tensor, "ds_tensor"):
        return placed_like(whole, tensor)
    size = tensor.ds_tensor.numel()  # the same on all processes, so the last one's may be longer than what is left
    start = size * torch.distributed.get_rank(tensor.ds_process_group)
    part = whole.flatten()[start : start + size]
    return torch.nn.functional.pad(part, (0, size - len(part)))


def _whole(shard: Any, tensor: Any) -> Tensor:
    """What all processes hold together, as `_shard` is of `tensor`."""
    if not hasattr(tensor, "ds_tensor"):
        return shard.full_tensor() if hasattr(shard, "full_tensor") else shard
    parts = [torch.empty_like(shard) for _ in range(torch.distributed.get_world_size(tensor.ds_process_group))]
    torch.distributed.all_gather(parts, shard, tensor.ds_process_group)
    return torch.cat(parts)[: tensor.ds_numel].reshape(tensor.ds_shape)


def _plain(name: str) -> str:
    """A weight's name without the prefixes of wrappers, so that a run goes on with or without them."""
    return name.replace("module.", "").replace("_orig_mod.", "")
