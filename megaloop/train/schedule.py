"""The learning rate, a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from megaloop.config import ScheduleConfig

__all__ = ["cooldown_start", "learning_rate"]


def learning_rate(step: int, total_steps: int, lr: float, schedule: ScheduleConfig) -> float:
    """The learning rate of optimizer step ``step``, counted from 0, in a run of ``total_steps``.

    Warm-up is linear and ends at the peak: ``(step + 1) / warmup_steps`` of it, so that the first step
    already learns. The trapezoid then stays at the peak until :func:`cooldown_start` and falls linearly
    (arXiv 2405.18392, section 3); the cosine falls from the end of the warm-up. Both would arrive at
    ``final`` at step ``total_steps``, one past the last: with ``final: 0`` no step is wasted on a rate of 0.
    Where warm-up and cooldown overlap, the lower of the two holds.

    Args:
        lr: the peak.
    """
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    begin = cooldown_start(total_steps, schedule)
    if step < begin:
        return lr * warmup
    progress = min(1.0, (step - begin) / max(total_steps - begin, 1))
    fall = 1.0 - progress if schedule.kind == "trapezoid" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return lr * min(warmup, schedule.final + (1.0 - schedule.final) * fall)


def cooldown_start(total_steps: int, schedule: ScheduleConfig) -> int:
    """The step, counted from 0, with which the learning rate begins to fall (``total_steps``: it never does)."""
    if schedule.kind == "cosine":
        return min(schedule.warmup_steps, total_steps)
    return total_steps - round(total_steps * schedule.cooldown)
