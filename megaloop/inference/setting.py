"""How a model is to run at inference, as a user says it: how deep, when tokens leave the loop, and what the caches keep."""

from __future__ import annotations

from dataclasses import dataclass, field

from megaloop.depth import DepthPlan, DepthSpec, LayerCall, with_inference_loop
from megaloop.errors import MegaloopError
from megaloop.inference.loops import Block, with_loops
from megaloop.inference.passes import Passes
from megaloop.inference.thinking import Thinking
from megaloop.model import Decoder

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """How a model runs at inference; by default as it was trained.

    Attributes:
        depth: the order of the layers, such as ``10-4x3-10``.
        loops: how often the loop runs at most: the trained one, or one over ``block``; instead of ``depth``.
        block: which layers loop; None: the trained loop, or the four in the middle.
        thinking: when tokens leave the loop before, and which iterations keep keys and values.
    """

    depth: DepthSpec | None = None
    loops: int | None = None
    block: Block | None = None
    thinking: Thinking = field(default_factory=Thinking)

    def __post_init__(self) -> None:
        if self.depth is not None and (self.loops is not None or self.block is not None):
            raise MegaloopError(
                "--depth says how often the loop runs, and so does --max-loops with --block; give one of them"
            )
        if self.block is not None and self.loops is None:
            raise MegaloopError("--block says which layers loop; say how often with --max-loops")

    def calls(self, plan: DepthPlan) -> tuple[LayerCall, ...]:
        """The executions of a model's layers."""
        if self.depth is not None:
            return with_inference_loop(plan, self.depth).calls
        return with_loops(plan, self.loops, self.block).calls if self.loops is not None else plan.calls()

    def passes(self, model: Decoder, vocab_size: int | None = None) -> Passes:
        """The model, run so.

        Raises:
            MegaloopError: halting or shared caches of a model without a loop, a depth that it cannot run at.
        """
        return self.thinking.passes(model, self.calls(model.plan), vocab_size)
