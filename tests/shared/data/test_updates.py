"""Updates are the samples that the order names, as micro-batches, however many workers read them."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from shared.command_line import UsageError
from shared.data.sample_order import samples_of_update
from shared.data.updates import Updates, load_updates
from tests.launching import wait_for


class Numbers:
    """Samples that hold their own index, shifted so that sources differ."""

    def __init__(self, size: int, shift: int) -> None:
        self.size, self.shift = size, shift

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> dict[str, np.ndarray]:
        return {"input_ids": np.array([self.shift + index])}


SOURCES = [Numbers(10, 0), Numbers(7, 100)]


def order(rank: int = 0, num_processes: int = 1) -> dict[str, object]:
    common = {"weights": [1.0, 2.0], "seed": 3, "global_batch_size": 12}
    return {**common, "rank": rank, "num_processes": num_processes}


def numbers(batches: list[dict[str, np.ndarray]]) -> list[int]:
    return [int(number) for batch in batches for number in batch["input_ids"][:, 0]]


def test_an_update_holds_the_samples_of_the_order() -> None:
    updates = Updates(SOURCES, 4, order())
    for step in (0, 5):
        batches, states = updates[step]
        assert [batch["input_ids"].shape for batch in batches] == [(4, 1)] * 3
        drawn = samples_of_update(step, [10, 7], **order())
        assert numbers(batches) == [100 * source + index for source, _, index in drawn]
        assert states == []


def test_processes_share_the_same_global_batch() -> None:
    whole = numbers(Updates(SOURCES, 12, order())[4][0])
    shares = [numbers(Updates(SOURCES, 2, order(rank, 3))[4][0]) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    assert list(itertools.chain.from_iterable(shares)) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers: int) -> None:
    updates = load_updates(Updates(SOURCES, 4, order()), range(3, 7), workers, torch.device("cpu"))
    found = [[batch["input_ids"].flatten().tolist() for batch in batches] for batches, _ in updates]
    alone = [Updates(SOURCES, 4, order())[step][0] for step in range(3, 7)]
    assert found == [[batch["input_ids"].flatten().tolist() for batch in batches] for batches in alone]


def test_workers_end_with_a_loop_that_is_left_early() -> None:
    """Also one that is left by an exception while the next update is on its way."""
    others = set(multiprocessing.active_children())
    updates = load_updates(Updates(SOURCES, 4, order()), range(1000), 2, torch.device("cpu"))
    for _ in range(3):
        next(updates)
    workers = set(multiprocessing.active_children()) - others
    assert len(workers) == 2
    updates.close()
    for worker in workers:
        worker.join(timeout=10)
        assert not worker.is_alive()


class Failing(Numbers):
    def read(self, index: int) -> dict[str, np.ndarray]:
        if index == 3:
            raise UsageError("data: sample 3 is no sample")
        return super().read(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_goes_wrong_in_a_worker_is_raised_in_the_loop(workers: int) -> None:
    sources = [Failing(10, 0)]
    lone = {"weights": [1.0], "seed": 3, "global_batch_size": 2, "rank": 0, "num_processes": 1}
    updates = load_updates(Updates(sources, 2, lone), range(5), workers, torch.device("cpu"))
    with pytest.raises(UsageError, match="sample 3 is no sample"):
        list(updates)


def test_a_worker_that_is_killed_ends_the_loop() -> None:
    """As the kernel does for memory; nothing waits for what it would have read."""
    others = set(multiprocessing.active_children())
    updates = load_updates(Updates(SOURCES, 4, order()), range(1000), 1, torch.device("cpu"))
    next(updates)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    with pytest.raises(RuntimeError, match=rf"DataLoader worker \(pid\(?s?\)? {worker.pid}\)"):
        list(updates)


LEFT_OPEN = """
import sys, torch
sys.path[:0] = {path}
from shared.data.updates import Updates, load_updates
from test_updates import Numbers, order
updates = load_updates(Updates([Numbers(10, 0), Numbers(7, 100)], 4, order()), range(1000), 2, torch.device("cpu"))
next(updates)
{then}
"""


@pytest.mark.parametrize(("then", "code"), [("", 0), ("raise RuntimeError('of the loop')", 1)])
def test_a_program_ends_though_its_workers_are_still_reading(then: str, code: int) -> None:
    program = LEFT_OPEN.format(path=[str(Path(__file__).parents[3]), str(Path(__file__).parent)], then=then)
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert ended.returncode == code
    assert ("RuntimeError: of the loop" in ended.stderr) == (code == 1)


@pytest.mark.slow
def test_a_program_with_workers_ends_where_the_system_does_not_say_who_sent_a_signal() -> None:
    """As macOS does not."""
    program = LEFT_OPEN.format(path=[str(Path(__file__).parents[3]), str(Path(__file__).parent)], then="")
    program = program.replace("import sys, torch\n", "import signal, sys, torch\ndel signal.sigwaitinfo\n")
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert ended.returncode == 0
    assert "Error" not in ended.stderr


KILLED = """
import multiprocessing, os, sys, torch
sys.path[:0] = {path}
from shared.data.updates import load_updates
from test_updates import Arrays
updates = load_updates(Arrays(1 << 7), range(1000), 1, torch.device("cpu"))
next(updates)
print(multiprocessing.active_children()[0].pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_worker_does_not_outlive_a_parent_that_was_killed() -> None:
    """Though it has more to say than fits into its pipe, which nobody reads any more."""
    program = KILLED.format(path=[str(Path(__file__).parents[3]), str(Path(__file__).parent)])
    ended = subprocess.run([sys.executable, "-c", program], timeout=60, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL
    wait_for(lambda: not psutil.pid_exists(int(ended.stdout)), seconds=20)


@pytest.mark.slow
def test_workers_outlive_a_signal_that_their_parent_did_not_send() -> None:
    others = set(multiprocessing.active_children())
    updates = load_updates(Updates(SOURCES, 4, order()), range(1000), 1, torch.device("cpu"))
    next(updates)
    (worker,) = set(multiprocessing.active_children()) - others
    for number in (signal.SIGTERM, signal.SIGINT):
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    for _ in range(20):
        next(updates)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0
    updates.close()


@pytest.mark.slow
def test_workers_let_training_go_first_on_a_cpu() -> None:
    others = set(multiprocessing.active_children())
    updates = load_updates(Updates(SOURCES, 4, order()), range(1000), 1, torch.device("cpu"))
    next(updates)
    (worker,) = set(multiprocessing.active_children()) - others
    largest = 19  # of the system's scale, on which these tests may already run
    assert os.getpriority(os.PRIO_PROCESS, worker.pid) == min(largest, os.getpriority(os.PRIO_PROCESS, 0) + 7)
    updates.close()


class Arrays(torch.utils.data.Dataset):
    """Items of a small and a large array of this side, and of what is no array."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __getitem__(self, step: int) -> tuple[list[dict[str, np.ndarray]], str, None]:
        return [{"labels": np.arange(step, 5), "pixel_values": np.full((self.side, self.side), step)}], "name", None


@pytest.mark.parametrize("num_workers", [0, 1])
def test_arrays_of_any_size_arrive_as_tensors(num_workers: int) -> None:
    for step, item in enumerate(load_updates(Arrays(1 << 10), range(3), num_workers, torch.device("cpu"))):
        [batch], name, nothing = item
        assert (name, nothing) == ("name", None)
        assert batch["labels"].tolist() == list(range(step, 5))
        assert torch.equal(batch["pixel_values"], torch.full((1 << 10, 1 << 10), step))
