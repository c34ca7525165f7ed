"""Muon for hidden matrices together with AdamW for everything else, as one `torch.optim.Optimizer`.

One object is what `accelerator.prepare` takes, what checkpoints save, and what FSDP2 can rebuild. Newton-Schulz runs
in bfloat16 on GPUs and in float32 on CPUs, where bfloat16 is emulated slowly by most processors
(`torch.optim.Muon` always takes bfloat16).
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from shared.runtime.collectives import placed_like


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) and AdamW (Loshchilov and Hutter 2019).

    Each parameter group carries `use_muon`. Groups with it hold matrices (2-D) and read `lr`, `momentum`,
    `weight_decay` and `stored_transposed`; the others read `lr`, `betas`, `eps` and `weight_decay`. Weight decay is
    decoupled in both.

    Args:
        groups: parameter groups, each with "params", "lr" and "use_muon"; a Muon group whose matrices are (in, out), as
            in the library's GPT-2, and not (out, in) says "stored_transposed": True.
        momentum: Nesterov momentum of the Muon groups.
        betas: decay rates of AdamW's moments.
        eps: AdamW's epsilon.
        weight_decay: for groups that do not bring their own.

    Raises:
        ValueError: a Muon group holds a parameter that is not a matrix.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        of_muon = {"use_muon": False, "momentum": momentum, "stored_transposed": False}
        # fused: torch then puts AdamW's step counters back on the device when a state is loaded.
        of_adamw = {"betas": betas, "eps": eps, "fused": True}
        super().__init__(groups, {**of_muon, **of_adamw, "weight_decay": weight_decay})
        for group in self.param_groups:
            if group["use_muon"] and any(parameter.ndim != 2 for parameter in group["params"]):
                raise ValueError("Muon groups take matrices only; give the rest to an AdamW group")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; parameters without a gradient are left alone."""
        for group in self.param_groups:
            pairs = [(parameter, parameter.grad) for parameter in group["params"] if parameter.grad is not None]
            if group["use_muon"]:
                self._muon_step(group, pairs)
            elif pairs:
                self._adamw_step(group, pairs)

    def _muon_step(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        updates: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
        for parameter, gradient in pairs:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            nesterov = gradient.lerp(state["momentum_buffer"], group["momentum"])
            whole = nesterov.full_tensor() if hasattr(nesterov, "full_tensor") else nesterov
            updates.setdefault(tuple(parameter.shape), []).append((parameter, whole))
        for (rows, columns), alike in updates.items():
            directions = orthogonalize(torch.stack([direction for _, direction in alike]))
            # A wide or tall matrix moves by the same root-mean-square per entry of its output (Jordan et al. 2024).
            outputs_an_input = columns / rows if group["stored_transposed"] else rows / columns
            rate = group["lr"] * max(1.0, outputs_an_input) ** 0.5
            for (parameter, _), direction in zip(alike, directions, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(placed_like(direction.to(parameter.dtype), parameter), alpha=-rate)

    def _adamw_step(self, group: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
        parameters = [parameter for parameter, _ in pairs]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in parameters]
        adamw(
            parameters,
            [gradient for _, gradient in pairs],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move all singular values of each matrix to about 1 (0.7 to 1.2) by five Newton-Schulz steps.

    Args:
        matrices: (N, R, C).

    Returns:
        (N, R, C), bfloat16 on GPUs, float32 on CPUs.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero for five steps (Jordan et al. 2024)
    x = matrices.float() if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def decay_of_matrices(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights that are matrices or convolutions decay; embeddings, norms and biases do not."""
    decays = [
        name.endswith("weight") and weight.ndim >= 2 and "embedding" not in name
        for name, weight in model.named_parameters()
    ]
    pairs = list(zip(model.parameters(), decays, strict=True))
    return [
        {"params": [weight for weight, decay in pairs if decay], "weight_decay": weight_decay},
        {"params": [weight for weight, decay in pairs if not decay], "weight_decay": 0.0},
    ]


def state_bytes_per_parameter(optimizer: torch.optim.Optimizer) -> float:
    """Bytes that AdamW, LAMB, SGD or `MuonWithAdamW` keep in float32: of two moments, of one, or of none."""

    def num_moments(group: dict[str, Any]) -> int:
        if isinstance(optimizer, torch.optim.SGD):
            return int(group["momentum"] > 0)
        return 1 if group.get("use_muon") else 2

    sizes = [(num_moments(group), sum(map(torch.numel, group["params"]))) for group in optimizer.param_groups]
    return 4 * sum(moments * size for moments, size in sizes) / sum(size for _, size in sizes)


def clip_and_step(accelerator: Any, model: Any, optimizer: Any, max_grad_norm: float) -> float:
    """Clip the gradient of an update, take the step, forget the gradient, and return its norm before clipping.

    A gradient that is not finite changes nothing, on all processes alike; DeepSpeed, which steps inside the backward
    pass, finds that by itself.

    Args:
        accelerator: knows the engine.
        model: prepared.
        optimizer: prepared.
        max_grad_norm: norm to which the gradient is clipped; 0 = no clipping.
    """
    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf))
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times the rate it was built with, which the group keeps as `initial_lr`.

    Call it before the backward pass: DeepSpeed steps inside it.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
