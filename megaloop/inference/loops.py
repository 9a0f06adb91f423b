"""Loops at inference: which blocks of a model run how often."""

from __future__ import annotations

from dataclasses import dataclass

from megaloop.depth import DepthPlan, DepthSpec, Execution, with_inference_loop
from megaloop.errors import MegaloopError
from megaloop.text import parse_whole, printable

__all__ = ["Block", "EveryBlock", "InferenceDepth", "TooShallow", "inference_depth", "with_loops"]


@dataclass(frozen=True)
class Block:
    """Layers by place, [first, stop): what a loop runs."""

    first: int
    stop: int

    @classmethod
    def parse(cls, text: str) -> Block:
        """``"10:14"``."""
        first, separator, stop = text.partition(":")
        begin, end = parse_whole(first), parse_whole(stop)
        if not separator or begin is None or end is None or begin >= end:
            raise MegaloopError(f"--block {printable(text, 60)}: expected FIRST:STOP, places of layers, such as 10:14")
        return cls(begin, end)

    def __str__(self) -> str:
        return f"{self.first}:{self.stop}"


class TooShallow(MegaloopError):
    """A model has no block of that many layers."""


@dataclass(frozen=True)
class EveryBlock:
    """Every block of that many neighbouring layers, each by itself; of a model that was trained with a loop, that one."""

    size: int

    @classmethod
    def parse(cls, text: str) -> EveryBlock | Block:
        """``"every:2"``, or one block."""
        word, _, number = text.partition(":")
        if word != "every":
            return Block.parse(text)
        size = parse_whole(number)
        if not size:
            raise MegaloopError(
                f"--block {printable(text, 60)}: expected every:N with a number of layers, such as every:2"
            )
        return cls(size)

    def of(self, plan: DepthPlan) -> list[Block | None]:
        """The blocks of a model.

        Raises:
            TooShallow: it has fewer layers.
        """
        if plan.is_looped:
            return [None]
        if self.size > plan.layers:
            raise TooShallow(f"--block every:{self.size}: the model has {plan.layers} layers; choose fewer")
        return [Block(first, first + self.size) for first in range(plan.layers - self.size + 1)]


@dataclass(frozen=True)
class InferenceDepth:
    """One way to run a model: a block of layers ``loops`` times (1, None: every layer once)."""

    loops: int
    execution: Execution
    block: Block | None


def with_loops(plan: DepthPlan, loops: int | None, block: Block | None = None) -> Execution:
    """How to run a model with a loop at inference.

    Args:
        loops: None: as it was trained; 1: every layer once. A model that was trained with a loop changes how often
            that one runs; another loops ``block``.
        block: default: the four layers in the middle (fewer, where there are not as many).

    Raises:
        MegaloopError: the block does not fit the model.
    """
    return inference_depth(plan, loops, block).execution


def inference_depth(plan: DepthPlan, loops: int | None, block: Block | None) -> InferenceDepth:
    trained = plan.loop
    if plan.is_looped and trained is None:
        if loops is not None:
            raise MegaloopError(f"--loops: depth {plan.notation} is more than one loop; it runs as trained only")
        return InferenceDepth(1, Execution.as_trained(plan), None)
    if trained is not None:
        own = Block(trained.start, trained.start + trained.block)
        if block is not None and block != own:
            raise MegaloopError(f"--block {block}: the model was trained with a loop over {own}; leave --block out")
        if loops is None or loops == trained.iterations:
            return InferenceDepth(trained.iterations, Execution.as_trained(plan), own)
        block = own
    elif loops in (None, 1):
        return InferenceDepth(1, Execution.as_trained(plan), None)
    block = block or _middle(plan.layers)
    if block.stop > plan.layers:
        raise MegaloopError(
            f"--block {block}: the model has {plan.layers} layers; choose FIRST:STOP within 0:{plan.layers}"
        )
    count = loops or 1
    depth = DepthSpec.looped(block.first, block.stop - block.first, count, plan.layers - block.stop)
    return InferenceDepth(count, with_inference_loop(plan, depth), block)


def _middle(layers: int) -> Block:
    size = min(4, layers)
    first = (layers - size) // 2
    return Block(first, first + size)
