"""Which residual streams an answer depends on, by layer and token: residual erasure and integrated gradients (arXiv 2505.13898, figure 6).

The answer is what is predicted at some positions of a prompt, by default the last that has a target. h_l is the residual stream that enters layer l.

* *Residual erasure*: h_l at token t is replaced by the mean of h_l over the tokens of several prompts; its effect is the Euclidean distance of the distributions
  with and without it, the largest over the answer's positions (the authors' code: over all positions after t). It says until which layer something is
  still read from a token.
* *Integrated gradients* (arXiv 1703.01365): f is the probability of the answer's target tokens, added up. With d = h_l - b and a baseline b, IG_lt = the sum over dimensions of d_t * the integral over a from 0 to 1 of
  df/dh_lt at b + a d, all tokens on the straight line together; midpoints of equal steps. Of each layer, their sum over tokens is f(h_l) - f(b).

That sum is told, as what it still lacks. From zero it lacks a jump that no number of steps resolves: a norm forgets its input's length but for a small
epsilon, so that f goes from f(0), where nothing is predicted, to what the direction of h_l predicts on a tiny part of the line, the smaller
the more layers follow. From the mean of h_l over tokens (the authors' code, too, does not begin at zero) there is no jump.

A pass begins at layer l, from the trace of the untouched one, and tokens (of an erasure) or steps (of an integral) go through together. There are L * S
passes of an erasure, and 256 L with gradients of an integral: layers are what ranks share.
In a loop that injects the state that entered it, h_l has what was injected; what is injected later stays as it was.

Shape suffixes: L places of layers, S tokens, D model, R rows (tokens or steps), A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megaloop.analysis.lens import log_distribution
from megaloop.analysis.prompts import Prompt, Prompts
from megaloop.analysis.trace import Change, Trace, resume, trace
from megaloop.depth import LayerCall
from megaloop.errors import MegaloopError
from megaloop.model import Decoder

__all__ = ["STEPS", "Answer", "Baseline", "erasure_effects", "integrated_gradients"]

Baseline = Literal["zero", "mean"]
STEPS = 256
_TOKENS, _TOKENS_WITH_GRADIENTS = 4096, 512
"""Tokens of all rows of a pass: what is in memory at once. For gradients all that layers compute is kept."""
_HEAD_ROWS = 512
"""Positions whose distributions are in memory at once."""


class Answer:
    """A prompt's answer, and the pass that its probability is of.

    Args:
        positions: those whose targets are the answer; default: the last that has one.
        calls: the executions of layers; default: as trained.

    Attributes:
        traced: the untouched pass.
        positions: ascending.
        probability: f of the untouched pass; at most the number of positions.

    Raises:
        MegaloopError: the prompt has no target, or none at one of the positions.
    """

    def __init__(
        self,
        model: Decoder,
        prompt: Prompt,
        positions: Sequence[int] | None = None,
        calls: Sequence[LayerCall] | None = None,
    ):
        self.positions = _answers(prompt, positions)
        self._model = model
        batch = Prompts("", [prompt]).batch([0], model.device)
        self._targets_A = batch.targets_BS[0, self.positions]
        self.traced: Trace = trace(model, batch.tokens_BS, batch.documents_BS, calls)
        with torch.no_grad():
            self._untouched_AV = self._log_distributions(self.traced.final_BSD)[0].exp()
            self.probability = float(self.likelihood(self.traced.final_BSD))

    def likelihood(self, final_RSD: Tensor) -> Tensor:
        """f of what passes leave; fp64 [R]."""
        targets_RA1 = self._targets_A.expand(len(final_RSD), -1).unsqueeze(2)
        return self._log_distributions(final_RSD).gather(2, targets_RA1).squeeze(2).double().exp().sum(1)

    def distance(self, final_RSD: Tensor) -> Tensor:
        """How far what passes predict is from what the untouched one does, the largest over positions; fp64 [R]."""
        return (self._log_distributions(final_RSD).exp() - self._untouched_AV).norm(dim=2).amax(1).double()

    def _log_distributions(self, final_RSD: Tensor) -> Tensor:
        hidden_RAD = final_RSD[:, self.positions]
        return log_distribution(self._model, hidden_RAD.flatten(0, 1)).unflatten(0, hidden_RAD.shape[:2])

    def resumed(self, place: int, rows: int, change: Change, *, gradients: bool = False) -> Tensor:
        """What so many passes leave that begin with what enters a layer changed. [R, S, D]"""
        prompt_R = torch.zeros(rows, dtype=torch.long, device=self._targets_A.device)
        return resume(self._model, self.traced, place, prompt_R, change, side="input", gradients=gradients)

    def together(self, tokens: int) -> int:
        """How many passes go through together, for so many tokens of them all."""
        return max(1, min(tokens // self.traced.final_BSD.shape[1], _HEAD_ROWS // len(self.positions)))


def _answers(prompt: Prompt, positions: Sequence[int] | None) -> list[int]:
    possible = [position for position, target in enumerate(prompt.targets.tolist()) if target >= 0]
    if not possible:
        raise MegaloopError(
            "attribution: the prompt has no target; give one whose last token has a next one, or with targets"
        )
    chosen = possible[-1:] if positions is None else sorted(set(positions))
    if strangers := sorted(set(chosen) - set(possible)):
        raise MegaloopError(
            f"attribution: no target at position {strangers[0]}; positions count from 0, {possible[-1]} is the last with a target"
        )
    if not chosen:
        raise MegaloopError("attribution: no position of an answer; say at least one, or none at all for the last")
    return chosen


@torch.no_grad()
def erasure_effects(answer: Answer, place: int, mean_D: Tensor) -> Tensor:
    """How far the answer's distribution moves without h_l at each token; fp64 [S].

    It is 0 for tokens after those at which the answer is predicted.

    Args:
        place: the execution of a layer, from 0 on.
        mean_D: what h_l is replaced by.
    """
    length = answer.traced.layers[place].h_BSD.shape[1]
    effects_S = torch.zeros(length, dtype=torch.float64)
    for token_R in torch.arange(answer.positions[-1] + 1, device=mean_D.device).split(answer.together(_TOKENS)):

        def erased(h_RSD: Tensor, _: object, token_R: Tensor = token_R) -> Tensor:
            is_erased_RS1 = token_R.unsqueeze(1) == torch.arange(length, device=token_R.device)
            return torch.where(is_erased_RS1.unsqueeze(2), mean_D.to(h_RSD.dtype), h_RSD)

        effects_S[token_R.cpu()] = answer.distance(answer.resumed(place, len(token_R), erased)).cpu()
    return effects_S


def integrated_gradients(
    answer: Answer, place: int, baseline: Baseline = "mean", steps: int = STEPS
) -> tuple[Tensor, float]:
    """Of the answer's probability, by token, fp64 [S]; and f(h_l) - f(b) less their sum: 0 but for the width of the steps and rounding.

    Args:
        place: the execution of a layer, from 0 on.
        baseline: where the straight line to h_l begins: zero, or for every token the mean of h_l over tokens.
    """
    h_SD = answer.traced.layers[place].h_BSD[0]
    from_SD = torch.zeros_like(h_SD) if baseline == "zero" else h_SD.mean(0).expand_as(h_SD)
    line = _Line(answer, place, from_SD, h_SD - from_SD)
    at_N = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    scores_S = torch.zeros(len(h_SD), dtype=torch.float64)
    for at_R in at_N.split(answer.together(_TOKENS_WITH_GRADIENTS)):
        scores_S += (line.gradients(at_R).sum(0) * line.difference_SD).sum(-1).cpu() / steps
    return scores_S, answer.probability - line.start() - float(scores_S.sum())


@dataclass(frozen=True)
class _Line:
    """From a baseline to what enters a layer: ``from_SD + a difference_SD``."""

    answer: Answer
    place: int
    from_SD: Tensor
    difference_SD: Tensor

    def start(self) -> float:
        """f of the baseline."""
        with torch.no_grad():
            final_1SD = self.answer.resumed(self.place, 1, lambda h_RSD, _: self.from_SD.expand_as(h_RSD))
            return float(self.answer.likelihood(final_1SD))

    def gradients(self, at_R: Tensor) -> Tensor:
        """df/dh_l at points of the line, fp64 [R, S, D]."""
        at_R11 = at_R.to(self.from_SD)[:, None, None]
        entered_RSD = (self.from_SD + at_R11 * self.difference_SD).requires_grad_()
        with torch.enable_grad():
            final_RSD = self.answer.resumed(self.place, len(at_R), lambda *_: entered_RSD, gradients=True)
            total = self.answer.likelihood(
                final_RSD
            ).sum()  # rows do not see each other: the gradient of the sum is that of each
        return torch.autograd.grad(total, entered_RSD)[0].double()
