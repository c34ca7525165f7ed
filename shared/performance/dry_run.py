"""What a run would cost, found without running it: memory of one device, size of a checkpoint, time of an update.

with without_memory():
    model = build_model(...)
    sizes = costs(accelerator, model, {"input_ids": rows, "labels": rows}, optimizer_bytes_per_parameter=8)
"""

import math
import time
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shared.fields import RunControl
from shared.performance.flops import peak
from shared.runtime import precision
from shared.runtime.collectives import count_of


def without_memory() -> FakeTensorMode:
    """A context in which tensors have shapes, types and devices, and no data.

    A model of any size is built and run in it within seconds. What reads a tensor's values fails there, such as
    `tensor.item()` or picking elements by a boolean mask; transformers' models take their masked path there (a dense
    mask, as for packed documents) because they cannot look whether a mask is needed.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


class SavedForBackward:
    """Context that adds up what autograd keeps from the forward pass for the backward pass, without the weights.

    Each storage counts once, however many views of it are kept. The kernels are those of the tensors' device, and so is
    the count: a CPU's attention with dropout keeps the attention weights, a GPU's does not. Use autocast and gradient
    checkpointing as the run will; what checkpointing computes anew, one block at a time, is not in the sum.

    Args:
        model: its parameters and buffers are not activations.

    Attributes:
        num_bytes: the sum in bytes, known after the block.
    """

    def __init__(self, model: nn.Module) -> None:
        self.num_bytes = 0
        self._weights = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, torch.UntypedStorage] = {}  # held, or a freed one's address would come again
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        self.num_bytes = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()

    def _keep(self, tensor: Tensor) -> Tensor:
        if _address(tensor) not in self._weights:
            self._storages[_address(tensor)] = tensor.untyped_storage()
        return tensor


def memory_per_device(
    model: nn.Module,
    *,
    activations: int,
    optimizer_bytes_per_parameter: float,
    weights_shared_by: int = 1,
    gradients_shared_by: int = 1,
    optimizer_shared_by: int = 1,
) -> dict[str, int]:
    """Bytes that training holds on one device.

    With n processes the three shares are 1, 1, 1 under DDP; 1, 1, n under ZeRO-1; 1, n, n under ZeRO-2; n, n, n under
    ZeRO-3 and FSDP2. Not counted: frozen networks beside the model, short-lived intermediates, buffers for
    communication, layers that a sharding engine has gathered for a moment, a second momentum that DeepSpeed's Muon has
    in ZeRO-1 and ZeRO-2, and the allocator's waste.

    Args:
        model: on any device, also meta or `without_memory`; not sharded yet.
        activations: bytes of one process's micro-batch, see `SavedForBackward`.
        optimizer_bytes_per_parameter: of the optimizer's state, for each trained parameter: AdamW 8, Muon 4 in float32.
        weights_shared_by: number of processes that hold the weights between them.
        gradients_shared_by: number of processes that hold the gradients between them.
        optimizer_shared_by: number of processes that hold the optimizer's state between them.

    Returns:
        weights (buffers included), gradients, optimizer, activations: bytes, each share rounded up.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trained = sum(parameter.numel() for parameter in trained)
    return {
        "weights": _share(_num_bytes(model.parameters()), weights_shared_by) + _num_bytes(model.buffers()),
        "gradients": _share(_num_bytes(trained), gradients_shared_by),
        "optimizer": _share(int(num_trained * optimizer_bytes_per_parameter), optimizer_shared_by),
        "activations": activations,
    }


def shared_by(accelerator: Any) -> dict[str, int]:
    """How many processes hold weights, gradients and optimizer state between them, for `memory_per_device`."""
    processes, engine = accelerator.num_processes, accelerator.distributed_type.value
    stage = accelerator.state.deepspeed_plugin.zero_stage if engine == "DEEPSPEED" else 3 if engine == "FSDP" else 0
    return {
        "weights_shared_by": processes if stage >= 3 else 1,
        "gradients_shared_by": processes if stage >= 2 else 1,
        "optimizer_shared_by": processes if stage >= 1 else 1,
    }


