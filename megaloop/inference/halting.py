"""When a token has looped enough: criteria that are asked after every iteration of a loop.

Each but ``fixed``, ``argmax`` and ``oracle`` measures a distance that falls as a token settles, and halts below a threshold;
with the threshold 0 every iteration runs. M tokens that still loop, D model, V vocabulary.

    kl          KL(prediction of the iteration before || of this one), nats        arXiv 2502.05171, section 6.1; 5e-4 there
    entropy     change of the prediction's entropy, nats                           2502.05171's code; 1e-3
    latent      |x - x before| / |x|                                               2502.05171's code; 0.03
    cosine      1 - cosine of x and x before                                       2502.05171's code; CALM; 1e-3
    confidence  1 - (p of the likeliest - p of the second)                         CALM, arXiv 2207.07061, section 3.3
    gate        1 - learned probability of having halted                           Ouro, arXiv 2510.25741
    argmax      the likeliest token was the same N times in a row                  2502.05171's code; 5
    fixed       after N iterations
    oracle      as soon as the likeliest token is that after the last iteration; all of them run: a bound, which saves nothing
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megaloop.errors import MegaloopError
from megaloop.text import parse_whole, printable

__all__ = ["Criterion", "Halting", "Scope", "Watch"]

Criterion = Literal["kl", "entropy", "latent", "cosine", "confidence", "gate", "argmax", "fixed", "oracle"]
Scope = Literal["token", "sequence"]
_OF_PREDICTION = {"kl", "entropy", "confidence", "argmax", "oracle"}
_COUNTS = {"argmax", "fixed"}
_LARGEST = {"cosine": 2.0, "confidence": 1.0, "gate": 1.0}
"""Above these a criterion would halt everything at once."""


@dataclass(frozen=True)
class Halting:
    """How tokens leave a loop.

    Attributes:
        threshold: of the distance; of ``argmax`` and ``fixed`` a number of iterations, 0: never.
        minimum: iterations that every token runs.
        scope: ``token``: each token for itself, and a prompt before its last token runs in full; ``sequence``: the tokens of
            a sequence that are run together, its prompt to begin with, leave together, when all that are asked have settled.
        decay: of ``confidence``: the threshold on confidence begins higher by up to 0.1 and falls by exp(-decay t / N) over the
            N tokens of a sequence (CALM, section 3.3, equation 5); None: the same everywhere.
    """

    criterion: Criterion
    threshold: float = 0.0
    minimum: int = 1
    scope: Scope = "token"
    decay: float | None = None

    def __post_init__(self) -> None:
        if self.minimum < 1:
            raise MegaloopError(f"--min-loops {self.minimum}: a loop runs at least once")
        if self.decay is not None and self.criterion != "confidence":
            raise MegaloopError(
                f"--halt-decay is of CALM's confidence, and --halt is {self.criterion}; use --halt confidence=..."
            )
        if self.decay is not None and not (self.decay >= 0 and math.isfinite(self.decay)):
            raise MegaloopError(f"--halt-decay {self.decay}: expected a number of at least 0, such as 4")

    @classmethod
    def parse(cls, text: str, *, minimum: int = 1, scope: Scope = "token", decay: float | None = None) -> Halting:
        """``"kl=5e-4"``, ``"argmax=3"``, ``"oracle"``.

        Raises:
            MegaloopError: an unknown criterion, or a threshold that it cannot have.
        """
        name, separator, value = text.partition("=")
        criterion = next((known for known in _MEASURES if known == name), None)
        if criterion is None:
            raise MegaloopError(f"--halt {printable(text, 60)}: no such criterion; choose from {', '.join(_MEASURES)}")
        shown = f"--halt {printable(text, 60)}"
        if criterion == "oracle":
            if separator:
                raise MegaloopError(f"{shown}: the oracle has no threshold; write --halt oracle")
            return cls("oracle", minimum=minimum, scope=scope, decay=decay)
        return cls(criterion, _threshold(name, value, shown), minimum, scope, decay)

    def __str__(self) -> str:
        if self.criterion == "oracle":
            return self.criterion
        short = f"{self.threshold:g}"
        return f"{self.criterion}={short if float(short) == self.threshold else repr(self.threshold)}"

    @property
    def reads_predictions(self) -> bool:
        """Whether it needs what comes after the loop, norm and head included, after every iteration."""
        return self.criterion in _OF_PREDICTION

    @property
    def first(self) -> int:
        """The first iteration after which it must be asked: ``fixed`` knows when, the others remember all that came before."""
        if self.criterion != "fixed":
            return 1
        return max(int(self.threshold), self.minimum) if self.threshold else sys.maxsize

    def threshold_at(self, place: int, length: int) -> float:
        """The distance below which the token at that place (from 0) of ``length`` halts."""
        if self.decay is None or self.threshold == 0:
            return self.threshold
        confidence = 0.9 * (1 - self.threshold) + 0.1 * math.exp(-self.decay * place / max(length, 1))
        return 1 - min(max(confidence, 0.0), 1.0)


def _threshold(name: str, value: str, shown: str) -> float:
    if name in _COUNTS:
        count = parse_whole(value)
        if count is None:
            raise MegaloopError(f"{shown}: expected {name}=N, a whole number of iterations (0: never)")
        return count
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    largest = _LARGEST.get(name, math.inf)
    if not 0 <= threshold <= largest or math.isinf(threshold):
        limit = "" if math.isinf(largest) else f" to {largest:g}"
        raise MegaloopError(f"{shown}: expected {name}=THRESHOLD, a number from 0{limit} (0: never)")
    return threshold


@dataclass
class Seen:
    """What a criterion looks at after an iteration.

    Attributes:
        x_MD: the state that left it.
        logits_MV: what that predicts; None: not asked for.
        gate_M: the gate's logits; None: not asked for.
        iteration: how many have run.
        threshold: the distance below which a token halts: one, or [M].
    """

    x_MD: Tensor
    logits_MV: Tensor | None
    gate_M: Tensor | None
    iteration: int
    threshold: Tensor | float


class Watch:
    """The memory of a criterion over the iterations of the same tokens."""

    def __init__(self, halting: Halting):
        self._minimum = halting.minimum
        self._measure = _MEASURES[halting.criterion]
        self._before: Tensor | None = None

    def settled(self, seen: Seen) -> Tensor:
        """Which of the M tokens may halt after this iteration; booleans."""
        settled_M, self._before = self._measure(seen, self._before)
        return settled_M

    def first_that_stays(self, seen: Seen) -> Tensor:
        """Of the oracle, after the last iteration: how many it took until the likeliest token was the last one's."""
        _, tokens_MI = self._measure(seen, self._before)
        first_M = (tokens_MI == tokens_MI[:, -1:]).int().argmax(1) + 1  # argmax: the first of equals
        return first_M.clamp_min(self._minimum)

    def keep(self, stay_M: Tensor) -> None:
        """Only these tokens go on."""
        if self._before is not None:
            self._before = self._before[stay_M]


