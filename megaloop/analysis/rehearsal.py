"""Whether measures can be taken, found out before a model is loaded: each begins, and ends where it first asks for the model's numbers.

So what a measure refuses (prompts that are too short, blocks that do not fit) is written once, in the measure.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from megaloop.analysis.measures import Subject
from megaloop.analysis.prompts import Prompts
from megaloop.depth import DepthPlan
from megaloop.model import Decoder

__all__ = ["Rehearsal"]


class _NumbersNeededError(Exception):
    """A measure has come to the model's numbers."""


class _PlanAlone:
    """Of a model, what is known without its numbers."""

    def __init__(self, plan: DepthPlan):
        self.plan = plan

    def __getattr__(self, name: str) -> NoReturn:
        raise _NumbersNeededError


@dataclass(frozen=True)
class Rehearsal(Subject):
    """A subject that has no numbers yet."""

    @classmethod
    def of(cls, plan: DepthPlan, prompts: Prompts, block: int, seed: int) -> Rehearsal:
        return cls(cast(Decoder, _PlanAlone(plan)), prompts, block, seed, None, lambda label, done, total: None)

    def collect(self, *_: Any, **__: Any) -> NoReturn:
        raise _NumbersNeededError

    def check(self, measure: Callable[[Subject], object]) -> None:
        """Raise MegaloopError where a measure refuses the model or its prompts."""
        with suppress(_NumbersNeededError):
            measure(self)
