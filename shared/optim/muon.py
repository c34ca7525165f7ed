"""Muon for hidden matrices together with AdamW for everything else, as one `torch.optim.Optimizer`.

One object is what `accelerator.prepare` takes, what checkpoints save, and what FSDP2 can rebuild. Newton-Schulz runs
in bfloat16 on GPUs and in float32 on CPUs and GPUs before Ampere, which emulate bfloat16 slowly (`torch.optim.Muon`
always takes bfloat16).

Under FSDP2 each process has some rows of every matrix. As many matrices as there are processes are taken at a time:
each process is sent all rows of one of them, does its Newton-Schulz alone, and sends the rows back. So nobody holds
more than a few whole matrices, and no product is computed twice.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from shared.command_line import expect
from shared.optim.optimizers import replace

_STACKED_NUMBERS = 1 << 26  # of matrices that are orthogonalised together, 256 MB in float32


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) and AdamW (Loshchilov and Hutter 2019).

    Each parameter group carries `use_muon`. Groups with it hold matrices (2-D) and read `lr`, `momentum`,
    `weight_decay`, `stored_transposed` and `num_parts`; the others read `lr`, `betas`, `eps` and `weight_decay`. Weight
    decay is decoupled in both. As torch's fused optimizers do, it reads `found_inf`, see `step_if_finite`.

    Args:
        groups: parameter groups, each with "params", "lr" and "use_muon"; a Muon group whose matrices are (in, out), as
            in the library's GPT-2, and not (out, in) says "stored_transposed": True; one whose matrices are several
            with the same inputs, such as query, key and value in one, says how many: "num_parts": 3.
        momentum: Nesterov momentum of the Muon groups.
        betas: decay rates of AdamW's moments.
        eps: AdamW's epsilon.
        weight_decay: for groups that do not bring their own.

    Raises:
        ValueError: a Muon group holds a parameter that is not a matrix.
    """

    found_inf: Tensor | None = None
    _step_supports_amp_scaling = True  # so torch's GradScaler, after `unscale_`, gives `found_inf` and does not read it

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        weight_decay: float = 0.0,
    ) -> None:
        of_muon = {"use_muon": False, "momentum": momentum, "stored_transposed": False, "num_parts": 1}
        # fused: torch then puts AdamW's step counters back on the device when a state is loaded.
        of_adamw = {"betas": betas, "eps": eps, "fused": True}
        super().__init__(groups, {**of_muon, **of_adamw, "weight_decay": weight_decay})
        for group in self.param_groups:
            if group["use_muon"] and any(parameter.ndim != 2 for parameter in group["params"]):
                raise ValueError("Muon groups take matrices only; give the rest to an AdamW group")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is taken
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
            average = state["momentum_buffer"].lerp(gradient, 1 - group["momentum"])
            nesterov = gradient.lerp(average, group["momentum"])
            replace(state["momentum_buffer"], average, self.found_inf)
            updates.setdefault(tuple(parameter.shape), []).append((parameter, nesterov))
        along_outputs = 1 if group["stored_transposed"] else 0
        for shape, alike in updates.items():
            outputs_an_input = shape[along_outputs] / group["num_parts"] / shape[1 - along_outputs]
            # A wide or tall matrix moves by the same root-mean-square per entry of its output (Jordan et al. 2024).
            rate = group["lr"] * max(1.0, outputs_an_input) ** 0.5
            directions = _directions([nesterov for _, nesterov in alike], group["num_parts"], along_outputs)
            for (parameter, _), direction in zip(alike, directions, strict=True):
                decayed = parameter * (1 - group["lr"] * group["weight_decay"])
                replace(parameter, decayed.add_(direction.to(parameter.dtype), alpha=-rate), self.found_inf)

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
            found_inf=self.found_inf,
        )


