"""Self-speculation: a part of the model guesses the next tokens one by one, the rest of it checks them all in one pass.

    t ► d1 ► d2 ► … ► dn     prelude and iterations < m of each; coda, norm and head guess the one after it
    │   │    │         │     their states are kept
    └───┴────┴── … ────┴──►  iterations m … L-1, coda, norm and head of all at once: d1 … dk were right, and one token more

What a draft has run is what the full run begins with, keys and values included, as long as the tokens before it are right; so the
check goes on from there and nothing is computed twice but the coda, whose keys and values it overwrites. What was guessed wrong
stays in the caches' slots until the tokens that come there instead overwrite it; nothing looks at it until then.

Tokens are accepted by the rule of Leviathan et al. (arXiv 2211.17192, algorithm 1), which leaves the distribution of plain
generation; greedily, with all probability on the likeliest token, that is the very token of plain generation, as far as passes
over several tokens round as those over one do.

B rows, n tokens drafted, S = n + 1 checked, D model, V vocabulary; p probabilities of the full model, q those of drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaloop.errors import MegaloopError
from megaloop.inference.caches import LoopCaches, Place
from megaloop.inference.passes import Begun, Passes
from megaloop.inference.sampling import Sampling

__all__ = ["Draft", "EarlyExit", "Speculation", "Speculator"]


@dataclass(frozen=True)
class EarlyExit:
    """Where a model without a loop drafts, and how it reads a guess there.

    Attributes:
        layers: that a draft runs.
        lens: what norm and head are to read instead of the residual stream [B, 1, D] that has passed that many layers, such
            as ``megaloop.analysis.tuned_lens.TunedLens`` (arXiv 2303.08112); called with ``layers`` and that stream.
    """

    layers: int
    lens: Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class Speculation:
    """How tokens are drafted.

    Attributes:
        tokens: drafted before each check, at most: fewer where a sequence ends before.
        draft_loops: iterations that a draft runs. With a loop that only inference has (``with_inference_loop``), one iteration
            is the model as it was trained, without the repetition.
        exit: drafts by early exit instead, of a model without a loop.
    """

    tokens: int
    draft_loops: int = 1
    exit: EarlyExit | None = None

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise MegaloopError(f"--speculate {self.tokens}: expected a number of tokens to draft, at least 1")
        if self.draft_loops < 1:
            raise MegaloopError(f"--draft-loops {self.draft_loops}: a draft runs the loop at least once")


@dataclass(frozen=True)
class Draft:
    """A sequence that goes on.

    Attributes:
        token: the next that goes through the model.
        cached: tokens in the caches.
        most: tokens to draft for it; 0: it takes one step of plain generation.
        generator: what it draws with.
    """

    token: int
    cached: int
    most: int
    generator: torch.Generator


class Speculator:
    """Drafts and checks.

    Raises:
        MegaloopError: halting or shared caches beside it; drafts that run as much as the full model, or of a model that
            has nothing to leave out.
    """

    def __init__(self, passes: Passes, how: Speculation, sampling: Sampling):
        self._passes, self._how, self._sampling = passes, how, sampling
        shown = f"--speculate {how.tokens}"
        if passes.halting is not None:
            raise MegaloopError(
                f"{shown}: with --halt {passes.halting} the tokens of plain generation depend on where each leaves its loop, "
                "which a draft does not know; use one of the two"
            )
        if passes.policy.shared is not None and passes.policy.shared < passes.iterations:
            raise MegaloopError(
                f"{shown}: with --cache {passes.policy} a token sees what later iterations made of those before it, to which "
                "drafts have not come yet; use --cache full"
            )
        self._calls = self._draft_calls(shown)

    def _draft_calls(self, shown: str) -> int:
        """How many calls a draft runs before its guess is read."""
        passes, how = self._passes, self._how
        if how.exit is not None:
            if passes.is_looped:
                raise MegaloopError(
                    f"{shown}: early exit is for models without a loop; this one drafts with --draft-loops"
                )
            if not 0 < how.exit.layers < len(passes.calls):
                raise MegaloopError(
                    f"{shown}: drafts that exit after {how.exit.layers} of {len(passes.calls)} layers; expected at least 1, "
                    f"and fewer than {len(passes.calls)}"
                )
            return how.exit.layers
        if not passes.is_looped:
            raise MegaloopError(f"{shown}: {passes.why_no_loop}")
        if how.draft_loops >= passes.iterations:
            raise MegaloopError(
                f"--draft-loops {how.draft_loops}: the loop runs {passes.iterations} times, and drafts must run fewer"
            )
        return passes.calls_of(how.draft_loops)

    def step(self, drafts: Sequence[Draft], caches: LoopCaches) -> list[list[int]]:
        """The next tokens of each sequence: what was guessed right, and one more.

        A sequence that gets N tokens has N more in its caches, the first B rows, whose slots must reach :attr:`Draft.cached`
        and the most tokens that any sequence drafts.
        """
        most = max(draft.most for draft in drafts)
        guessed: list[list[int]] = [[draft.token] for draft in drafts]
        begun: list[Begun] = []
        q: list[Tensor] = []
        whole = self._place(drafts, most + 1)
        for number in range(most + 1):
            tokens_B1 = self._tensor([tokens[-1:] for tokens in guessed])
            place = whole.column(number)
            begun.append(self._passes.begin(tokens_B1, place, caches, self._calls))
            if number < most:
                q.append(self._guess(begun[-1], place, caches, drafts, guessed))
        hidden_BSD = self._passes.finish(Begun.joined(begun), whole, caches)
        p_BSV = self._sampling.probabilities(self._passes.logits(hidden_BSD))
        q_BSV = torch.stack([*q, torch.zeros_like(p_BSV[:, 0])], 1)  # nothing was guessed after the last
        return self._accepted(drafts, guessed, p_BSV, q_BSV)

    def _guess(
        self, begun: Begun, place: Place, caches: LoopCaches, drafts: Sequence[Draft], guessed: list[list[int]]
    ) -> Tensor:
        """One token more for each sequence that drafts on, from these probabilities [B, V]; the others repeat their last."""
        if self._how.exit is None:
            hidden_B1D = self._passes.leave(begun, place, caches)
        else:
            hidden_B1D = self._how.exit.lens(self._how.exit.layers, begun.x_BSD)
        q_BV = self._sampling.probabilities(self._passes.logits(hidden_B1D)[:, -1])
        on = [row for row, draft in enumerate(drafts) if draft.most >= len(guessed[row])]
        tokens = dict(zip(on, self._sampling.pick(q_BV[on], [drafts[row].generator for row in on]), strict=True))
        for row, own in enumerate(guessed):
            own.append(tokens.get(row, own[-1]))
        return q_BV

    def _accepted(
        self, drafts: Sequence[Draft], guessed: list[list[int]], p_BSV: Tensor, q_BSV: Tensor
    ) -> list[list[int]]:
        """Guesses with probability min(1, p / q) up to the first that is not, and instead of that one a draw from (p - q)+."""
        rows, size = p_BSV.shape[:2]
        guess_BS1 = self._tensor([[*tokens[1:], 0] for tokens in guessed]).unsqueeze(-1)
        p_BS, q_BS = (table.gather(-1, guess_BS1).squeeze(-1) for table in (p_BSV, q_BSV))
        drawn_BS = torch.zeros_like(p_BS)
        for row, draft in enumerate(drafts):
            drawn_BS[row, : draft.most] = torch.rand(draft.most, generator=draft.generator, device=p_BS.device)
        most_B1 = self._tensor([[draft.most] for draft in drafts])
        right_BS = (drawn_BS * q_BS < p_BS) & (torch.arange(size, device=p_BS.device) < most_B1)
        count_B = right_BS.int().cumprod(1).sum(1)
        at = torch.arange(rows, device=p_BS.device), count_B
        p_BV = p_BSV[at]
        left_BV = (p_BV - q_BSV[at] * (count_B.unsqueeze(1) < most_B1)).clamp_min(0)
        left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, p_BV)  # p = q but for rounding
        more = self._sampling.pick(left_BV, [draft.generator for draft in drafts])
        return [
            [*tokens[1 : 1 + count], last] for tokens, count, last in zip(guessed, count_B.tolist(), more, strict=True)
        ]

    def _place(self, drafts: Sequence[Draft], count: int) -> Place:
        """The next tokens of each sequence."""
        slots_BS = self._tensor([[draft.cached + at for at in range(count)] for draft in drafts])
        return self._passes.place(slots_BS, max(draft.cached for draft in drafts) + count)

    def _tensor(self, values: list[list[int]]) -> Tensor:
        return torch.tensor(values, device=self._passes.model.device)
