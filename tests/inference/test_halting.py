"""Criteria: what they compute, by hand; and what cannot be read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megaloop.errors import MegaloopError
from megaloop.inference.caches import CachePolicy
from megaloop.inference.halting import Halting, Seen, Watch

FIRST, SECOND = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 3.0]]), torch.tensor([[1.0, 0.5, 1.5], [0.0, 0.1, 3.0]])


def distances(criterion: str, *logits: Tensor) -> list[float]:
    """After the second of two iterations, found by halving: the threshold at which a token begins to halt."""
    found = []
    for row in range(2):
        low, high = 0.0, 4.0
        for _ in range(40):
            middle = (low + high) / 2
            watch = Watch(Halting(criterion, middle))  # type: ignore[arg-type]
            for iteration, now in enumerate((FIRST, SECOND), start=1):
                settled = watch.settled(Seen(now, now, now[:, 0], iteration, middle))
            low, high = (low, middle) if bool(settled[row]) else (middle, high)
        found.append(low)
    return found


def _softmax(logits: Tensor) -> list[list[float]]:
    rows = [[math.exp(value) for value in row] for row in logits.tolist()]
    return [[value / sum(row) for value in row] for row in rows]


def _expected(criterion: str) -> list[float]:
    found = []
    for before, now, p, q in zip(FIRST.tolist(), SECOND.tolist(), _softmax(FIRST), _softmax(SECOND), strict=True):
        entropies = [-sum(value * math.log(value) for value in row) for row in (p, q)]
        norms = [math.sqrt(sum(value**2 for value in row)) for row in (before, now)]
        top = sorted(q, reverse=True)
        values = {
            "kl": sum(one * math.log(one / other) for one, other in zip(p, q, strict=True)),
            "entropy": abs(entropies[1] - entropies[0]),
            "latent": math.sqrt(sum((x - y) ** 2 for x, y in zip(now, before, strict=True))) / norms[1],
            "cosine": 1 - sum(x * y for x, y in zip(now, before, strict=True)) / norms[0] / norms[1],
            "confidence": 1 - (top[0] - top[1]),
            "gate": math.prod(1 / (1 + math.exp(row[0])) for row in (before, now)),
        }
        found.append(values[criterion])
    return found


@pytest.mark.parametrize("criterion", ["kl", "entropy", "latent", "cosine", "confidence", "gate"])
def test_distances_are_those_of_the_formulas(criterion: str) -> None:
    assert distances(criterion) == pytest.approx(_expected(criterion), abs=1e-6)


def test_the_likeliest_token_has_to_stay_for_as_long_as_asked() -> None:
    watch = Watch(Halting("argmax", 3))
    made = [[5.0, 1.0], [1.0, 5.0], [1.0, 5.0], [1.0, 5.0], [1.0, 5.0]]
    settled = [
        bool(watch.settled(Seen(torch.zeros(1, 2), torch.tensor([row]), None, number, 3))[0])
        for number, row in enumerate(made, start=1)
    ]
    assert settled == [False, False, False, True, True]


@pytest.mark.parametrize(
    "text",
    [
        *("kl=5e-4", "entropy=0.001", "confidence=0.1", "argmax=5", "fixed=2", "oracle", "gate=0.4"),
        *("confidence=0.9999999", "kl=0.00012345678", "fixed=1000001"),
    ],
)
def test_what_is_written_is_what_is_read(text: str) -> None:
    assert Halting.parse(str(Halting.parse(text))) == Halting.parse(text)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("sleep=3", {}, "--halt sleep=3: no such criterion; choose from kl, entropy, latent, cosine, confidence, gate"),
        ("kl", {}, r"--halt kl: expected kl=THRESHOLD, a number from 0 \(0: never\)"),
        ("kl=-1", {}, "expected kl=THRESHOLD, a number from 0"),
        ("kl=nan", {}, "expected kl=THRESHOLD"),
        ("kl=inf", {}, "expected kl=THRESHOLD"),
        ("confidence=1.5", {}, "expected confidence=THRESHOLD, a number from 0 to 1"),
        ("argmax=2.5", {}, "expected argmax=N, a whole number"),
        ("oracle=2", {}, "the oracle has no threshold"),
        ("kl=1", {"minimum": 0}, "--min-loops 0: a loop runs at least once"),
        ("kl=1", {"decay": 4.0}, "--halt-decay is of CALM's confidence, and --halt is kl"),
        ("confidence=0.1", {"decay": -1.0}, "--halt-decay -1.0: expected a number of at least 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_line(text: str, options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(MegaloopError, match=message):
        Halting.parse(text, **options)


@pytest.mark.parametrize("text", ["", "some", "shared", "shared=0", "shared=x", "full=2"])
def test_caches_that_there_are_not_are_refused(text: str) -> None:
    with pytest.raises(MegaloopError, match="expected full, last or shared=N"):
        CachePolicy.parse(text)
