"""SIGTERM and SIGINT finish the update, save, and leave; a second Ctrl-C leaves at once."""

import signal
from types import FrameType


class StopSignals:
    """Remembers that a signal came; made once, in the main thread, before training."""

    def __init__(self) -> None:
        self._received = ""
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def restore(self) -> None:
        """Let signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def received(self) -> bool:
        """Whether this process got a signal; it is summed over processes, so that all stop after the same update."""
        return bool(self._received)
