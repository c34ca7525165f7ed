"""What update t sees, for corpora that are read by index; `text.streaming` has the same for streams."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import default_convert

from shared.data.batches import micro_batches
from shared.data.sample_order import samples_of_update

_PIPED_BYTES = 1 << 19  # of an array up to which a pipe is faster than a file in shared memory and its handshakes
_NICENESS = 7  # of data workers on a CPU that trains; at 10 two cores waited 3 % of the time for data, at 7 1 %


class Samples(Protocol):
    """Anything whose samples are read by index."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> dict[str, np.ndarray]:
        """One sample, the same at every call."""


class Updates(torch.utils.data.Dataset):
    """Item `step` is what update `step` sees on this process; it depends on the order's seed and `step` alone.

    So a resumed run needs nothing else, and neither data workers nor the number of processes change a global batch.

    Args:
        sources: one or more sets of samples.
        micro_batch_size: samples of a micro-batch.
        order: weights, seed, global_batch_size, rank and num_processes, see `samples_of_update`.
    """

    def __init__(self, sources: list[Samples], micro_batch_size: int, order: dict[str, Any]) -> None:
        self._sources, self._micro_batch_size, self._order = sources, micro_batch_size, order

    def __getitem__(self, step: int) -> tuple[list[dict[str, np.ndarray]], list[Any]]:
        """The micro-batches of update `step`, and the states of its streams: none."""
        drawn = samples_of_update(step, [len(source) for source in self._sources], **self._order)
        samples = [self._sources[source].read(index) for source, _, index in drawn]
        return micro_batches(samples, self._micro_batch_size), []


def load_updates(dataset: Any, steps: range | None, num_workers: int, device: torch.device) -> Iterator[Any]:
    """What the dataset has for each step, as tensors, read ahead by data workers.

    Args:
        dataset: its items are updates, or it yields them one after the other.
        steps: the items to read; None = all that the dataset yields.
        num_workers: data worker processes; 0 = read here.
        device: that of training; for a GPU the tensors come in pinned memory.
    """
    on_cpu = device.type == "cpu"
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,
        num_workers=num_workers,
        collate_fn=_share_large if on_cpu else None,  # None: tensors, which torch can pin
        pin_memory=device.type == "cuda",
        worker_init_fn=_begin_on_a_cpu if on_cpu else _begin,
    )
    # Data workers inherit this, from their first moment: a signal to all processes of a run must not end them, for the
    # update that it stops after needs them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        items = map(default_convert, iter(loader))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return _read_ahead(items) if num_workers and device.type != "cuda" else items


def _share_large(item: Any) -> Any:
    """Make a tensor, which torch puts into shared memory, of each array that is not small."""
    if isinstance(item, np.ndarray):
        return torch.from_numpy(item) if item.nbytes > _PIPED_BYTES else item
    if isinstance(item, dict):
        return {name: _share_large(value) for name, value in item.items()}
    return type(item)(map(_share_large, item)) if isinstance(item, list | tuple) else item


def _read_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Take each item from the data workers while the one before it is used.

    Receiving large tensors costs a millisecond of handshakes. For a GPU torch's thread that pins memory does the same.
    """
    end = object()
    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item


def _begin_on_a_cpu(worker: int) -> None:
    """Let the threads that train go first: one that has to wait for a core makes all others wait for it."""
    os.nice(_NICENESS)
    _begin(worker)


def _begin(worker: int) -> None:
    """Let a data worker heed the SIGTERM of the training process, which waits for it when it exits, and no other.

    macOS does not tell who sent a signal, so there it heeds any. Linux ends it with that process. Torch would too, but
    then it waits until its last items are read, for ever.
    """
    del worker
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    threading.Thread(target=_wait_for_the_parent, daemon=True).start()


def _wait_for_the_parent() -> None:
    if not hasattr(signal, "sigwaitinfo"):
        signal.sigwait({signal.SIGTERM})
        os._exit(0)
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
