"""Rates of a training loop between two log lines."""

import contextlib
import time
from collections.abc import Iterator


class Throughput:
    """Counts what was trained on and the time it took, from one `read` to the next.

    Clocks are the host's: read after something that waits for the device, such as `loss.item()`.

    Args:
        flops_per_sample: floating-point operations of one sample's forward and backward pass.
        peak_flops_total: peak FLOP/s of all devices of the run together.
    """

    def __init__(self, flops_per_sample: float, peak_flops_total: float) -> None:
        self._flops_per_sample = flops_per_sample
        self._peak_flops_total = peak_flops_total
        self._paused_at: float | None = None
        self._seconds_paused = 0.0
        self._made = self._now()
        self._restart()

    @property
    def training_seconds(self) -> float:
        """Seconds since this was made, pauses left out."""
        return self._now() - self._made

    def add(self, *, samples: float, units: int) -> None:
        """Count one update's samples and units (tokens or images), over all processes."""
        self._samples += samples
        self._units += units

    def read(self, unit: str) -> dict[str, float]:
        """The rates since the last `read`, then start anew.

        Args:
            unit: what `units` were, in the plural: tokens or images.

        Returns:
            perf/{unit}_per_second: over all processes.
            perf/mfu: model FLOPs utilisation, the share of the devices' peak that the samples needed, at most 1.
            perf/data_wait_fraction: share of the time that this process waited for data.
        """
        seconds = max(self._now() - self._started, 1e-9)
        done = self._samples * self._flops_per_sample / seconds
        # A peak that was measured while other programs used the machine can be below what the run then does.
        self._peak_flops_total = max(self._peak_flops_total, done)
        metrics = {
            f"perf/{unit}_per_second": self._units / seconds,
            "perf/mfu": done / self._peak_flops_total,
            "perf/data_wait_fraction": self._seconds_waited / seconds,
        }
        self._restart()
        return metrics

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the block's time as waiting for data."""
        started = self._now()
        try:
            yield
        finally:
            self._seconds_waited += self._now() - started

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the block's time: evaluation, saving. Pauses may be nested."""
        if self._paused_at is not None:
            yield
            return
        self._paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._seconds_paused += time.perf_counter() - self._paused_at
            self._paused_at = None

    def _now(self) -> float:
        """Seconds on a clock that stands still during pauses."""
        now = time.perf_counter() if self._paused_at is None else self._paused_at
        return now - self._seconds_paused

    def _restart(self) -> None:
        self._started = self._now()
        self._seconds_waited = 0.0
        self._samples, self._units = 0.0, 0
