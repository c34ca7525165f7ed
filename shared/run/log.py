"""Everything a run reports while it trains: metrics.jsonl, trackers, and a bar or lines on the terminal."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from shared.run.trackers import show_image


class RunLog:
    """One entry a step that logged or evaluated; no step twice and none missing after resuming.

    Args:
        accelerator: only its main process writes and speaks; its trackers get every entry and what the model made.
        run_dir: the run folder.
        step: the step that training goes on from; entries after it are cut off, they will be written again.
        max_steps: updates in all.
    """

    def __init__(self, accelerator: Any, run_dir: Path, step: int, max_steps: int) -> None:
        from tqdm import tqdm

        self._accelerator, self._file = accelerator, run_dir / "metrics.jsonl"
        self._first, self._max_steps, self._started = step, max_steps, time.perf_counter()
        on_terminal = accelerator.is_main_process and sys.stderr.isatty()
        self._bar: Any = tqdm(total=max_steps, initial=step, unit="step", disable=not on_terminal, dynamic_ncols=True)
        if accelerator.is_main_process and self._file.is_file():
            kept = [entry for entry in self.read() if entry["step"] <= step]
            aside = self._file.with_name(".metrics.jsonl")
            aside.write_text("".join(map(_line, kept)))
            aside.replace(self._file)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Move to `step` and record its metrics, if there are any."""
        self._bar.update(step - self._bar.n)
        if not metrics:
            return
        if self._accelerator.is_main_process:
            with self._file.open("a") as stream:
                stream.write(_line({"step": step, **metrics}))
            image = self._file.with_name("samples") / f"step_{step:08d}.png"
            if self._accelerator.log_with and image.is_file():
                show_image(self._accelerator, image, step)
        self._accelerator.log(metrics, step=step)
        # Without the groups, but for evaluation's, whose loss would stand beside that of training under the same name.
        names = {key: key.removeprefix("train/").removeprefix("perf/") for key in metrics}
        shown = "  ".join(f"{names[key]} {_short(key, value)}" for key, value in metrics.items())
        if self._bar.disable:
            seconds = (time.perf_counter() - self._started) / max(1, step - self._first) * (self._max_steps - step)
            self.say(f"step {step}/{self._max_steps}  {shown}  left {int(seconds // 60)}:{int(seconds % 60):02d}")
        else:
            self._bar.set_postfix_str(shown)

    def write_samples(self, step: int, text: str) -> None:
        """Keep what the model made at `step` in samples/."""
        if self._accelerator.is_main_process:
            file = self._file.with_name("samples") / f"step_{step:08d}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text + "\n", encoding="utf-8")
        self._accelerator.log({"samples": text}, step=step)

    def say(self, text: str) -> None:
        """Print without breaking the bar."""
        if self._accelerator.is_main_process:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def read(self) -> list[dict[str, float]]:
        """All entries; a last line that a crash left half written is not one."""
        entries = []
        for line in self._file.read_text().splitlines() if self._file.is_file() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break
            entries.append({key: math.nan if value is None else value for key, value in entry.items()})
        return entries

    def last_evaluation(self) -> dict[str, float]:
        """The eval/ metrics of the newest entry that has any."""
        evaluations = (
            {key: value for key, value in entry.items() if key.startswith("eval/")} for entry in reversed(self.read())
        )
        return next(filter(None, evaluations), {})

    def close(self) -> None:
        """Leave the terminal in order."""
        self._bar.close()


def _line(entry: dict[str, float]) -> str:
    """One line of JSON, which has no word for infinity and not-a-number: they become null."""
    return json.dumps({key: value if math.isfinite(value) else None for key, value in entry.items()}) + "\n"


def _short(key: str, value: float) -> str:
    if "fraction" in key or "mfu" in key:
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
