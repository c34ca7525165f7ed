"""Updates whose gradient was not finite: counted, and refused when they come one after the other."""

import math
from collections import deque
from typing import Any

from torch import Tensor

from shared.command_line import TooManyNonFiniteUpdates
from shared.runtime.late_number import LateNumber


class SkippedUpdates:
    """Counts of a run. They take in an update when the next one was counted, or when they are asked for.

    Args:
        state: of the checkpoint that the run goes on from, with what `state` gave; empty at the beginning.
        most_in_a_row: number at which `check` ends the run.
    """

    def __init__(self, state: dict[str, Any], most_in_a_row: int) -> None:
        self._total: int = state.get("skipped", 0)
        self._in_a_row: int = state.get("bad_in_a_row", 0)
        self._most_in_a_row = most_in_a_row
        self._norms: deque[LateNumber] = deque()  # that were not looked at yet

    def count(self, grad_norm: Tensor) -> None:
        """Note an update by its gradient norm, a scalar on any device, the same on all processes; no wait."""
        self._norms.append(LateNumber(grad_norm))
        self._look_at_all_but(1)

    def look_at_all(self) -> None:
        """Take in every update that was counted; waits for the newest."""
        self._look_at_all_but(0)

    @property
    def total(self) -> int:
        """Updates so far that changed nothing; waits for the newest."""
        self.look_at_all()
        return self._total

    @property
    def are_too_many(self) -> bool:
        """Whether `check` will end the run, by the updates that were looked at."""
        return self._in_a_row >= self._most_in_a_row

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps; waits for the newest update."""
        return {"skipped": self.total, "bad_in_a_row": self._in_a_row}

    def check(self, step: int) -> None:
        """End a run that cannot go on.

        Raises:
            TooManyNonFiniteUpdates: too many in a row, up to update `step`.
        """
        if self.are_too_many:
            raise TooManyNonFiniteUpdates(
                f"{self._in_a_row} updates in a row had no finite gradient, up to step {step}"
            )

    def _look_at_all_but(self, newest: int) -> None:
        while len(self._norms) > newest:
            is_finite = math.isfinite(self._norms.popleft().read())
            self._total += not is_finite
            self._in_a_row = 0 if is_finite else self._in_a_row + 1
