"""Updates whose gradient was not finite: counted, and refused when they come one after the other."""

import math
from typing import Any

from shared.command_line import TooManyNonFiniteUpdates


class SkippedUpdates:
    """Counts of a run.

    Args:
        state: of the checkpoint that the run goes on from, with what `state` gave; empty at the beginning.
        most_in_a_row: number at which `check` ends the run.

    Attributes:
        total: updates so far that changed nothing.
    """

    def __init__(self, state: dict[str, Any], most_in_a_row: int) -> None:
        self.total: int = state.get("skipped", 0)
        self._in_a_row: int = state.get("bad_in_a_row", 0)
        self._most_in_a_row = most_in_a_row

    def count(self, grad_norm: float) -> None:
        """Note an update by its gradient norm, the same on all processes."""
        is_finite = math.isfinite(grad_norm)
        self.total += not is_finite
        self._in_a_row = 0 if is_finite else self._in_a_row + 1

    @property
    def are_too_many(self) -> bool:
        """Whether `check` will end the run."""
        return self._in_a_row >= self._most_in_a_row

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
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
