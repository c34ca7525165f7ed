"""Who has the cores: workers share them, one core each, and a program that is to run as a user's gets them all.

Two programs with as many threads as cores, side by side, take many times as long as one after the other. So tests hold
a shared lock, and what runs alone an exclusive one. Whoever wants either queues at a gate first, or tests that come one
after the other on several workers would never let go of it together.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
_LOCKS = Path(tempfile.gettempdir()) / f"cores_{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"


def pin_worker() -> None:
    """Keep a worker of xdist, and the programs that it starts, to a core of its own."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and len(CORES) > 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {CORES[int(worker.removeprefix("gw")) % len(CORES)]})


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Run the block while no other worker has all cores."""
    with _locked(fcntl.LOCK_SH):
        yield


@contextlib.contextmanager
def alone() -> Iterator[int]:
    """Run the block with all cores, while no other worker runs anything; gives their number."""
    with _locked(fcntl.LOCK_EX):
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        try:
            if own:
                os.sched_setaffinity(0, CORES)
            yield len(CORES)
        finally:
            if own:
                os.sched_setaffinity(0, own)


@contextlib.contextmanager
def _locked(kind: int) -> Iterator[None]:
    with open(f"{_LOCKS}_gate", "w") as gate, open(f"{_LOCKS}_cores", "w") as cores:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(cores, kind)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield  # closing the file lets go of it
