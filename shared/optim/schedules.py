"""Learning rates as factors in [0, 1] of the peak rate: functions of the step."""

import math


def warmup(step: int, warmup_steps: int) -> float:
    """Linear rise that reaches 1 at update `warmup_steps`; update 0 is already above 0."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def warmup_stable_decay(
    step: int, max_steps: int, warmup_steps: int, decay_fraction: float, final_fraction: float = 0.0
) -> float:
    """Warm up, hold, then fall linearly over the last `decay_fraction` of the updates (Hu et al. 2024, MiniCPM).

    The fall ends at `final_fraction` of the peak, and begins at the end of the warm-up at the earliest: the peak
    is reached, unless the warm-up is longer than the run. Hagele et al. 2024 measured that a linear fall over the last
    fifth or more equals a cosine as long.
    """
    decay_steps = max(1, min(round(max_steps * decay_fraction), max_steps - warmup_steps))
    left = max(0.0, (max_steps - step) / decay_steps)
    return min(warmup(step, warmup_steps), final_fraction + (1 - final_fraction) * left)


def warmup_line_from_start(step: int, max_steps: int, warmup_steps: int) -> float:
    """Warm up, then jump to the line that falls from 1 at update 0 to 0 (released code of Devlin et al. 2019)."""
    return warmup(step, warmup_steps) if step < warmup_steps else max(0.0, (max_steps - step) / max_steps)


def warmup_cosine(step: int, max_steps: int, warmup_steps: int, final_fraction: float = 0.0) -> float:
    """Warm up, then half a cosine down to `final_fraction` of the peak (Loshchilov and Hutter 2017)."""
    progress = max(0.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    cosine = final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return min(warmup(step, warmup_steps), cosine)