def costs(
    accelerator: Any, model: nn.Module, inputs: dict[str, Any], optimizer_bytes_per_parameter: float
) -> dict[str, int]:
    """Bytes that training needs on one device under the engine that came up, and on disk.

    Args:
        accelerator: knows the engine and the number of processes.
        model: built `without_memory`, in which this is called.
        inputs: one process's micro-batch, targets included, as the model's `forward` takes it; of tensors only shapes
            are used.
        optimizer_bytes_per_parameter: see `memory_per_device`.

    Returns:
        The entries of `memory_per_device` and their total as "memory: ...", and "one checkpoint".
    """
    shapes = {
        name: torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    with SavedForBackward(model) as saved, precision.autocast(accelerator, "cpu"):
        model(**shapes)
    memory = memory_per_device(
        model,
        activations=saved.num_bytes,
        optimizer_bytes_per_parameter=optimizer_bytes_per_parameter,
        **shared_by(accelerator),
    )
    sizes = {f"memory: {name}": size for name, size in {**memory, "total": sum(memory.values())}.items()}
    return {**sizes, "one checkpoint": checkpoint_bytes(model, optimizer_bytes_per_parameter)}


def can_time(accelerator: Any, num_flops: float, num_bytes: int) -> bool:
    """Whether a micro-batch of `num_flops` is a matter of seconds and `num_bytes` fit into memory twice, everywhere."""
    is_slow = num_flops > 2 * peak(accelerator) or 2 * num_bytes > free_memory(accelerator.device)
    return count_of(accelerator, is_slow).read() == 0


class Seconds(NamedTuple):
    """How long it takes.

    Attributes:
        update: one with all of its micro-batches.
        forward: the forward pass of one micro-batch, as in an evaluation.
    """

    update: float
    forward: float


def time_update(
    accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: dict[str, Any]
) -> Seconds:
    """Time the second of two micro-batches with an optimizer step each, and a forward pass. Changes the model.

    Args:
        accelerator: knows the accumulation; nothing was prepared with it so far.
        model: not prepared; gives its loss, as transformers' models do where they get labels, or a tuple whose first
            tensor the loss is made of.
        optimizer: of this model.
        inputs: as in `costs`.
    """
    accumulation, accelerator.gradient_accumulation_steps = accelerator.gradient_accumulation_steps, 1
    model, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        started = time.perf_counter()
        outputs = model(**inputs)
        loss = outputs.loss if hasattr(outputs, "loss") else outputs[0].float().mean()
        accelerator.backward(loss)
        loss.item()  # waits for the device
        micro_batch_done = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        next(iter(model.parameters())).sum().item()
    accelerator.gradient_accumulation_steps = accumulation
    update_done = time.perf_counter()
    model.eval()  # DeepSpeed's gives nothing back
    with torch.no_grad():
        outputs = model(**inputs)
        (outputs.loss if hasattr(outputs, "loss") else outputs[0].float().mean()).item()
    forward = time.perf_counter() - update_done
    return Seconds(accumulation * (micro_batch_done - started) + update_done - micro_batch_done, forward)


def num_batches(accelerator: Any, numbers: Iterable[int], batch_size: int) -> int:
    """Batches that each process evaluates, of several sets of so many samples."""
    return sum(math.ceil(number / (batch_size * accelerator.num_processes)) for number in numbers)


def evaluation_rows(control: RunControl, seconds: Seconds | None, batches: float, *, is_least: bool = False) -> Any:
    """Rows of a table: what evaluations cost, of samples to look at apart.

    Args:
        control: of the run.
        seconds: see `time_update`; None = not timed.
        batches: that each process evaluates, in micro-batches as large as those that were timed.
        is_least: whether there may be more, since only the beginning of the data was read.
    """
    if seconds is None:
        return {}
    number = math.ceil(control.max_steps / control.eval_every) if control.eval_every else 1
    least = "at least " if is_least else ""
    one = seconds.forward * batches
    rows = {"one evaluation": one, f"all {number} evaluations" if number > 1 else "": one * number}
    return {name: least + human_seconds(value) for name, value in rows.items() if name}


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or on the machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def checkpoint_bytes(model: nn.Module, optimizer_bytes_per_parameter: float) -> int:
    """Bytes of one checkpoint: weights, tied ones once, and optimizer state; file headers left out.

    Args:
        model: on any device, also meta or `without_memory`.
        optimizer_bytes_per_parameter: of the optimizer's state, for each trained parameter: AdamW 8, Muon 4 in float32.
    """
    saved = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    num_trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return _num_bytes(saved.values()) + int(num_trained * optimizer_bytes_per_parameter)


def cost_rows(costs: dict[str, int], seconds: Seconds | None, max_steps: int, *, compiles: bool) -> dict[str, str]:
    """Rows of a table.

    Args:
        costs: see `costs`.
        seconds: see `time_update`; None = not timed.
        max_steps: of the run.
        compiles: whether the run's model is compiled, which the one that was timed is not.
    """
    rows = {name: human_bytes(size) for name, size in costs.items()}
    if seconds is not None:
        rows["one update"] = human_seconds(seconds.update) + (", not compiled" if compiles else "")
        rows["all updates"] = human_seconds(seconds.update * max_steps)
    return rows


def human_bytes(num_bytes: float) -> str:
    """Bytes in binary units and three digits: 1.5 GiB."""
    return _scaled(num_bytes, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def human_seconds(seconds: float) -> str:
    """A duration in its two largest units: 0.25 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    scaled = value
    for unit in units:
        if abs(scaled) < 999.5:
            return f"{scaled:.3g}{unit}"
        scaled /= base
    return f"{value:.3g}{units[0]}"


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _share(num_bytes: int, processes: int) -> int:
    return -(-num_bytes // processes)
