"""A torch trace of a few updates."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler


def trace_updates(folder: Path) -> profile:
    """A started profiler that writes updates 3 to 5 after it to `folder`; call `step()` after each update.

    Open the file with Perfetto or chrome://tracing.
    """
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    profiler = profile(
        activities=activities,
        schedule=schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=tensorboard_trace_handler(str(folder)),
    )
    profiler.start()
    return profiler
