"""A trace of a forward pass: what every execution of a layer reads and adds. And a pass that begins in the middle of a trace.

Both walk through the model's own code (``Decoder.run``) and put a function in the place of a layer; the model itself is left as it is.

Shape suffixes: B prompts, S positions, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megaloop.depth import LayerCall
from megaloop.model import AttentionContext, Decoder, DecoderLayer, LoopInput

__all__ = ["Change", "LayerTrace", "Side", "Trace", "Watch", "execute_layer", "resume", "trace"]


@dataclass(frozen=True)
class LayerTrace:
    """One execution of a layer.

    Attributes:
        call: which layer it is, and which time of a loop.
        before_BSD: the model's state before it, which is what a pass begins with that resumes here.
        h_BSD: the residual stream that enters the layer; other than ``before_BSD`` where a loop injects the state that entered it.
        attention_BSD, mlp_BSD: what they add, as they add it (scaled, where the loop scales).
        after_BSD: what leaves the layer, before a loop's norm.
    """

    call: LayerCall
    before_BSD: Tensor
    h_BSD: Tensor
    attention_BSD: Tensor
    mlp_BSD: Tensor
    after_BSD: Tensor

    @property
    def delta_BSD(self) -> Tensor:
        """What the layer adds: d_l = a_l + m_l."""
        return self.attention_BSD + self.mlp_BSD


@dataclass(frozen=True)
class Trace:
    """Of one forward pass over a batch of prompts.

    Attributes:
        layers: every execution, in order.
        final_BSD: the residual stream after the last, which the final norm reads.
        documents_BS: as the pass was given them.
    """

    layers: list[LayerTrace]
    final_BSD: Tensor
    documents_BS: Tensor | None = None
    _entries: list[LoopInput] = field(default_factory=list, repr=False)

    @property
    def calls(self) -> tuple[LayerCall, ...]:
        return tuple(layer.call for layer in self.layers)

    def entry(self, place: int, rows: Tensor) -> LoopInput:
        """With which state the loop was entered that a pass from a place on is in, of some of the prompts."""
        state = self._entries[place].state
        return LoopInput(None if state is None else state[rows])


@torch.no_grad()
def trace(
    model: Decoder,
    tokens_BS: Tensor,
    documents_BS: Tensor | None = None,
    calls: Sequence[LayerCall] | None = None,
) -> Trace:
    """Run a model over prompts and keep what each execution of a layer reads and adds.

    Prompts of different lengths are filled up at their end: what stands before is not changed by it.

    Args:
        documents_BS: attention stays inside documents.
        calls: the executions of layers; default: as trained.
    """
    calls = model.plan.calls() if calls is None else calls
    context = model.attention_context(tokens_BS.shape[1], 0, documents_BS, tokens_BS.device)
    entry, entries, layers = LoopInput(), [], []
    x = model.run(tokens_BS, (), first=True, last=False, context=context)
    for call in calls:
        before, recorded = x, _Recorder()
        entries.append(LoopInput(entry.state))
        x = model.run(x, [call], first=False, last=False, entry=entry, context=context, execute=recorded)
        layers.append(LayerTrace(call, before, *recorded.parts))
    return Trace(layers, x, documents_BS, entries)


class _Recorder:
    """Executes a layer as the layer does, and keeps the parts."""

    def __init__(self) -> None:
        self.parts: tuple[Tensor, Tensor, Tensor, Tensor]

    def __call__(
        self, call: LayerCall, layer: DecoderLayer, x: Tensor, context: AttentionContext, scale: float, factor: float
    ) -> Tensor:
        after, attention, mlp = execute_layer(layer, x, context, scale, factor)
        self.parts = (x, attention, mlp, after)
        return after


def execute_layer(
    layer: DecoderLayer, x: Tensor, context: AttentionContext, scale: float, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What leaves a layer, bit for bit as its own ``forward`` has it, and what attention and MLP add."""
    attention = layer.attend(x, context, None, factor)
    middle = torch.add(x, attention, alpha=scale)
    mlp = layer.transform(middle, factor)
    after = torch.add(middle, mlp, alpha=scale)
    return (after, attention, mlp) if scale == 1.0 else (after, attention * scale, mlp * scale)


Change = Callable[[Tensor, LayerTrace], Tensor]
Watch = Callable[[int, Tensor], None]
Side = Literal["input", "output"]


def resume(
    model: Decoder,
    traced: Trace,
    place: int,
    rows: Tensor,
    change: Change,
    watch: Watch | None = None,
    *,
    side: Side = "output",
    gradients: bool = False,
) -> Tensor:
    """The final residual stream of a pass that goes on from a place of a trace, with that layer's input or output changed. [R, S, D]

    Args:
        rows: which prompts of the trace, int64 [R]; a prompt may occur several times.
        change: what enters or leaves the layer at ``place``, from what entered it [R, S, D] and its trace.
        watch: called with the place of every later layer and what it adds [R, S, D].
        side: what is changed. Of the output: the layer itself does not run. Of the input: what a loop injects is in it already, and what it
            injects later stays as it was.
        gradients: the pass is recorded, so that what it leaves can be differentiated by what ``change`` puts in.
    """
    layer = traced.layers[place]
    documents = None if traced.documents_BS is None else traced.documents_BS[rows]
    context = model.attention_context(layer.h_BSD.shape[1], 0, documents, layer.h_BSD.device)
    at = place

    def execute(
        call: LayerCall, module: DecoderLayer, x: Tensor, context: AttentionContext, scale: float, factor: float
    ) -> Tensor:
        nonlocal at
        if at == place:
            x = change(x, layer)
        if at > place or side == "input":
            x, attention, mlp = execute_layer(module, x, context, scale, factor)
            if watch is not None and at > place:
                watch(at, attention + mlp)
        at += 1
        return x

    with torch.set_grad_enabled(gradients):
        return model.run(
            layer.before_BSD[rows],
            traced.calls[place:],
            first=False,
            last=False,
            entry=traced.entry(place, rows),
            context=context,
            execute=execute,
        )
