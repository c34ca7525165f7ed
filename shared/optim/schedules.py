"""Learning rates as factors in [0, 1] of the peak rate: functions of the step."""

import math


def warmup(step: int, warmup_steps: int) -> float:
    """Linear rise that reaches 1 at update `warmup_steps`; update 0 is already above 0."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def warmup_stable_decay(step: int, max_steps: int, warmup_steps: int, decay_fraction: float) -> float:
    """Warm up, hold, then fall linearly to 0 over the last `decay_fraction` of the updates (Hu et al. 2024, MiniCPM).

    Hagele et al. 2024 measured that the linear fall over the last fifth or more equals a cosine of the same length.
    """
    decay_steps = max(1, round(max_steps * decay_fraction))
    return min(warmup(step, warmup_steps), max(0.0, (max_steps - step) / decay_steps))


def warmup_cosine(step: int, max_steps: int, warmup_steps: int, final_fraction: float) -> float:
    """Warm up, then half a cosine down to `final_fraction` of the peak (Loshchilov and Hutter 2017)."""
    progress = max(0.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    cosine = final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(warmup(step, warmup_steps), cosine)
