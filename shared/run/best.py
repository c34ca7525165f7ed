"""The best evaluation of a run: what is exported, and what the card quotes, is of that step."""

import math
from typing import Any


class Best:
    """Which evaluation was the best so far by one metric, of which more is better, but of a loss less.

    Args:
        metric: its key, such as eval/accuracy or eval/loss.
        state: the state of the checkpoint that the run goes on from; empty at the beginning.

    Attributes:
        step: of the best evaluation; 0 = there was none.
        metrics: of that evaluation.
        samples: what was shown of it.
        waited: evaluations since then.
    """

    def __init__(self, metric: str, state: dict[str, Any]) -> None:
        best = state.get("best", {})
        self._metric = metric
        self.step: int = best.get("step", 0)
        self.metrics: dict[str, float] = best.get("metrics", {})
        self.samples: str = best.get("samples", "")
        self.waited: int = best.get("waited", 0)

    def is_better(self, step: int, metrics: dict[str, float], samples: str) -> bool:
        """Whether an evaluation beats all before it, which is then noted; of equal ones the first counts."""
        sign = -1.0 if self._metric == "eval/loss" else 1.0
        value, before = metrics[self._metric], self.metrics.get(self._metric, -sign * math.inf)
        self.waited += 1
        if not math.isfinite(value) or sign * value <= sign * before:
            return False
        self.step, self.metrics, self.samples, self.waited = step, dict(metrics), samples, 0
        return True

    def has_waited(self, patience: int) -> bool:
        """Whether so many evaluations in a row, 0 = any number, were no better than the best."""
        return 0 < patience <= self.waited

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        parts = {"step": self.step, "metrics": self.metrics, "samples": self.samples, "waited": self.waited}
        return {"best": parts}