def for_engine(accelerator: Any, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What `accelerator.prepare` takes: under DeepSpeed its own Muon instead of `MuonWithAdamW`, else the same object.

    ZeRO flattens weights, and matrices are whole for what DeepSpeed itself calls alone. Its steps are those of
    `MuonWithAdamW`, but the norm that it clips and reports is of Muon's update, not of its gradient, so use it without
    clipping.

    Args:
        accelerator: knows the engine.
        optimizer: any; nothing has used it yet.

    Raises:
        UsageError: DeepSpeed's knows neither `stored_transposed` nor `num_parts`.
    """
    if accelerator.distributed_type != "DEEPSPEED" or not isinstance(optimizer, MuonWithAdamW):
        return optimizer
    is_plain = all(not group["stored_transposed"] and group["num_parts"] == 1 for group in optimizer.param_groups)
    expect(
        is_plain, "optimizer", "muon", "adamw under DeepSpeed, whose Muon takes matrices as (out, in) and one by one"
    )
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if zero["stage"] == 3:  # which refuses Muon otherwise
        zero["reduce_scatter"] = False
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]  # by which ZeRO tells matrices to orthogonalise
        names = ("momentum",) if group["use_muon"] else ("betas", "eps")
        names = ("params", "use_muon", "lr", "weight_decay", *names)
        groups.append({name: group[name] for name in names})
        if group["use_muon"]:
            groups[-1]["ns_method"] = "standard"  # Jordan's five steps, as here
    return MuonWithAuxAdam(groups)


def _directions(matrices: Sequence[Any], num_parts: int, along_outputs: int) -> Iterator[Tensor]:
    """Each of some matrices of one shape (R, C) orthogonalised in `num_parts` parts, sharded as it is."""
    if hasattr(matrices[0], "full_tensor"):
        yield from _sharded_directions(matrices, num_parts, along_outputs)
        return
    number = max(1, _STACKED_NUMBERS // matrices[0].numel())
    for first in range(0, len(matrices), number):
        yield from _orthogonalize_parts(torch.stack(list(matrices[first : first + number])), num_parts, along_outputs)


def _sharded_directions(matrices: Sequence[Any], num_parts: int, along_outputs: int) -> Iterator[Tensor]:
    """The same for matrices of which each process has rows, as FSDP2 deals them (`torch.distributed.fsdp`).

    Raises:
        ValueError: they are cut in another way.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard  # half a second, for sharded parameters only

    mesh, placements = matrices[0].device_mesh, matrices[0].placements
    *others, of_rows = placements
    if of_rows != Shard(0) or any(placement != Replicate() for placement in others):
        raise ValueError(f"Muon takes matrices that are whole or cut by rows, got {placements}")
    group, processes, rank = mesh.get_group(mesh.ndim - 1), mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    shape = matrices[0].shape
    rows, columns = shape
    most = -(-rows // processes)  # rows of a process; the last ones have fewer, or none
    for first in range(0, len(matrices), processes):
        mine = [matrix.to_local() for matrix in matrices[first : first + processes]]
        sent = mine[0].new_zeros(len(mine), most, columns, dtype=_type_of_products(mine[0]))
        for place, local in enumerate(mine):
            sent[place, : len(local)] = local
        block = most * columns
        shares = [block if process < len(mine) else 0 for process in range(processes)]  # of what each process is sent
        received = sent.new_empty(processes * shares[rank])
        back = [len(received) // processes] * processes
        dist.all_to_all_single(received, sent.flatten(), back, shares, group=group)
        if len(received):
            whole = received.view(1, processes * most, columns)[:, :rows]
            received.view(processes * most, columns)[:rows] = _orthogonalize_parts(whole, num_parts, along_outputs)[0]
        dist.all_to_all_single(sent.view(-1), received, shares, back, group=group)
        for local, direction in zip(mine, sent, strict=True):
            shard = direction[: len(local)]
            yield DTensor.from_local(shard, mesh, placements, shape=shape, stride=(columns, 1))


def _orthogonalize_parts(matrices: Tensor, num_parts: int, along_outputs: int) -> Tensor:
    """`orthogonalize` of (N, R, C), each matrix in parts of as many outputs."""
    if num_parts == 1:
        return orthogonalize(matrices)
    parts = matrices.unflatten(1 + along_outputs, (num_parts, -1)).movedim(1 + along_outputs, 0)
    directions = orthogonalize(parts.flatten(0, 1)).unflatten(0, (num_parts, -1))
    return directions.movedim(0, 1 + along_outputs).flatten(1 + along_outputs, 2 + along_outputs)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Move all singular values of each matrix to about 1 (0.7 to 1.2) by five Newton-Schulz steps.

    Args:
        matrices: (N, R, C).

    Returns:
        (N, R, C) in the type of `_type_of_products`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero for five steps (Jordan et al. 2024)
    x = matrices.to(_type_of_products(matrices))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _type_of_products(matrices: Tensor) -> torch.dtype:
    """Bfloat16, float32 where that is emulated: on CPUs, and on GPUs before Ampere."""
    kind = matrices.device.type
    is_emulated = kind == "cpu" or (kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.float32 if is_emulated else torch.bfloat16
