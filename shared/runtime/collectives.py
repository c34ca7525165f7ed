"""What processes do together: take turns, agree, gather, raise; every process calls each of these."""

import contextlib
import itertools
import math
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shared.command_line import UsageError
from shared.runtime.late_number import LateNumber

_turns = itertools.count()  # of this program, which all processes go through alike
_PROBLEM = "problem"
_SIGN_SECONDS, _DEAD_AFTER_SECONDS = 30.0, 600.0
_INFORMED_WITHIN_SECONDS = 5.0  # which those do not need that are in the block still
SHARDED_ENGINES = ("DEEPSPEED", "FSDP")  # whose checkpoints and weights are in parts, as accelerate calls them


@contextlib.contextmanager
def node_main_first(accelerator: Any) -> Iterator[bool]:
    """Run the block on one process of each node first, however long it takes, then on the others; all end it together.

    For what each node builds or finds on its own disk. Processes wait by looking into the store through which they met:
    collectives would time out while a large corpus is tokenised, and their connections, each with each, are many.

    Yields:
        Whether this process is one of those that go first.

    Raises:
        UsageError: that of the block, also where another process raised it; or another process ended meanwhile.
    """
    first = accelerator.is_local_main_process
    if accelerator.num_processes == 1:
        yield first
        return
    rank, main_of_node = accelerator.process_index, accelerator.process_index - accelerator.local_process_index
    store = dist.PrefixStore(f"turn {next(_turns)}", dist.distributed_c10d._get_default_store())
    everyone = range(accelerator.num_processes)
    with _sign_of_life(store, rank), _all_informed(store, accelerator):
        if not first:
            _wait_for(store, [main_of_node], watched=[])
        yield first
        store.set(f"done {rank}", "")
        _wait_for(store, everyone, watched=everyone if accelerator.is_main_process else [])


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


def count_of(accelerator: Any, flag: bool) -> LateNumber:
    """On how many processes `flag` is true, without a wait for it. Every process calls this."""
    mine = torch.full((1,), float(flag), device=accelerator.device)  # torch.tensor would wait for a device
    return LateNumber(accelerator.reduce(mine, "sum"))


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
    """Refuse an output folder in which a run cannot write as it must, or that not all nodes see.

    Raises:
        UsageError: naming the folder, and what its file system lacks.
    """
    probe = folder / ".probe"
    problem = _what_lacks(folder, probe) if accelerator.is_main_process else ""
    problem = gather_objects(accelerator, problem)[0]
    seen = gather_objects(accelerator, _appears(probe)) if not problem else []
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(probe, ignore_errors=True)
    if problem or not all(seen):
        raise UsageError(f"output_dir: {str(folder)!r}: {problem or 'expected a folder that every node sees'}")


def _what_lacks(folder: Path, probe: Path) -> str:
    """What a run does with files and folders that cannot be done here, in words; "" = nothing, and `probe` is there."""
    aside = probe.with_name(".probe_aside")
    first, second = aside / "first", aside / "second"
    wanted = "a folder that can be written"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in (probe, aside):
            if left_over.is_dir():
                shutil.rmtree(left_over)
        aside.mkdir()
        first.write_text("1")
        wanted = "a file system that appends to files"
        with first.open("a") as file:
            file.write("2")
        wanted = "a file system that replaces a file by another"
        second.write_text("3")
        second.replace(first)
        wanted = "a file system that renames folders"
        aside.rename(probe)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        return f"expected {wanted}, got {error.strerror}"
    return ""


def _wait_for(store: Any, ranks: Sequence[int], watched: Sequence[int]) -> None:
    """Return once these processes are done; raise what one of them raised, or that one of the watched died."""
    seen: dict[int, tuple[bytes, float]] = {}  # of each process its newest sign of life, and when it was new here
    pause, look_at = 0.01, time.monotonic() + _SIGN_SECONDS
    try:
        while not store.check([f"done {rank}" for rank in ranks]):
            if store.check([_PROBLEM]):
                raise UsageError(store.get(_PROBLEM).decode())
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
            if time.monotonic() < look_at:
                continue
            look_at = time.monotonic() + _SIGN_SECONDS
            for rank in watched:
                if _is_silent(store, rank, seen):
                    store.set(_PROBLEM, f"process {rank} gave no sign of life for {_DEAD_AFTER_SECONDS:.0f} s")
    except RuntimeError as error:  # the process that holds the store is gone
        raise UsageError("another process ended, its message says why") from error


def _is_silent(store: Any, rank: int, seen: dict[int, tuple[bytes, float]]) -> bool:
    """Whether a process that is not done has given no new sign of life for long; `seen` is kept up to date."""
    if store.check([f"done {rank}"]) or not store.check([f"alive {rank}"]):
        return False
    sign = store.get(f"alive {rank}")
    if rank not in seen or seen[rank][0] != sign:
        seen[rank] = sign, time.monotonic()
    return time.monotonic() - seen[rank][1] > _DEAD_AFTER_SECONDS


@contextlib.contextmanager
def _sign_of_life(store: Any, rank: int) -> Iterator[None]:
    """Let the others know during the block that this process lives."""
    is_over = threading.Event()

    def tell() -> None:
        number = 0
        with contextlib.suppress(RuntimeError):  # the process that holds the store is gone
            while not is_over.wait(_SIGN_SECONDS if number else 0):
                store.set(f"alive {rank}", str(number))
                number += 1

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=1.0)  # a network that is gone would hold it


@contextlib.contextmanager
def _all_informed(store: Any, accelerator: Any) -> Iterator[None]:
    """Tell the others what goes wrong in the block, and let all know how it ended: the store ends with a process."""
    try:
        yield
    except BaseException as error:
        about = str(error) if isinstance(error, UsageError) else f"a process ended: {type(error).__name__}"
        with contextlib.suppress(RuntimeError):
            store.set(_PROBLEM, about)
        raise
    finally:
        deadline = time.monotonic() + _INFORMED_WITHIN_SECONDS
        with contextlib.suppress(RuntimeError):
            store.add("informed", 1)
            while store.add("informed", 0) < accelerator.num_processes and time.monotonic() < deadline:
                time.sleep(0.02)


def _appears(path: Path, seconds: float = 60) -> bool:
    """Whether `path` is there, or comes: a network file system may remember for a while that it was not."""
    deadline = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(1)
    return path.exists()
