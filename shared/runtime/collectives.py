"""What processes do together: take turns, agree, gather, raise; every process calls each of these."""

import contextlib
import datetime
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shared.command_line import UsageError

SHARDED_ENGINES = ("DEEPSPEED", "FSDP")  # whose checkpoints and weights are in parts, as accelerate calls them


@contextlib.contextmanager
def node_main_first(accelerator: Any) -> Iterator[bool]:
    """Run the block on one process of each node first, however long it takes, then on the others.

    For what each node builds or finds on its own disk. Waiting goes through a group with a time-out of a week,
    since the training group's would end the run while a large corpus is tokenised.

    Yields:
        Whether this process is the one that goes first.

    Raises:
        UsageError: another process ended meanwhile; where that one gave a message, no traceback comes after it.
    """
    first = accelerator.is_local_main_process
    if accelerator.num_processes == 1:
        yield first
        return
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    if not first:
        _wait(group)
    yield first
    if first:
        _wait(group)


@contextlib.contextmanager
def raise_together(accelerator: Any) -> Iterator[None]:
    """Raise a `UsageError` of the block on every process; one that ended alone would leave the others in a traceback.

    Every process enters this, also where the block does something on the main process only.
    """
    problem = None
    try:
        yield
    except UsageError as error:
        problem = error
    problem = next(filter(None, gather_objects(accelerator, problem)), None)
    if problem:
        raise problem


def on_any_process(accelerator: Any, flag: bool) -> bool:
    """Whether `flag` is true on at least one process. Every process calls this."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor([int(flag)], device=accelerator.device), "sum").item())


def gather_objects(accelerator: Any, value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks."""
    if accelerator.num_processes == 1:
        return [value]
    values: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(values, value)
    return values


def rank_of(accelerator: Any) -> dict[str, int]:
    """Which process this is, as what gives each its share takes it: rank and num_processes."""
    return {"rank": accelerator.process_index, "num_processes": accelerator.num_processes}


def equal_share(accelerator: Any, number: int) -> range:
    """This process's share of the integers below `number`, as many as every other's, for all must run equally often.

    The last one of a process can be `number` or more.
    """
    processes = accelerator.num_processes
    return range(accelerator.process_index, math.ceil(number / processes) * processes, processes)


def placed_like(whole: torch.Tensor, parameter: Any) -> torch.Tensor:
    """`whole` sharded as `parameter` is; every process holds the same `whole`, so nothing is sent."""
    if not hasattr(parameter, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor  # half a second, for sharded parameters only

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def check_shared_folder(accelerator: Any, folder: Path) -> None:
    """Refuse an output folder that cannot be written, or that not all nodes see.

    Raises:
        UsageError: naming the folder.
    """
    probe = folder / ".probe"
    problem = ""
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
        except OSError as error:
            problem = f"expected a folder that can be written, got {error.strerror}"
    problem = gather_objects(accelerator, problem)[0]
    seen = gather_objects(accelerator, _appears(probe)) if not problem else []
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not problem:
        probe.unlink()
    if problem or not all(seen):
        raise UsageError(f"output_dir: {str(folder)!r}: {problem or 'expected a folder that every node sees'}")


def _wait(group: Any) -> None:
    try:
        dist.barrier(group)
    except RuntimeError as error:  # a lost connection
        raise UsageError("another process ended, its message says why") from error


def _appears(path: Path, seconds: float = 60) -> bool:
    """Whether `path` is there, or comes: a network file system may remember for a while that it was not."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1)
    return path.exists()
