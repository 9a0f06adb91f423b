"""Passes of a model over tokens that stand anywhere in their sequences, each token with as many loops as it needs.

    before ─► iteration 0 ─► iteration 1 ─► … ─► after ─► norm and head
                   │ those that have settled leave; the others are packed

B rows and S tokens of a pass, b and s of them those that still loop, D model, T slots of the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaloop.depth import LayerCall
from megaloop.errors import MegaloopError
from megaloop.inference.caches import CachePolicy, LoopCaches, Place, loop_iterations
from megaloop.inference.halting import Halting, Seen, Watch
from megaloop.inference.looping import Looping
from megaloop.model import AttentionContext, Decoder, LoopInput
from megaloop.model.layers import rotary_tables

__all__ = ["Begun", "Passes", "Thought"]


@dataclass(frozen=True)
class Thought:
    """What a pass made of its tokens.

    Attributes:
        hidden_BSD: the residual stream before the last norm.
        loops_BS: iterations that each token ran.
    """

    hidden_BSD: Tensor
    loops_BS: Tensor


@dataclass(frozen=True)
class Begun:
    """Tokens that have run the first calls of a model, which the rest can be run of.

    Attributes:
        x_BSD: the residual stream after them.
        entered_BSD: what entered the loop; None: nothing that is injected has.
        calls: how many.
    """

    x_BSD: Tensor
    entered_BSD: Tensor | None
    calls: int

    @classmethod
    def joined(cls, parts: Sequence[Begun]) -> Begun:
        """Tokens that were begun one after another, as if at once."""
        entered = [part.entered_BSD for part in parts if part.entered_BSD is not None]
        x_BSD = torch.cat([part.x_BSD for part in parts], 1)
        return cls(x_BSD, torch.cat(entered, 1) if entered else None, parts[0].calls)


class Passes:
    """A model, in which order its layers run, and when a token leaves its loop.

    Args:
        calls: the executions of layers; default: as trained.
        halting: None: every token runs all iterations.
        policy: which iterations keep keys and values.
        vocab_size: the tokenizer's tokens; rows of the embedding beyond them are never predicted.

    Raises:
        MegaloopError: halting, or fewer caches than iterations, of a model without a loop; a gate that it lacks.
    """

    def __init__(
        self,
        model: Decoder,
        calls: Sequence[LayerCall] | None = None,
        *,
        halting: Halting | None = None,
        policy: CachePolicy = CachePolicy(),
        vocab_size: int | None = None,
    ):
        self.model, self.halting, self.policy, self.vocab_size = model, halting, policy, vocab_size
        self.calls = model.plan.calls() if calls is None else tuple(calls)
        looped = [number for number, call in enumerate(self.calls) if call.iteration is not None]
        self.iterations = loop_iterations(self.calls)
        self._check(bool(looped))
        first, stop = (looped[0], looped[-1] + 1) if looped else (len(self.calls), len(self.calls))
        block = (stop - first) // self.iterations
        self._before, self._after = range(first), range(stop, len(self.calls))
        self._loop = [
            range(first + i * block, first + (i + 1) * block) for i in range(self.iterations if looped else 0)
        ]
        self._looked = self._looked_at()
        self._table: tuple[Tensor, Tensor] | None = None

    def _looked_at(self) -> list[tuple[int, range]]:
        """The parts of the loop after which the criterion is asked: how many iterations have run then, and the calls."""
        if self.halting is None or not self._loop:
            return []
        first = min(self.halting.first, self.iterations)
        whole = range(self._loop[0].start, self._loop[first - 1].stop)
        return [(first, whole), *enumerate(self._loop[first:], start=first + 1)]

    def _check(self, looped: bool) -> None:
        if self.halting is not None and not looped:
            raise MegaloopError(f"--halt {self.halting}: {self.why_no_loop}")
        if self.halting is not None and self.halting.minimum > self.iterations:
            raise MegaloopError(
                f"--min-loops {self.halting.minimum}: the loop runs {self.iterations} times at most; choose fewer, or more loops"
            )
        if self.policy.shared is not None and not looped:
            raise MegaloopError(f"--cache {self.policy}: {self.why_no_loop}")
        if self.halting is not None and self.halting.criterion == "gate" and not self.model.plan.style.gate:
            raise MegaloopError("--halt gate: the checkpoint has no gate; train one with loop.gate (docs/LOOPS.md)")

    def _is_exact_at_once(self, caches: LoopCaches) -> bool:
        """Whether tokens of a sequence that may halt can be run together and get what they get one after another.

        Iterations that share their caches overwrite each other's. And the layers after the loop see what they made of the
        tokens before: where they are asked after every iteration, those tokens have not come to their last one yet. (Tokens that
        leave together have.)
        """
        if not caches.is_full:
            return False
        halting = self.halting
        return halting is None or halting.scope == "sequence" or not (halting.reads_predictions and len(self._after))

    def caches(self, rows: int, length: int, policy: CachePolicy | None = None) -> LoopCaches:
        return LoopCaches(self.model, self.calls, rows, length, policy or self.policy)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary tables of at least that many positions, [T, h]."""
        if self._table is None or len(self._table[0]) < length:
            dtype = next(self.model.parameters()).dtype
            room = 1 << max(length - 1, 255).bit_length()  # generation asks for one more each time
            cos_Th, sin_Th = rotary_tables(self.model.config, room, self.model.device)
            self._table = cos_Th.to(dtype), sin_Th.to(dtype)
        return self._table

    def place(
        self, slots_BS: Tensor, length: int, *, positions_BS: Tensor | None = None, mask_BST: Tensor | None = None
    ) -> Place:
        """Tokens of the first B rows, in order, at these slots.

        Args:
            length: slots that are looked at.
            positions_BS: default: the slots.
            mask_BST: which slots each token sees; default: those up to its own.
        """
        positions_BS = slots_BS if positions_BS is None else positions_BS
        start, count = _common_start(slots_BS), slots_BS.shape[1]
        # plain causal attention needs no mask where there is one token, or none before; else one for all layers
        if mask_BST is None and (start is None or length != start + count or (start and count > 1)):
            mask_BST = torch.arange(length, device=slots_BS.device) <= slots_BS.unsqueeze(-1)
        cos, sin = (table[positions_BS].unsqueeze(1) for table in self.tables(max(length, int(positions_BS.max()) + 1)))
        return Place(None, slots_BS, length, AttentionContext(cos, sin, mask_BST), start)

    @torch.inference_mode()
    def context(self, tokens_BS: Tensor, place: Place, caches: LoopCaches) -> None:
        """Tokens whose predictions nobody asks for: all iterations, and only the caches remain."""
        self._run(range(len(self.calls)), tokens_BS, place, caches, first=True)

    @torch.inference_mode()
    def think(
        self,
        tokens_BS: Tensor,
        place: Place,
        caches: LoopCaches,
        asked_BS: Tensor | None = None,
        thresholds_BS: Tensor | None = None,
    ) -> Thought:
        """Tokens that predict, with as many iterations as each needs.

        Args:
            asked_BS: whose predictions count; the others run all iterations. Default: all.
            thresholds_BS: where the criterion's threshold depends on the place.
        """
        asked_BS = torch.ones_like(tokens_BS, dtype=torch.bool) if asked_BS is None else asked_BS
        thresholds_BS = None if thresholds_BS is None else thresholds_BS.expand_as(tokens_BS)
        if self._is_exact_at_once(caches) or tokens_BS.shape[1] == 1:
            return self._think(tokens_BS, place, caches, asked_BS, thresholds_BS)
        parts = []
        for column in range(tokens_BS.shape[1]):
            at = slice(column, column + 1)
            limits = None if thresholds_BS is None else thresholds_BS[:, at]
            parts.append(self._think(tokens_BS[:, at], place.column(column), caches, asked_BS[:, at], limits))
        hidden, loops = zip(*((part.hidden_BSD, part.loops_BS) for part in parts), strict=True)
        return Thought(torch.cat(hidden, 1), torch.cat(loops, 1))

    @property
    def is_looped(self) -> bool:
        return bool(self._loop)

    @property
    def why_no_loop(self) -> str:
        """What a model whose calls loop nothing is told, and what to do."""
        plan = self.model.plan
        if plan.loop is not None:
            return "the loop runs once; choose more loops"
        return (
            f"the model runs without a loop (depth {plan.notation}); give it one with --max-loops N (generate, eval) "
            "or --depth PRELUDE-RECURRENTxITERATIONS-CODA (generate, bench decode), or train it with one"
        )

    def calls_of(self, iterations: int) -> int:
        """How many calls come before the loop and in so many iterations of it."""
        return self._loop[iterations - 1].stop

    @torch.inference_mode()
    def begin(self, tokens_BS: Tensor, place: Place, caches: LoopCaches, calls: int) -> Begun:
        """The first ``calls`` calls alone."""
        entry = LoopInput()
        x_BSD = self._run(range(calls), tokens_BS, place, caches, first=True, entry=entry)
        return Begun(x_BSD, entry.state, calls)

    @torch.inference_mode()
    def finish(self, begun: Begun, place: Place, caches: LoopCaches) -> Tensor:
        """The calls that are left, to the residual stream before the last norm: with them, what all at once give."""
        entry = LoopInput(begun.entered_BSD)
        return self._run(range(begun.calls, len(self.calls)), begun.x_BSD, place, caches, entry=entry)

    @torch.inference_mode()
    def leave(self, begun: Begun, place: Place, caches: LoopCaches) -> Tensor:
        """What comes after the loop, as if it had ended where it is; its caches are then those of these states."""
        return self._run(self._after, begun.x_BSD, place, caches)

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        return self.model.logits(hidden_BSD)[..., : self.vocab_size]

    def _run(
        self,
        part: range,
        x: Tensor,
        place: Place,
        caches: LoopCaches,
        *,
        first: bool = False,
        entry: LoopInput | None = None,
    ) -> Tensor:
        if not part and not first:
            return x
        calls = self.calls[part.start : part.stop]
        return self.model.run(
            x, calls, caches=caches.at(part, place), first=first, last=False, entry=entry, context=place.context
        )

    def _think(
        self, tokens_BS: Tensor, place: Place, caches: LoopCaches, asked_BS: Tensor, limits_BS: Tensor | None
    ) -> Thought:
        """Iteration after iteration, with fewer and fewer tokens."""
        loops_BS = torch.full_like(tokens_BS, self.iterations)
        if self.halting is None:
            return Thought(self._run(range(len(self.calls)), tokens_BS, place, caches, first=True), loops_BS)
        x = self._run(self._before, tokens_BS, place, caches, first=True)
        looping, watch, left_BSD = Looping.all(x, place, asked_BS, limits_BS), Watch(self.halting), torch.empty_like(x)
        reads = self.halting.reads_predictions
        for iteration, part in self._looked:
            x = self._run(part, x, looping.place, caches, entry=LoopInput(looping.entered_bsD))
            out = self._run(self._after, x, looping.place, caches) if reads else x
            if iteration == self.iterations:
                left_BSD = self._leave(None, looping, out, iteration, left_BSD, loops_BS)
                if self.halting.criterion == "oracle":
                    said_M = watch.first_that_stays(self._seen(looping, x, out, iteration))
                    loops_BS.view(-1)[looping.asked(looping.index_bs)] = said_M
                    if self.halting.scope == "sequence":  # together, with the last of those that are asked
                        most_B1 = loops_BS.where(asked_BS, 0).amax(1, keepdim=True)
                        loops_BS = most_B1.where(most_B1 > 0, loops_BS)
                break
            settled_bs = self._settled(watch.settled(self._seen(looping, x, out, iteration)), looping)
            count = int(settled_bs.sum()) if iteration >= self.halting.minimum else 0
            if not count:
                continue
            who_bs = None if count == looping.count else settled_bs
            left_BSD = self._leave(who_bs, looping, out, iteration, left_BSD, loops_BS)
            caches.lend(looping.place, who_bs, iteration)
            if who_bs is None:
                break
            watch.keep(~looping.asked(settled_bs))
            looping, x = looping.without(settled_bs, x)
        return Thought(left_BSD if reads else self._run(self._after, left_BSD, place, caches), loops_BS)

    def _seen(self, looping: Looping, x_bsD: Tensor, out_bsD: Tensor, iteration: int) -> Seen:
        """What the criterion looks at: M tokens that are asked for."""
        assert self.halting is not None
        x_MD = looping.asked(x_bsD)
        logits_MV = self.logits(looping.asked(out_bsD).unsqueeze(0))[0] if self.halting.reads_predictions else None
        gate_M = self.model.gate_logits(x_MD.unsqueeze(0))[0] if self.halting.criterion == "gate" else None
        threshold = self.halting.threshold if looping.limits_bs is None else looping.asked(looping.limits_bs)
        return Seen(x_MD, logits_MV, gate_M, iteration, threshold)

    def _settled(self, settled_M: Tensor, looping: Looping) -> Tensor:
        """Who may leave: [b, s]."""
        settled_bs = looping.spread(settled_M)
        if self.halting is None or self.halting.scope == "token":
            return settled_bs
        together_b1 = (settled_bs | ~looping.asked_bs).all(1, keepdim=True) & looping.asked_bs.any(1, keepdim=True)
        return looping.real_bs & together_b1

    @staticmethod
    def _leave(
        who_bs: Tensor | None, looping: Looping, out_bsD: Tensor, iteration: int, left_BSD: Tensor, loops_BS: Tensor
    ) -> Tensor:
        """What has left so far, [B, S, D], with those that leave now; None: all that still loop."""
        if who_bs is None and looping.count == loops_BS.numel():  # nobody has left before
            loops_BS.fill_(iteration)
            return out_bsD
        who_bs = looping.real_bs if who_bs is None else who_bs
        index_N = looping.index_bs[who_bs]
        left_BSD.flatten(0, 1)[index_N] = out_bsD[who_bs]
        loops_BS.view(-1)[index_N] = iteration
        return left_BSD


def _common_start(slots_BS: Tensor) -> int | None:
    """The first slot, where all rows write to the same ones, one after another."""
    start = int(slots_BS[0, 0])
    following_S = torch.arange(start, start + slots_BS.shape[1], device=slots_BS.device)
    return start if torch.equal(slots_BS, following_S.expand_as(slots_BS)) else None
