"""The best evaluation of a run: what is exported, and what the card quotes, is of that step."""

import math
from typing import Any


class Best:
    """Which evaluation was the best so far by one metric, of which more is better, but of a loss less.

    Small sets of data often give equal values; of these the one with the least loss is the best.

    Args:
        metric: its key, such as eval/accuracy or eval/loss.
        state: the state of the checkpoint that the run goes on from; empty at the beginning.

    Attributes:
        step: of the best evaluation; 0 = there was none.
        metrics: of that evaluation.
        samples: what was shown of it.
        waited: evaluations since the metric was better than before.
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
        self.waited += 1
        if not math.isfinite(metrics[self._metric]):
            return False
        rank, before = self._rank(metrics), self._rank(self.metrics) if self.metrics else (-math.inf, -math.inf)
        if rank[0] > before[0]:
            self.waited = 0
        if rank <= before:
            return False
        self.step, self.metrics, self.samples = step, dict(metrics), samples
        return True

    def _rank(self, metrics: dict[str, float]) -> tuple[float, float]:
        """More is better; where the loss is not a number, it is none that could be less."""
        loss = metrics.get("eval/loss", math.inf)
        cost = math.inf if math.isnan(loss) else loss
        return (-cost if self._metric == "eval/loss" else metrics[self._metric]), -cost

    def has_waited(self, patience: int) -> bool:
        """Whether so many evaluations in a row, 0 = any number, were no better than the best."""
        return 0 < patience <= self.waited

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        parts = {"step": self.step, "metrics": self.metrics, "samples": self.samples, "waited": self.waited}
        return {"best": parts}
