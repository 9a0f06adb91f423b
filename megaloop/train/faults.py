"""What goes wrong with the numbers: steps without a finite gradient, and spikes of the loss. See docs/FAULTS.md.

DeepSpeed skips a step whose gradient is not finite, on all ranks together and before anything has changed: here it is
counted. What rank 0 decides holds for all ranks.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megaloop.checkpoint import RunState
from megaloop.config import FaultsConfig
from megaloop.errors import MegaloopError
from megaloop.parallel.engine import StepResult

__all__ = ["Faults", "RollBack", "Spike", "check_replicas"]

_FEWEST = 20
"""Losses that a window must hold before one can stick out of it."""
_NORMAL = 1.4826
"""Standard deviations per median absolute deviation, where values are normally distributed."""


@dataclass(frozen=True)
class RollBack:
    """Training cannot go on from here: back to the last checkpoint, and past these samples.

    Attributes:
        step: steps done by then.
        samples: [start, stop) of the global order.
    """

    step: int
    reason: str
    samples: tuple[int, int]


@dataclass(frozen=True)
class Spike:
    """A loss that sticks out of those before it, in nats per token."""

    loss: float
    median: float
    deviation: float


class Faults:
    """Judges the steps of a run.

    Args:
        batch: samples per step.
        recent: as :meth:`remember` takes them.
    """

    def __init__(self, config: FaultsConfig, batch: int, recent: Iterable[float] = ()):
        self._config, self._batch = config, batch
        self._recent: deque[float] = deque(recent, maxlen=config.spike_window)
        self._skipped: list[int] = []

    def remember(self, losses: Iterable[float]) -> None:
        """Losses of steps before the first that is judged, oldest first."""
        self._recent.extend(losses)

    def forget(self) -> None:
        """The model is another from here on: its losses are not to be measured by those before."""
        self._recent.clear()

    def stepped(self, at: RunState, result: StepResult) -> Spike | RollBack | None:
        """Judge the step that led to ``at``."""
        config = self._config
        if not result.applied:
            self._skipped.append(at.samples)
            count = len(self._skipped)
            if config.max_skipped and count >= config.max_skipped:
                return self._roll_back(at, f"{count} steps in a row without a finite gradient", self._skipped[0])
            return None
        self._skipped = []
        spike = self._spike(result.loss)
        if spike and config.spike_rollback:
            return self._roll_back(at, f"loss {spike.loss:.4f} against a median of {spike.median:.4f}", at.samples)
        self._recent.append(result.loss)
        return spike

    def _roll_back(self, at: RunState, reason: str, first_end: int) -> RollBack:
        """Past everything from ``margin`` steps before the first that went wrong, whose samples end at ``first_end``."""
        first = first_end - (1 + self._config.margin) * self._batch
        return RollBack(at.step, reason, (max(first, 0), at.samples))

    def _spike(self, loss: float) -> Spike | None:
        if not self._config.spike_deviations or len(self._recent) < min(_FEWEST, self._config.spike_window):
            return None
        median = statistics.median(self._recent)
        deviation = _NORMAL * statistics.median(abs(loss - median) for loss in self._recent)
        return Spike(loss, median, deviation) if loss > median + self._config.spike_deviations * deviation else None


def check_replicas(differing: Sequence[str], step: int) -> None:
    """Raise MegaloopError where tensors differ of which several ranks should hold the same bits after ``step``."""
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise MegaloopError(
            f"step {step}: ranks that should hold the same bits differ in {', '.join(differing[:5])}{more}; "
            "stop using this run's later checkpoints, and report it: a gradient was reduced wrongly or memory is faulty"
        )
