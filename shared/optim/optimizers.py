"""What every optimizer here needs: what decays, clipping and the step, rates, and the bytes of its state."""

import math
from typing import Any

import torch
from torch import Tensor


def decay_of_matrices(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weights that are matrices or convolutions decay; embeddings, norms and biases do not.

    Weights that need no gradient are in neither, and a group that would be empty is left out.
    """
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    decays = [name.endswith("weight") and weight.ndim >= 2 and "embedding" not in name for name, weight in trained]
    pairs = [(weight, decay) for (_, weight), decay in zip(trained, decays, strict=True)]
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight, decay in pairs if decay], "weight_decay": weight_decay},
        {"params": [weight for weight, decay in pairs if not decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def split_weights(
    model: torch.nn.Module, head: Tensor
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


def clip_and_step(accelerator: Any, model: Any, optimizer: Any, max_grad_norm: float) -> Tensor:
    """Clip the gradient of an update, take the step, forget the gradient, and return its norm before clipping.

    A gradient that is not finite changes nothing, on all processes alike. The device decides that, so the host does not
    wait for it; DeepSpeed, which steps inside the backward pass, finds it by itself.

    Args:
        accelerator: knows the engine.
        model: prepared.
        optimizer: prepared; see `step_if_finite`.
        max_grad_norm: norm to which the gradient is clipped; 0 = no clipping.

    Returns:
        The norm as a scalar on the device; reading it there waits for the update.
    """
    norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 has a part on each process
    grad_norm = torch.as_tensor(whole, device=accelerator.device)
    if accelerator.distributed_type != "DEEPSPEED":  # which has stepped
        step_if_finite(optimizer, grad_norm)
        optimizer.zero_grad()
    return grad_norm


def step_if_finite(optimizer: Any, grad_norm: Tensor) -> None:
    """Take the step where the norm is finite, else change neither weights nor state.

    Args:
        optimizer: prepared, or not. Torch's fused ones, `MuonWithAdamW` and `Lamb` read `found_inf` on the device; for
            any other the host waits.
        grad_norm: scalar, on the device of the weights.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, torch.optim.SGD):
        _begin_momentum(inner)
    if getattr(optimizer, "scaler", None):  # of float16, which has looked at the gradient and skips by itself
        optimizer.step()
    elif getattr(inner, "_step_supports_amp_scaling", False):  # by which torch's GradScaler tells them too
        inner.found_inf = (~grad_norm.isfinite()).to(torch.float32)
        optimizer.step()
        del inner.found_inf
    elif grad_norm.isfinite():
        optimizer.step()


def replace(old: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    """Write `new` into `old`, but where an update is not to change anything.

    Args:
        old: weights or state.
        new: of the same shape.
        found_inf: scalar, above zero where the update's gradient is not finite; None = it is not known, write.
    """
    old.copy_(new if found_inf is None else torch.where(found_inf > 0, old, new))


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Let momentum begin at zero: torch's fused SGD would leave it unwritten where its first step changes nothing."""
    for group in optimizer.param_groups:
        for weight in group["params"] if group["momentum"] else ():
            if weight.grad is not None and "momentum_buffer" not in optimizer.state[weight]:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times the rate it was built with, which the group keeps as `initial_lr`.

    Call it before the backward pass: DeepSpeed steps inside it.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
