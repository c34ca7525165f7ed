"""SIGTERM and SIGINT finish the update, save, and leave; a second Ctrl-C leaves at once."""

import signal
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from shared.command_line import RunStopped
from shared.runtime.collectives import count_of
from shared.runtime.late_number import LateNumber

Batch = TypeVar("Batch")


class StopSignals:
    """Remembers that a signal came; made once, in the main thread, before training."""

    newest: "StopSignals | None" = None  # of the process, as signals are; until it has left off, see `leave_off`

    def __init__(self) -> None:
        self._received = ""
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        StopSignals.newest = self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def leave_off(self) -> None:
        """End no evaluation any more."""
        if StopSignals.newest is self:
            StopSignals.newest = None

    def restore(self) -> None:
        """Let signals do again what they did before."""
        self.leave_off()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def received(self) -> bool:
        """Whether this process got a signal; it is summed over processes, so that all stop after the same update."""
        return bool(self._received)


def until_stopped(accelerator: Any, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of an evaluation, up to a signal to any process, after which each of them gets one more at most.

    Args:
        accelerator: knows the processes.
        batches: of which every process has equally many.

    Raises:
        RunStopped: on all processes before the same batch, see `shared.run.training_run.Run.evaluation`.
    """
    before: LateNumber | None = None
    for batch in batches:
        is_stopping = StopSignals.newest is not None and StopSignals.newest.received
        if accelerator.num_processes > 1:
            number = count_of(accelerator, is_stopping)
            is_stopping = (before or number).read() > 0  # the first is waited for, and then the one before
            before = number
        if is_stopping:
            raise RunStopped("all updates are saved; the same command evaluates again")
        yield batch
