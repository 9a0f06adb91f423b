"""How far a run is, and what its place in the data stands for: one value, from the training loop to the manifest.

Whoever saves a checkpoint, or writes one anew at another depth, hands on the whole of it: no count can get lost on the way.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megaloop.depth import DepthPlan

__all__ = ["Count", "DataState", "DepthState", "Entry", "RunState", "SourceState"]

Count = Annotated[int, Field(ge=0, lt=10**30)]
"""Steps, tokens, bytes or FLOPs: no honest number is larger."""
_FromOne = Annotated[Count, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Entry(BaseModel):
    """A part of the manifest: keys that are not known are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class SourceState(Entry):
    """One source of the data.

    Attributes:
        train, validation: SHA-256 of what tells its samples apart from others': of shards, the ``index.json`` of the split
            (``indices`` of data.json); None: an earlier version did not keep them.
        stable, cooldown: its weight in the two phases.
    """

    train: str | None
    validation: str | None
    stable: _Share
    cooldown: _Share


class DataState(Entry):
    """What sample n of the run is, besides seed and order version.

    Attributes:
        sequence_length: tokens per sample.
        cooldown_sample: the first with the cooldown's weights; None: there is no cooldown.
    """

    sequence_length: _FromOne
    cooldown_sample: Count | None
    sources: tuple[SourceState, ...]


class DepthState(Entry):
    """A depth that the run had.

    Attributes:
        step: steps done when it began.
        layers: how many there are.
        depth: layers and loop, by places: 24, 10-4x2-10.
        grown: a growth led to it (not the run's beginning, nor an event).
    """

    step: Count
    layers: _FromOne
    depth: str
    grown: bool = False


class RunState(Entry):
    """How far a run is, and by what.

    Attributes:
        step: optimizer steps done.
        samples: samples consumed, which is the number of the next global sample.
        tokens: tokens predicted.
        flops: model FLOPs, forward and backward.
        skipped: of the steps, those that changed nothing, as their gradient was not finite.
        seed: of the initial values and of the sample order.
        batch: samples per step; None: not known.
        steps: of the whole run, by which its schedules go; None: not known.
        lr: the learning rate of the last step; None: not known, or none was done.
        order_version: how seed, weights and a sample's number become a sample; 1 is the first that there was.
        data: what it trains on; None: not known.
        depths: the depths that it had so far, oldest first; empty, or later than step 0: earlier ones are not known.
    """

    step: Count
    samples: Count
    tokens: Count
    flops: Count
    skipped: Count
    seed: Count
    batch: _FromOne | None = None
    steps: _FromOne | None = None
    lr: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    order_version: _FromOne = 1
    data: DataState | None = None
    depths: tuple[DepthState, ...] = ()

    @model_validator(mode="after")
    def _no_more_skipped_than_done(self) -> Self:
        if self.skipped > self.step:
            raise ValueError(f"{self.skipped} of {self.step} steps were skipped")
        return self

    @classmethod
    def fresh(cls, seed: int = 0) -> Self:
        """Nothing is done yet."""
        return cls(step=0, samples=0, tokens=0, flops=0, skipped=0, seed=seed)

    @property
    def updates(self) -> int:
        """How often the weights have changed: what Adam counts."""
        return self.step - self.skipped

    def at_depth(self, plan: DepthPlan, grown: bool = False) -> Self:
        """The same state, from here on with another depth."""
        depth = plan.notation
        if self.depths and self.depths[-1].depth == depth:
            return self
        before = tuple(reached for reached in self.depths if reached.step < self.step)
        entry = DepthState(step=self.step, layers=plan.layers, depth=depth, grown=grown)
        return self.model_copy(update={"depths": (*before, entry)})
