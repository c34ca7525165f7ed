"""What every optimizer here needs: what decays, clipping and the step, rates, and the bytes of its state."""

import math
from typing import Any

import torch


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


def split_weights(
    model: torch.nn.Module, head: torch.Tensor
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """What is trained of a language model: weights of hidden layers, tables of embeddings and the head, and vectors.

    Args:
        model: whose weights that need no gradient are left out.
        head: the weight of its output layer, which may be that of an embedding.
    """
    is_table = {id(head), *(id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding))}
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    hidden = [weight for weight in trained if weight.ndim >= 2 and id(weight) not in is_table]
    return (
        hidden,
        [weight for weight in trained if id(weight) in is_table],
        [weight for weight in trained if weight.ndim < 2],
    )


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
