"""The learning rate, a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Iterable

from megaloop.config import ScheduleConfig

__all__ = ["learning_rate"]


def learning_rate(
    step: int,
    total_steps: int,
    lr: float,
    schedule: ScheduleConfig,
    *,
    growth_steps: Iterable[int] = (),
    growth_warmup: int = 0,
) -> float:
    """The learning rate of optimizer step ``step``, counted from 0, in a run of ``total_steps``.

    Warm-up is linear and ends at the peak: ``(step + 1) / warmup_steps`` of it, so that the first step
    already learns. The trapezoid then stays at the peak until the cooldown starts and falls linearly or by one minus
    the square root of the fraction of the cooldown (arXiv 2405.18392, sections 3 and 4.1; the latter in arXiv 2602.16490);
    the cosine falls from the end of the warm-up. All would arrive at ``final`` at step ``total_steps``, one past the
    last: with ``final: 0`` no step is wasted on a rate of 0.
    Where warm-up and cooldown overlap, the lower of the two holds.

    Args:
        lr: the peak.
        growth_steps: first steps of the growth stages: over ``growth_warmup`` steps from each, the rate rises
            linearly to what it would be without.
    """
    lr *= min(
        (min(1.0, (step - first + 1) / growth_warmup) for first in growth_steps if growth_warmup and first <= step),
        default=1.0,
    )
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    begin = schedule.cooldown_start(total_steps)
    if step < begin:
        return lr * warmup
    progress = min(1.0, (step - begin) / max(total_steps - begin, 1))
    return lr * min(warmup, schedule.final + (1.0 - schedule.final) * _fall(progress, schedule))


def _fall(progress: float, schedule: ScheduleConfig) -> float:
    """From 1 at the beginning of the fall (``progress`` 0) to 0 at its end (1)."""
    if schedule.kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0 - (math.sqrt(progress) if schedule.decay == "sqrt" else progress)
