"""``DepthSpec``: the depth that someone asks for, read once, where its text comes in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

from megaloop.depth.plan import DepthPlan, Loop, spelled_loop

__all__ = ["DepthSpec"]


@dataclass(frozen=True)
class DepthSpec:
    """How many layers there are and in which order they run: by places, whatever ids the layers of a model have.

    What a configuration, a command line or a record says of depth is read into this, and this is what travels;
    :func:`megaloop.depth.reorder` puts the layers of a plan into its order. Two are equal if their texts are.

    Attributes:
        text: as it was written: ``24``, ``4-4x4-4``. Configurations and records hold it.
        plan: the order, of a model whose layers have their places as ids.
        loop: as it was written, even of a loop that runs once (of which ``plan`` knows nothing); None without one.
    """

    text: str
    plan: DepthPlan = field(compare=False)
    loop: Loop | None = field(compare=False)

    @classmethod
    def parse(cls, text: str | int) -> Self:
        """Read ``24``, ``4-4x4-4`` or layers in groups; see :meth:`megaloop.depth.DepthPlan.parse`.

        Raises:
            MegaloopError: it cannot be read.
        """
        plan = DepthPlan.parse(text)
        spelled = spelled_loop(str(text))
        return cls(str(text), plan, plan.loop if spelled is None else Loop(*spelled[:3]))

    @classmethod
    def of(cls, plan: DepthPlan) -> Self:
        """That of a plan."""
        places = {layer_id: place for place, layer_id in enumerate(plan.ids)}
        return cls(plan.notation, DepthPlan(tuple(places[layer_id] for layer_id in plan.order)), plan.loop)

    @classmethod
    def looped(cls, prelude: int, block: int, iterations: int, coda: int) -> Self:
        """``prelude`` layers, a ``block`` of them ``iterations`` times, then ``coda`` layers."""
        plan = DepthPlan.looped(prelude, block, iterations, coda)
        return cls(f"{prelude}-{block}x{iterations}-{coda}", plan, Loop(prelude, block, iterations))

    @property
    def layers(self) -> int:
        """How many layers hold parameters."""
        return self.plan.layers

    @property
    def is_looped(self) -> bool:
        """Some layer runs more than once."""
        return self.plan.is_looped

    def __str__(self) -> str:
        return self.text
