"""Which residual streams an answer depends on, by layer and token: residual erasure and integrated gradients (arXiv 2505.13898, figure 6).

f is the probability of the answer: of the target tokens at some positions of a prompt, added up. h_l is the residual stream that enters layer l.

* *Residual erasure*: h_l at token t is replaced by the mean of h_l over tokens; its effect is the drop f - f'. It says until which layer
  something is still read from a token.
* *Integrated gradients* (arXiv 1703.01365): with d = h_l - b and a baseline b, IG_lt = the sum over dimensions of d_t * the integral over a from 0 to 1 of
  df/dh_lt at b + a d, all tokens on the straight line together; midpoints of equal steps. Of each layer, their sum over tokens is f(h_l) - f(b).

That sum is told, as what it still lacks. From zero it lacks a jump that no number of steps resolves: a norm forgets its input's length but for a small
epsilon, so that f goes from f(0), where nothing is predicted, to what the direction of h_l predicts on a tiny part of the line, the smaller
the more layers follow. From the mean of h_l over tokens (the authors' code, too, does not begin at zero) there is no jump.

A pass begins at layer l, from the trace of the untouched one, and tokens (of an erasure) or steps (of an integral) go through together.
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

__all__ = ["STEPS", "Answer", "Baseline", "IntegratedGradients", "erasure_effects", "integrated_gradients"]

Baseline = Literal["zero", "mean"]
STEPS = 256
_TOKENS, _TOKENS_WITH_GRADIENTS = 4096, 512
"""Tokens of all rows of a pass: what is in memory at once. For gradients all that layers compute is kept."""


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
            self.probability = float(self.of(self.traced.final_BSD))

    def of(self, final_RSD: Tensor) -> Tensor:
        """f of what passes leave; fp64 [R]."""
        hidden_RAD = final_RSD[:, self.positions]
        logs_RAV = log_distribution(self._model, hidden_RAD.flatten(0, 1)).unflatten(0, hidden_RAD.shape[:2])
        targets_RA1 = self._targets_A.expand(len(final_RSD), -1).unsqueeze(2)
        return logs_RAV.gather(2, targets_RA1).squeeze(2).double().exp().sum(1)

    def resumed(self, place: int, rows: int, change: Change, *, gradients: bool = False) -> Tensor:
        """f of so many passes that begin with what enters a layer changed; fp64 [R]."""
        prompt_R = torch.zeros(rows, dtype=torch.long, device=self._targets_A.device)
        final_RSD = resume(self._model, self.traced, place, prompt_R, change, side="input", gradients=gradients)
        with torch.set_grad_enabled(gradients):
            return self.of(final_RSD)

    def together(self, tokens: int) -> int:
        """How many passes go through together, for so many tokens of them all."""
        return max(1, tokens // self.traced.final_BSD.shape[1])


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


def erasure_effects(answer: Answer, means_LD: Tensor | None = None) -> Tensor:
    """How much less probable the answer is without h_l at token t; fp64 [L, S].

    It is 0 for tokens after those at which the answer is predicted.

    Args:
        means_LD: what h_l is replaced by; default: its mean over the tokens of the prompt itself. The authors take that over other prompts.
    """
    layers = answer.traced.layers
    length = layers[0].h_BSD.shape[1]
    effects_LS = torch.zeros(len(layers), length, dtype=torch.float64)
    for place, layer in enumerate(layers):
        mean_D = layer.h_BSD[0].mean(0) if means_LD is None else means_LD[place]
        for token_R in torch.arange(answer.positions[-1] + 1, device=mean_D.device).split(answer.together(_TOKENS)):

            def erased(h_RSD: Tensor, _: object, token_R: Tensor = token_R, mean_D: Tensor = mean_D) -> Tensor:
                is_erased_RS1 = token_R.unsqueeze(1) == torch.arange(length, device=token_R.device)
                return torch.where(is_erased_RS1.unsqueeze(2), mean_D.to(h_RSD.dtype), h_RSD)

            drop_R = answer.probability - answer.resumed(place, len(token_R), erased)
            effects_LS[place, token_R.cpu()] = drop_R.cpu()
    return effects_LS


@dataclass(frozen=True)
class IntegratedGradients:
    """Of an answer's probability.

    Attributes:
        scores_LS: by layer and token, fp64.
        missing_L: f(h_l) - f(b) less the sum over tokens, fp64: 0 but for the width of the steps and rounding.
    """

    scores_LS: Tensor
    missing_L: Tensor


def integrated_gradients(answer: Answer, baseline: Baseline = "mean", steps: int = STEPS) -> IntegratedGradients:
    """By layer and token, on the straight line from a baseline: zero, or for every token the mean of h_l over tokens."""
    layers, rows = answer.traced.layers, answer.together(_TOKENS_WITH_GRADIENTS)
    at_N = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    scores_LS = torch.zeros(len(layers), layers[0].h_BSD.shape[1], dtype=torch.float64)
    missing_L = torch.zeros(len(layers), dtype=torch.float64)
    for place, layer in enumerate(layers):
        h_SD = layer.h_BSD[0]
        from_SD = torch.zeros_like(h_SD) if baseline == "zero" else h_SD.mean(0).expand_as(h_SD)
        line = _Line(answer, place, from_SD, h_SD - from_SD)
        for at_R in at_N.split(rows):
            scores_LS[place] += (line.gradients(at_R).sum(0) * line.difference_SD).sum(-1).cpu() / steps
        missing_L[place] = answer.probability - line.start() - scores_LS[place].sum()
    return IntegratedGradients(scores_LS, missing_L)


@dataclass(frozen=True)
class _Line:
    """From a baseline to what enters a layer: ``from_SD + a difference_SD``."""

    answer: Answer
    place: int
    from_SD: Tensor
    difference_SD: Tensor

    def start(self) -> float:
        """f of the baseline."""
        return float(self.answer.resumed(self.place, 1, lambda h_RSD, _: self.from_SD.expand_as(h_RSD)))

    def gradients(self, at_R: Tensor) -> Tensor:
        """df/dh_l at points of the line, fp64 [R, S, D]."""
        at_R11 = at_R.to(self.from_SD)[:, None, None]
        entered_RSD = (self.from_SD + at_R11 * self.difference_SD).requires_grad_()
        # rows do not see each other: the gradient of their sum is that of each
        total = self.answer.resumed(self.place, len(at_R), lambda *_: entered_RSD, gradients=True).sum()
        return torch.autograd.grad(total, entered_RSD)[0].double()
