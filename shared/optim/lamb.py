"""LAMB: Adam whose step in every tensor is as long as the tensor itself, times the rate."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from shared.optim.optimizers import replace


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, algorithm 2, with the norm itself as phi).

    A step has the direction of Adam's step with decay; its length is the rate times the norm of the weights. The norm
    is not clamped, and both moments are corrected for their start at zero, as in the implementations that published
    rates were found with (NVIDIA's apex, timm).

    Each parameter group reads `lr`, `betas`, `eps`, `weight_decay` and `trust_ratio`; where that is False, as is usual
    for norms and biases, the step is Adam's. Parameters may be sharded by FSDP2: norms are those of whole tensors, by
    one all-reduce a group. ZeRO flattens tensors into parts that have no norms of their own, so it must be refused. As
    torch's fused optimizers do, it reads `found_inf`, see `step_if_finite`.

    Args:
        groups: parameter groups, or parameters.
        lr: peak rate.
        betas: decay rates of the moments.
        eps: Adam's epsilon, added to the root of the second moment.
        weight_decay: part of the step whose direction is taken.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True  # so torch's GradScaler, after `unscale_`, gives `found_inf` and does not read it

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "trust_ratio": True}
        super().__init__(groups, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer`; counters of updates go to where the weights are, also those of older files."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            state["step"] = state["step"].to(parameter.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is taken
        """Apply one update; parameters without a gradient are left alone."""
        for group in self.param_groups:
            weights = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not weights:
                continue
            steps = [self._adam_step(group, parameter) for parameter in weights]
            ratios = torch.ones(len(weights), device=weights[0].device)
            if group["trust_ratio"]:
                norms, lengths = whole_norms(weights + steps).view(2, -1)
                # Zero weights have no length to go by, and a zero step no direction.
                ratios = torch.where((norms > 0) & (lengths > 0), norms / lengths, 1.0)
            for parameter, step, ratio in zip(weights, steps, ratios, strict=True):
                moved = parameter.add(step.mul_(ratio.to(step.dtype)), alpha=-group["lr"])
                replace(parameter, moved, self.found_inf)

    def _adam_step(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        state, gradient, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        counter = state["step"] + 1
        first = state["exp_avg"].lerp(gradient, 1 - beta1)
        second = (beta2 * state["exp_avg_sq"]).addcmul_(gradient, gradient, value=1 - beta2)
        for name, value in (("step", counter), ("exp_avg", first), ("exp_avg_sq", second)):
            replace(state[name], value, self.found_inf)
        number = counter.to(parameter.dtype)
        root = (second / (1 - beta2**number)).sqrt_().add_(group["eps"])
        return (first / (1 - beta1**number)).div_(root).add_(parameter, alpha=group["weight_decay"])


def whole_norms(tensors: list[Tensor]) -> Tensor:
    """Euclidean norms (N,) of whole tensors, also of those whose parts lie on several processes.

    Args:
        tensors: all plain, or all sharded in the same way (DTensors of FSDP2).
    """
    first: Any = tensors[0]
    parts = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    squares = torch.stack([part.square().sum() for part in parts])
    if hasattr(first, "to_local"):
        for dimension, placement in enumerate(first.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(squares, group=first.device_mesh.get_group(dimension))
    return squares.sqrt_()
