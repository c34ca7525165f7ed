"""The best evaluation of a run: what is exported, and what the card quotes, is of that step."""

import math
from typing import Any

# What is in the name of a metric of which less is better.
_COSTS = ("loss", "perplexity", "bits_per_byte")


class Best:
    """Which evaluation was the best so far by one metric, of which more is better, but of a loss and the like less.

    Small sets of data often give equal values; of these the one with the least loss is the best. An evaluation that is
    done again, since a signal had ended it, counts once.

    Args:
        metric: its key, such as eval/accuracy or eval/loss; "" = none is the best.
        state: the state of the checkpoint that the run goes on from; empty at the beginning.

    Attributes:
        step: of the best evaluation; 0 = there was none.
        metrics: of that evaluation.
        samples: what was shown of it.
        waited: evaluations since the metric was better than before.
    """

    FOLDER = "best"  # in the folder of a run that keeps the best model beside the last

    def __init__(self, metric: str, state: dict[str, Any]) -> None:
        best = state.get("best", {})
        self._metric = metric
        self._is_cost = any(word in metric.rpartition("/")[2] for word in _COSTS)
        self._set(best)
        self._newest: int = best.get("newest", 0)  # step of the newest evaluation
        self._before: dict[str, Any] = best.get("before", {})  # it

    def _set(self, parts: dict[str, Any]) -> None:
        self.step: int = parts.get("step", 0)
        self.metrics: dict[str, float] = parts.get("metrics", {})
        self.samples: str = parts.get("samples", "")
        self.waited: int = parts.get("waited", 0)

    def is_better(self, step: int, metrics: dict[str, float], samples: str) -> bool:
        """Whether an evaluation beats all before it, which is then noted; of equal ones the first counts."""
        if not self._metric:
            return False
        if step == self._newest:
            self._set(self._before)
        self._newest, self._before = step, self._parts()
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
        value = metrics[self._metric]
        return (-value if self._is_cost else value), -(math.inf if math.isnan(loss) else loss)

    def has_waited(self, patience: int) -> bool:
        """Whether so many evaluations in a row, 0 = any number, were no better than the best."""
        return 0 < patience <= self.waited

    def state(self) -> dict[str, Any]:
        """For the checkpoint; nothing where no metric is named."""
        parts = {**self._parts(), "newest": self._newest, "before": self._before}
        return {"best": parts} if self._metric else {}

    def kept(self) -> dict[str, Any]:
        """For run.json and the card: where the best model lies beside the last one, and how good it is."""
        evaluation = {key: value for key, value in self.metrics.items() if key.startswith("eval/")}
        found = {"folder": self.FOLDER, "metric": self._metric, "step": self.step, "evaluation": evaluation}
        return {"best": found} if self.step else {}

    def _parts(self) -> dict[str, Any]:
        return {"step": self.step, "metrics": dict(self.metrics), "samples": self.samples, "waited": self.waited}
