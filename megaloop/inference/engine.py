"""Many sequences generated together: each step is one pass over one token of each, and who has ended makes room for the next.

Where the model drafts for itself (:mod:`megaloop.inference.speculation`), a step brings each sequence one token or several.

A sequence's tokens do not depend on what runs beside it: every row has its own positions, caches, number of loops and generator.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megaloop.inference.caches import CachePolicy, LoopCaches
from megaloop.inference.passes import Passes
from megaloop.inference.sampling import Sampling
from megaloop.inference.speculation import Draft, Speculation, Speculator

__all__ = ["Engine", "Event", "Request", "Stopped"]

Stopped = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Request:
    """A sequence to be continued.

    Attributes:
        tokens: the prompt; empty: a new document, which begins after the end of another.
        max_tokens: to generate at most.
        seed: of what is drawn.
        should_stop: asked with all tokens generated so far.
    """

    tokens: Sequence[int]
    max_tokens: int
    seed: int = 0
    should_stop: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True)
class Event:
    """A token has come.

    Attributes:
        number: of the request.
        loops: iterations that its prediction took.
        stopped: why it is the last one: ``end`` (the model ended the text), ``stop`` (``should_stop``), ``length``; None: it is not.
        drafted: tokens that the model has drafted for the request so far.
        accepted: those of them that came into the text.
    """

    number: int
    token: int
    loops: int
    stopped: Stopped | None
    drafted: int = 0
    accepted: int = 0


@dataclass
class _Row:
    """A sequence under way.

    Attributes:
        token: the next that goes through the model.
        cached: tokens in the caches.
        next: logits [V] of the token after ``token``, and the iterations that they took; None: not computed yet.
        drafted, accepted: as in :class:`Event`.
    """

    number: int
    request: Request
    generator: torch.Generator
    token: int
    cached: int = 0
    produced: list[int] = field(default_factory=list)
    next: tuple[Tensor, int] | None = None
    drafted: int = 0
    accepted: int = 0


class Engine:
    """Continues sequences with a model.

    Args:
        rows: sequences at a time, at most.
        chunk: tokens of a prompt that go through the model together.
        end_id: what ends a document, and so stands before the next; -1: there is none.
        speculate: how the model drafts for itself; None: it does not.

    Raises:
        MegaloopError: the model cannot draft so, or not with its halting or caches.
    """

    def __init__(
        self,
        passes: Passes,
        sampling: Sampling = Sampling(),
        *,
        rows: int = 16,
        chunk: int = 512,
        end_id: int = -1,
        speculate: Speculation | None = None,
    ):
        self._passes, self._sampling, self._chunk, self._end_id = passes, sampling, chunk, end_id
        self._most_rows = rows
        self._drafts = speculate.tokens if speculate is not None else 0
        self._speculator = Speculator(passes, speculate, sampling) if speculate is not None else None
        self._device = passes.model.device
        self._prompt_halts = passes.halting is not None and passes.halting.scope == "sequence"

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Tokens as they come, those of several sequences in turn."""
        waiting = deque(enumerate(requests))
        if not waiting:
            return
        longest = max(max(len(request.tokens), 1) + request.max_tokens for _, request in waiting)
        caches = self._passes.caches(min(self._most_rows, len(waiting)), longest + self._drafts)
        rows: list[_Row] = []
        while waiting or rows:
            admitted = [self._row(*waiting.popleft()) for _ in range(min(self._most_rows - len(rows), len(waiting)))]
            admitted.sort(key=lambda row: len(row.request.tokens), reverse=True)
            self._prefill(admitted, caches, len(rows))
            if self._speculator is None:
                self._step(rows + [row for row in admitted if row.next is None], caches)
                rows += admitted
                events = self._choose(rows)
            else:
                rows += admitted
                events = self._speculate(self._speculator, rows, caches)
            yield from events
            ended = {event.number for event in events if event.stopped is not None}
            for place in reversed(range(len(rows))):
                if rows[place].number in ended:
                    if place != len(rows) - 1:
                        caches.move(len(rows) - 1, place, rows[-1].cached)
                    rows[place] = rows[-1]
                    rows.pop()

    def _row(self, number: int, request: Request) -> _Row:
        generator = torch.Generator(device=self._device).manual_seed(request.seed)
        return _Row(number, request, generator, request.tokens[-1] if request.tokens else self._end_id)

    def _prefill(self, rows: Sequence[_Row], caches: LoopCaches, first: int) -> None:
        """Prompts into the caches' rows from ``first`` on; the longest stand first.

        Without their last tokens, which :meth:`_step` takes; where a prompt halts with it as one, with it.
        """
        last = 0 if self._prompt_halts else 1
        prompts = [[*(row.request.tokens or [self._end_id])] for row in rows]
        prompts = [prompt[: len(prompt) - last] for prompt in prompts]
        length = len(prompts[0]) if prompts else 0
        if not length:
            return
        full = self._passes.caches(len(rows), length, CachePolicy())
        for start in range(0, length, length if self._prompt_halts else self._chunk):
            pieces = [prompt[start : start + (length if self._prompt_halts else self._chunk)] for prompt in prompts]
            pieces = [piece for piece in pieces if piece]
            size = len(pieces[0])  # shorter ones repeat their last token, at its place
            tokens_BS = self._tensor([piece + piece[-1:] * (size - len(piece)) for piece in pieces])
            slots_BS = self._tensor([[start + min(at, len(piece) - 1) for at in range(size)] for piece in pieces])
            place = self._passes.place(slots_BS, start + size)
            if not self._prompt_halts:
                self._passes.context(tokens_BS, place, full)
                continue
            asked_BS = self._tensor([[at == len(piece) - 1 for at in range(size)] for piece in pieces])
            thought = self._passes.think(tokens_BS, place, full, asked_BS, self._limits(rows))
            logits_BV = self._passes.logits(thought.hidden_BSD[asked_BS].unsqueeze(1))[:, 0]
            for row, logits_V, loops in zip(rows, logits_BV, thought.loops_BS[asked_BS].tolist(), strict=True):
                row.next = logits_V, loops
        caches.take(full, range(first, first + len(rows)), length)
        for row, prompt in zip(rows, prompts, strict=True):
            row.cached = len(prompt)

    def _step(self, rows: Sequence[_Row], caches: LoopCaches) -> None:
        """One token of each through the model."""
        if not rows:
            return
        place = self._passes.place(self._tensor([[row.cached] for row in rows]), max(row.cached for row in rows) + 1)
        tokens_B1 = self._tensor([[row.token] for row in rows])
        thought = self._passes.think(tokens_B1, place, caches, thresholds_BS=self._limits(rows))
        logits_BV = self._passes.logits(thought.hidden_BSD)[:, -1]
        for row, logits_V, loops in zip(rows, logits_BV, thought.loops_BS[:, -1].tolist(), strict=True):
            row.next = logits_V, loops
            row.cached += 1

    def _choose(self, rows: Sequence[_Row]) -> list[Event]:
        """The next token of each."""
        ready = [row.next for row in rows if row.next is not None]
        tokens = self._sampling.choose(
            torch.stack([logits_V for logits_V, _ in ready]), [row.generator for row in rows]
        )
        events = []
        for row, token, (_, loops) in zip(rows, tokens, ready, strict=True):
            row.next = None
            events.append(self._event(row, token, loops))
        return events

    def _speculate(self, speculator: Speculator, rows: Sequence[_Row], caches: LoopCaches) -> list[Event]:
        """The next tokens of each, up to the one that ends it."""
        drafts = [Draft(row.token, row.cached, self._most_drafts(row), row.generator) for row in rows]
        events = []
        for row, draft, tokens in zip(rows, drafts, speculator.step(drafts, caches), strict=True):
            row.cached += len(tokens)
            row.drafted += draft.most
            for place, token in enumerate(tokens):
                row.accepted += place < len(tokens) - 1
                events.append(self._event(row, token, self._passes.iterations))
                if events[-1].stopped is not None:
                    break
        return events

    def _most_drafts(self, row: _Row) -> int:
        """None before a document's first token: those after it do not see what that one sees (:meth:`_event`)."""
        if self._begins_document(row, 0):
            return 0
        return min(self._drafts, max(row.request.max_tokens - len(row.produced) - 1, 0))

    def _begins_document(self, row: _Row, produced: int) -> bool:
        """Whether that many tokens have come, and the first attends to the end of another document, as in training."""
        return not row.request.tokens and len(row.produced) == produced and self._passes.model.config.document_masking

    def _event(self, row: _Row, token: int, loops: int) -> Event:
        row.produced.append(token)
        row.token = token
        if self._begins_document(row, 1):
            row.cached = 0  # as in training, the tokens of a document do not look back to the end of the one before
        return Event(row.number, token, loops, self._stopped(row), row.drafted, row.accepted)

    def _stopped(self, row: _Row) -> Stopped | None:
        if row.produced[-1] == self._end_id:
            return "end"
        if row.request.should_stop is not None and row.request.should_stop(row.produced):
            return "stop"
        return "length" if len(row.produced) >= row.request.max_tokens else None

    def _limits(self, rows: Sequence[_Row]) -> Tensor | None:
        """Thresholds [B, 1] that depend on how far a sequence has come."""
        halting = self._passes.halting
        if halting is None or halting.decay is None:
            return None
        limits = [[halting.threshold_at(len(row.produced), row.request.max_tokens)] for row in rows]
        return torch.tensor(limits, device=self._device)

    def _tensor(self, values: list[list[int]] | list[list[bool]]) -> Tensor:
        return torch.tensor(values, device=self._device)
