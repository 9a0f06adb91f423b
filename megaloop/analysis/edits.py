"""Edits of a forward pass that change the order of execution: what is skipped, exchanged, reversed or repeated.

An edited order is executed as any other (``Decoder.run`` with those calls), so it computes bit for bit what a model with that plan would.
Places are those of executions: a looped layer has one for each time that it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megaloop.depth import LayerCall
from megaloop.errors import MegaloopError

__all__ = ["Calls", "exit_after", "repeat", "reverse", "skip", "swap"]

Calls = tuple[LayerCall, ...]


def skip(calls: Sequence[LayerCall], start: int, count: int = 1) -> Calls:
    """Leave out the executions at [start, start + count).

    What a loop adds before the first layer of a time, and its norm after the last, pass to the neighbour within that time. Of a time that is
    left out as a whole they are left out too; if it is the first, the loop is entered with the next.

    Raises:
        MegaloopError: there are no such places.
    """
    _check("skip", calls, start, count)
    before, left_out, after = list(calls[:start]), calls[start : start + count], list(calls[start + count :])
    if after and any(call.is_first and call.iteration == after[0].iteration for call in left_out):
        after[0] = replace(after[0], is_first=True)
    if before and any(call.is_last and call.iteration == before[-1].iteration for call in left_out):
        before[-1] = replace(before[-1], is_last=True)
    left = (*before, *after)
    lowest = min((call.iteration for call in left if call.iteration is not None), default=0)
    return tuple(call if call.iteration is None else replace(call, iteration=call.iteration - lowest) for call in left)


def swap(calls: Sequence[LayerCall], start: int, count: int = 1) -> Calls:
    """Exchange the blocks [start, start + count) and [start + count, start + 2 count)."""
    _check("swap", calls, start, 2 * count)
    middle = start + count
    order = (*range(middle, middle + count), *range(start, middle))
    return _exchanged(calls, start, order)


def reverse(calls: Sequence[LayerCall], start: int, count: int = 4) -> Calls:
    """Execute [start, start + count) from the last to the first."""
    _check("reverse", calls, start, count)
    return _exchanged(calls, start, tuple(reversed(range(start, start + count))))


def repeat(calls: Sequence[LayerCall], start: int, count: int, more: int) -> Calls:
    """Execute [start, start + count) ``more`` times more, one after the other (arXiv 2602.16490: loops at inference).

    A loop is entered once: a block that begins in it goes on with the state that entered. Where the block is part of a time, that time
    still has one beginning and one end; a whole time is one time more.
    """
    _check("repeat", calls, start, count)
    if more < 0:
        raise MegaloopError(f"repeat: {more} more times; expected 0 or more")
    block = tuple(calls[start : start + count])
    again = block
    if block[0].iteration is not None:
        again = tuple(replace(call, iteration=1) if call.iteration == 0 else call for call in block)
    copies = [block, *[again] * more]
    if len({call.iteration for call in block}) == 1 and not (block[0].is_first and block[-1].is_last):
        copies = [
            tuple(
                replace(call, is_first=call.is_first and number == 0, is_last=call.is_last and number == more)
                for call in copy
            )
            for number, copy in enumerate(copies)
        ]
    return (*calls[:start], *(call for copy in copies for call in copy), *calls[start + count :])


def exit_after(calls: Sequence[LayerCall], count: int) -> Calls:
    """The first ``count`` executions alone: norm and head read what they leave."""
    if not 0 <= count <= len(calls):
        raise MegaloopError(f"exit: after {count} layers of {len(calls)}")
    return tuple(calls[:count])


def _exchanged(calls: Sequence[LayerCall], start: int, order: Sequence[int]) -> Calls:
    """Layers in another order; what a loop does before and after a place stays with the place."""
    moved = [
        replace(calls[start + index], layer_id=calls[place].layer_id, iterations=calls[place].iterations)
        for index, place in enumerate(order)
    ]
    return (*calls[:start], *moved, *calls[start + len(order) :])


def _check(name: str, calls: Sequence[LayerCall], start: int, count: int) -> None:
    if count < 1 or not 0 <= start <= len(calls) - count:
        raise MegaloopError(
            f"{name}: layers {start} to {start + count} (exclusive) of a model that executes {len(calls)}; there are no such places"
        )
