"""Floating-point operations: how many a training step needs, and how many a device could do."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shared.runtime.precision import type_of_products

# Dense TFLOP/s of NVIDIA's data sheets (not the doubled figures for sparse matrices). 0 = not in hardware.
_DATA_SHEETS = (
    # torch's name of the card, bfloat16, float16, TF32, float32
    (r"NVIDIA B200", 2250, 2250, 1125, 75),
    (r"NVIDIA (H100 80GB HBM3|H200|GH200 .*)", 989, 989, 494, 67),
    (r"NVIDIA H100 NVL", 835, 835, 417, 60),
    (r"NVIDIA H100 PCIe", 756, 756, 378, 51),
    (r"(NVIDIA )?A100\S*( 80GB PCIe)?", 312, 312, 156, 19.5),
    (r"NVIDIA A40", 149.7, 149.7, 74.8, 37.4),
    (r"NVIDIA A30", 165, 165, 82, 10.3),
    (r"NVIDIA A10", 125, 125, 62.5, 31.2),
    (r"NVIDIA L40S", 362, 362, 183, 91.6),
    (r"NVIDIA L4", 121, 121, 60, 30.3),
    (r"NVIDIA RTX A6000", 154.8, 154.8, 77.4, 38.7),
    (r"NVIDIA GeForce RTX 5090", 209.5, 209.5, 104.8, 104.8),
    (r"NVIDIA GeForce RTX 4090", 165, 165, 82.6, 82.6),
    (r"NVIDIA GeForce RTX 3090", 71, 71, 35.6, 35.6),
    (r"(Tesla )?V100-SXM\S*", 0, 125, 0, 15.7),
    (r"(Tesla )?V100-PCIE\S*", 0, 112, 0, 14),
    (r"(Tesla |NVIDIA )?T4", 0, 65, 0, 8.1),
)


def training_flops(model: nn.Module, inputs: dict[str, Any]) -> float:
    """Floating-point operations of one forward and backward pass, as model FLOPs utilisation counts them.

    Three times those of the forward pass. A multiply-add is two operations, only matrix products and convolutions
    count, attention counts in full although a causal mask leaves half of it out (PaLM, Chowdhery et al. 2022,
    appendix B), and what gradient checkpointing computes twice counts once. All weights count as trained.

    Nothing is computed and nothing allocated: the model runs on tensors that have shapes and no data, so it may be on
    any device, huge, or built on the meta device. Its weights, buffers and mode stay as they are. A transformers model
    runs with sdpa here if its own attention is a kernel whose operations cannot be counted.

    Args:
        model: before `torch.compile` and `accelerator.prepare`.
        inputs: keyword arguments of its `forward`; of tensors only shapes and types are used.

    Raises:
        RuntimeError: shapes or branches inside `forward` depend on the values of a tensor.
    """
    # sdpa's own kernel for CPUs is one that the counter does not know; MATH is two plain matrix products.
    kernel = sdpa_kernel(SDPBackend.MATH)
    with FakeTensorMode(allow_non_fake_inputs=True), kernel, _attention_by_sdpa(model), torch.no_grad():
        tensors = (*model.named_parameters(), *model.named_buffers())
        state = {name: _shaped_like(tensor) for name, tensor in tensors}
        arguments = {
            name: _shaped_like(value) if isinstance(value, Tensor) else value for name, value in inputs.items()
        }
        with FlopCounterMode(display=False) as counter:
            functional_call(model, state, (), arguments)
    return 3.0 * counter.get_total_flops()


def _shaped_like(tensor: Tensor) -> Tensor:
    """An empty tensor; floats are bfloat16, the only type for which torch knows the shape of products of experts."""
    return torch.empty(tensor.shape, dtype=torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)


@contextlib.contextmanager
def _attention_by_sdpa(model: Any) -> Iterator[None]:
    given = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if given in (None, "eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(given)


def peak_flops(device: torch.device | str, dtype: torch.dtype, of_convolutions: bool = False) -> float:
    """Peak dense FLOP/s of one device for matrix products in `dtype`.

    For known NVIDIA cards it is the data sheet's number; for float32 that of TF32 where PyTorch is set to use it, which
    it is by default for convolutions. For
    anything else (CPUs, MPS, other cards, slices of a card) it is measured by square matrix products for about 0.3
    seconds, on a CPU with the present number of threads. Utilisation is then relative to what PyTorch's own matrix
    product reaches here, not to what the hardware could do.
    """
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return _data_sheet_peak(name, dtype, of_convolutions) or _measured_peak(device, dtype)


def peak(accelerator: Any) -> float:
    """Peak FLOP/s of one process's device in the precision of the run, see `peak_flops`.

    Before a model is prepared it is that of matrix products; later that of convolutions, if they have most weights.
    """
    modules = [module for model in accelerator._models for module in model.modules()]
    of_convolutions = sum(module.weight.numel() for module in modules if isinstance(module, nn.Conv2d))
    total = sum(parameter.numel() for model in accelerator._models for parameter in model.parameters())
    return peak_flops(accelerator.device, type_of_products(accelerator), 2 * of_convolutions > total)


def _data_sheet_peak(name: str, dtype: torch.dtype, of_convolutions: bool = False) -> float:
    """Peak FLOP/s of the card that torch calls `name`, or 0.0."""
    for pattern, bfloat16, float16, tf32, float32 in _DATA_SHEETS:
        if re.fullmatch(pattern, name):
            backends: Any = torch.backends
            setting = backends.cudnn.conv if of_convolutions else backends.cuda.matmul
            uses_tf32 = tf32 and setting.fp32_precision == "tf32"
            peaks = {torch.bfloat16: bfloat16, torch.float16: float16, torch.float32: tf32 if uses_tf32 else float32}
            return peaks.get(dtype, 0) * 1e12
    return 0.0


def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    best, size = 0.0, 256
    _seconds_of_product(size, device, dtype)  # the first one loads libraries
    deadline = time.perf_counter() + 0.3
    while time.perf_counter() < deadline:
        seconds = _seconds_of_product(size, device, dtype)
        best = max(best, 2 * size**3 / seconds)
        if seconds < 0.02 and size < 8192:
            size *= 2
    return best


def _seconds_of_product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    _wait_for(device)
    started = time.perf_counter()
    torch.mm(matrix, matrix)
    _wait_for(device)
    return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
