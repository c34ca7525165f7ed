"""Start-up: one `Accelerator` that is what the launcher asked for, or one clear message.

What goes wrong on CPUs is mended here: `accelerate launch` leaves one thread a process, a multi-GPU configuration
without GPUs starts processes that each believe they are alone, DeepSpeed wants NCCL, and freed memory goes back to the
system at every update. With bfloat16, FSDP2 and DeepSpeed would also add gradients up in bfloat16, so that more
micro-batches or GPUs would mean less exact ones, and DeepSpeed would keep weights in it; here both are float32, as
under DDP.
"""

import ctypes
import datetime
import os
import signal
import sys
from typing import Any

import torch

from shared.command_line import UsageError, expect
from shared.runtime.cache_folder import keep_caches_where_they_can_be_written
from shared.runtime.precision import TYPES


def start_accelerator(timeout_minutes: float, report_to: str, logging_dir: str, deterministic: bool) -> Any:
    """Make the `Accelerator` and check that processes, engine and precision are what the launcher asked for.

    Gradient accumulation is set later, by `set_accumulation`, once the number of processes is known.

    Raises:
        UsageError: what came up differs from what was asked for, or cannot train.
    """
    from accelerate import Accelerator
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        GradientAccumulationPlugin,
        InitProcessGroupKwargs,
        ProjectConfiguration,
    )

    keep_caches_where_they_can_be_written()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    field = "accelerate config: mixed_precision"
    expect(precision in TYPES, field, precision, "no, bf16 or fp16")
    on_cpu = not _has_accelerator()
    uses_deepspeed = _asked("ACCELERATE_USE_DEEPSPEED")
    if precision == "fp16":
        expect(not on_cpu, field, precision, "a GPU, none was found")
        is_sharded = uses_deepspeed or _asked("ACCELERATE_USE_FSDP")
        expect(not is_sharded, field, precision, "bf16 or no under DeepSpeed and FSDP2, fp16 is for one GPU and DDP")
    if on_cpu and precision == "bf16" and not (uses_deepspeed or _asked("ACCELERATE_USE_CPU")):
        raise UsageError(
            "accelerate config: mixed_precision: 'bf16': expected a GPU, none was found; for bf16 on a CPU give "
            "accelerate launch --cpu, else use accelerate_configs/cpu.yaml"
        )
    world_size, local_processes = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if on_cpu:
        torch.set_num_threads(cores_of_process())
        _keep_freed_memory()
        if uses_deepspeed:
            os.environ["DS_ACCELERATOR"] = "cpu"
        elif world_size > 1:
            os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        _check_gpus(local_processes, precision)
    trackers = [name.strip() for name in report_to.split(",") if name.strip()]
    available = [tracker.value for tracker in get_available_trackers()]
    for name in trackers:
        expect(name in available, "report_to", name, f"a tracker that is installed: {', '.join(available)}")
    process_group = InitProcessGroupKwargs(
        backend="gloo" if on_cpu and uses_deepspeed else None, timeout=datetime.timedelta(minutes=timeout_minutes)
    )
    accelerator = Accelerator(
        # Without this, each epoch's end would force a short, unaccumulated update.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        fsdp_plugin=_fsdp_plugin(precision),
        # Buffers are the recipe's to keep equal: DDP would send the first process's with every forward pass. Gradients
        # as views of what is sent are not kept twice.
        kwargs_handlers=[
            process_group,
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
        log_with=trackers or None,
        project_config=ProjectConfiguration(logging_dir=logging_dir),
    )
    _check_launch(accelerator, world_size, precision)
    torch.backends.cudnn.benchmark = not deterministic  # the fastest convolutions, searched once for each shape
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return accelerator


def set_accumulation(accelerator: Any, global_batch_size: int, per_device_batch_size: int) -> int:
    """Derive gradient accumulation from the global batch, so that hardware never changes the mathematics.

    Args:
        accelerator: before `prepare`.
        global_batch_size: samples of one update, over all processes and micro-batches.
        per_device_batch_size: samples of one micro-batch on one process; 0 = the process's whole share.

    Returns:
        Samples of one micro-batch on one process.

    Raises:
        UsageError: the batch does not divide.
    """
    processes = accelerator.num_processes
    if global_batch_size % processes:
        raise UsageError(f"global_batch_size: {global_batch_size}: expected a multiple of the {processes} processes")
    share = global_batch_size // processes
    micro_batch_size = per_device_batch_size or share
    if share % micro_batch_size:
        raise UsageError(
            f"global_batch_size: {global_batch_size}: expected a multiple of per_device_batch_size x processes = "
            f"{micro_batch_size} x {processes} = {micro_batch_size * processes}"
        )
    accelerator.gradient_accumulation_steps = share // micro_batch_size
    return micro_batch_size


def set_deepspeed_values(accelerator: Any, micro_batch_size: int, max_grad_norm: float) -> None:
    """Give DeepSpeed the recipe's batch, accumulation and clipping; "auto" would become others. No-op elsewhere.

    With stage 3 transformers would also shard a model while it loads it, before anybody has seen it whole. That is
    ended, so call this before a model is built.

    Raises:
        UsageError: the accelerate config fixes a value that the recipe owns.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    from transformers.integrations import unset_hf_deepspeed_config

    config, accumulation = plugin.deepspeed_config, accelerator.gradient_accumulation_steps
    values = {
        "train_batch_size": micro_batch_size * accumulation * accelerator.num_processes,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_grad_norm,
    }
    for key, value in values.items():
        fixed = config.get(key, "auto")
        is_default = key == "gradient_accumulation_steps" and fixed == 1  # of accelerate, for a file that leaves it out
        if fixed not in ("auto", value) and not is_default:
            raise UsageError(f"accelerate config: {key}: {fixed!r}: expected auto, the recipe sets it to {value}")
        config[key] = value
    unset_hf_deepspeed_config()
    # With state in CPU memory it would take no optimizer but its own, which it compiles.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    if accelerator.mixed_precision == "bf16":
        # Left alone, weights become bfloat16, and averages of them cannot move by a small share of what they are. With
        # no "safe" modules, gradients travel in float32.
        config["bf16"] = {"enabled": False}
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        config.setdefault("communication_data_type", "fp32")
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")


def follow_launcher() -> None:
    """Ask Linux for a SIGTERM when the launcher dies; otherwise training goes on as an orphan that nobody can stop.

    With one process `accelerate launch` does not pass SIGTERM on (accelerate#929).
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _check_gpus(local_processes: int, precision: str) -> None:
    """Refuse more processes than GPUs, which would share some, and bfloat16 where it is emulated, which is slow."""
    number = torch.accelerator.device_count()
    is_given = number == 1 and "CUDA_VISIBLE_DEVICES" in os.environ  # each process may see a GPU of its own
    field, expected = "accelerate config: num_processes", f"at most the {number} GPUs of a node, see --num_processes"
    expect(local_processes <= number or is_given, field, local_processes, expected)
    if precision == "bf16" and torch.cuda.is_available():
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
        expected = f"fp16 or no, since {torch.cuda.get_device_name()} has no bfloat16 and would emulate it"
        expect(multiplies, "accelerate config: mixed_precision", precision, expected)


def _keep_freed_memory() -> None:
    """Make glibc keep what tensors free, for the next ones.

    By default it gives large blocks back to the system at once, and each update then waits for the system to hand the
    same pages out again, zeroed, which for a small model is a good part of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def _has_accelerator() -> bool:
    return torch.accelerator.is_available() and not _asked("ACCELERATE_USE_CPU")


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def _fsdp_plugin(precision: str) -> Any:
    """What accelerate would make, but adding gradients up in float32; None = leave it to accelerate."""
    if not _asked("ACCELERATE_USE_FSDP"):
        return None
    if (version := os.environ.get("FSDP_VERSION")) != "2":
        raise UsageError(f"accelerate config: fsdp_version: {version}: expected 2, which keeps each matrix whole")
    if precision != "bf16":
        return None
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def _check_launch(accelerator: Any, world_size: int, precision: str) -> None:
    if world_size != accelerator.num_processes:
        raise UsageError(
            f"accelerate config: the launcher started {world_size} processes, but {accelerator.num_processes} found "
            "each other"
        )
    engine = accelerator.distributed_type.value
    for variable, name, wanted in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", "DEEPSPEED"),
        ("ACCELERATE_USE_FSDP", "FSDP", "FSDP"),
    ):
        if _asked(variable) and engine != wanted:
            raise UsageError(f"accelerate config: {name} was asked for, but {engine} came up: it needs GPUs here")
    if precision not in ("no", accelerator.mixed_precision):  # "no" where a DeepSpeed file says it
        raise UsageError(f"accelerate config: precision {precision} was asked for, got {accelerator.mixed_precision}")


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_process() -> int:
    """This process's share of them, at least 1, where the launcher started several on the machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