Measure = Callable[[Seen, Tensor | None], tuple[Tensor, Tensor]]
"""What is seen, and what was kept of the iteration before, to who has settled and what is to be kept."""


def _by_distance(keep: Callable[[Seen], Tensor], distance: Callable[[Tensor, Tensor], Tensor]) -> Measure:
    """Halt where what is kept of two iterations in a row is near; not after the first."""

    def measure(seen: Seen, before: Tensor | None) -> tuple[Tensor, Tensor]:
        now = keep(seen)
        if before is None:
            return torch.zeros(len(now), dtype=torch.bool, device=now.device), now
        return distance(before, now) < seen.threshold, now

    return measure


def _log_probabilities(seen: Seen) -> Tensor:
    assert seen.logits_MV is not None
    return seen.logits_MV.float().log_softmax(-1)


def _entropy(seen: Seen) -> Tensor:
    log_MV = _log_probabilities(seen)
    return -(log_MV.exp() * log_MV).sum(-1)


def _divergence(before_MV: Tensor, now_MV: Tensor) -> Tensor:
    # an equal prediction may give a sum a rounding below zero, which the threshold 0 must not take for near
    return (before_MV.exp() * (before_MV - now_MV)).sum(-1).clamp_min(0)


def _relative_change(before_MD: Tensor, now_MD: Tensor) -> Tensor:
    return (now_MD - before_MD).norm(dim=-1) / now_MD.norm(dim=-1)


def _angle(before_MD: Tensor, now_MD: Tensor) -> Tensor:
    return (1 - torch.cosine_similarity(before_MD, now_MD, dim=-1)).clamp_min(0)


def _confidence(seen: Seen, before: Tensor | None) -> tuple[Tensor, Tensor]:
    top_M2 = _log_probabilities(seen).exp().topk(2).values
    distance_M = 1 - (top_M2[:, 0] - top_M2[:, 1])
    return distance_M < seen.threshold, distance_M


def _gate(seen: Seen, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """``before``: the probability of not having halted yet, prod (1 - lambda)."""
    assert seen.gate_M is not None
    goes_on_M = torch.sigmoid(-seen.gate_M.float())
    left_M = goes_on_M if before is None else before * goes_on_M
    return left_M < seen.threshold, left_M


def _stable(seen: Seen, before_M2: Tensor | None) -> tuple[Tensor, Tensor]:
    """``before``: the likeliest token, and how many times in a row it was."""
    assert seen.logits_MV is not None
    token_M = seen.logits_MV.argmax(-1)
    times_M = torch.ones_like(token_M)
    if before_M2 is not None:
        times_M += torch.where(token_M == before_M2[:, 0], before_M2[:, 1], 0)
    enough_M = (times_M >= seen.threshold) & (torch.as_tensor(seen.threshold) > 0)
    return enough_M, torch.stack([token_M, times_M], dim=1)


def _fixed(seen: Seen, before: Tensor | None) -> tuple[Tensor, Tensor]:
    enough = 0 < float(seen.threshold) <= seen.iteration
    settled_M = torch.full((len(seen.x_MD),), enough, dtype=torch.bool, device=seen.x_MD.device)
    return settled_M, settled_M


def _never(seen: Seen, before_MI: Tensor | None) -> tuple[Tensor, Tensor]:
    """The oracle's: the likeliest token of every iteration so far."""
    assert seen.logits_MV is not None
    token_M1 = seen.logits_MV.argmax(-1, keepdim=True)
    settled_M = torch.zeros(len(token_M1), dtype=torch.bool, device=token_M1.device)
    return settled_M, token_M1 if before_MI is None else torch.cat([before_MI, token_M1], dim=1)


_MEASURES: dict[Criterion, Measure] = {
    "kl": _by_distance(_log_probabilities, _divergence),
    "entropy": _by_distance(_entropy, lambda before_M, now_M: (now_M - before_M).abs()),
    "latent": _by_distance(lambda seen: seen.x_MD.float(), _relative_change),
    "cosine": _by_distance(lambda seen: seen.x_MD.float(), _angle),
    "confidence": _confidence,
    "gate": _gate,
    "argmax": _stable,
    "fixed": _fixed,
    "oracle": _never,
}
