"""The learning rate as a pure function of the step: warm-up, constant, cosine (report §4.2)."""

import math

from optim.config import OptimConfig

DEFAULT_DECAY_FRACTION = 0.1


def decay_start(config: OptimConfig, total_steps: int) -> int:
    """Returns the first step, counted from 0, of the cosine; it is never in the warm-up."""
    schedule = config.schedule
    if schedule.decay_start is not None:
        return schedule.decay_start
    fraction = (
        DEFAULT_DECAY_FRACTION if schedule.decay_fraction is None else schedule.decay_fraction
    )
    return max(schedule.warmup_steps, total_steps - round(total_steps * fraction))


def learning_rate_at(config: OptimConfig, step: int, total_steps: int) -> float:
    """Returns the learning rate of update `step`, counted from 0, in a run of `total_steps`.

    The last warm-up step has the full rate. If the decay begins before the end of the run, its last
    step, and any after it, have the final one. A run shorter than its warm-up ends within it.
    """
    peak, schedule = config.learning_rate, config.schedule
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    start = decay_start(config, total_steps)
    if step < start:
        return peak
    progress = min(1.0, (step + 1 - start) / max(1, total_steps - start))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (schedule.final_ratio + (1.0 - schedule.final_ratio) * cosine)
