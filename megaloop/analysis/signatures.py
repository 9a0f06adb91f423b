"""Signatures: what the papers saw of how grown and looped models use their depth, each as one number of a model with a test.

Intervals come from resampling the prompts (1,000 times, 95% percentiles). A signature is *seen* where its whole interval lies on the side that the
papers describe, *not seen* where it lies on the other, and *unclear* in between; the period of the block has a permutation test as well
(:func:`period_test`).
What is the best of many (the start of a block that is repeated) is chosen on one half of the prompts and measured on the other, both ways.

arXiv 2505.13898 (depth score, cosines), 2512.08819 and 2602.16490 (periods, swaps, skipped layers, loops at inference).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megaloop.analysis.effective_depth import depth_score, score_interval

__all__ = [
    "Array",
    "Indices",
    "Signature",
    "Verdict",
    "bootstrap",
    "depth_score_signature",
    "late_layers",
    "mean_of",
    "middle_permutable",
    "period",
    "period_test",
    "repeat_gain",
    "score_by_difficulty",
]

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
Verdict = Literal["seen", "not seen", "unclear", "-"]
_RESAMPLES = 1000
_PERMUTATIONS = 2000
_FREEDOM = 7
"""Degrees of freedom (prompts, less one for each part that is resampled by itself) that a verdict needs: intervals of fewer are too narrow. Where
nothing is to be seen, a verdict would come up with two prompts in 49 of 100, with five in 14, with eight in 9."""
_LEVEL = 0.05
_POWER = 0.8
_PATTERNS, _PATTERN_PERMUTATIONS = 100, 200


@dataclass(frozen=True)
class Signature:
    """One line of the table.

    Attributes:
        name: of the signature.
        value: its number; None where it cannot be had (``why`` says it).
        low, high: its interval.
        p: of the period's permutation test.
        verdict: ``-`` for numbers that no side of is meant.
        why: what stands in the way of a value, or of a clear verdict.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    verdict: Verdict = "-"
    why: str = ""


def bootstrap(
    statistic: Callable[[Indices], float], parts: Sequence[Indices], seed: int = 0
) -> tuple[float, float] | None:
    """The 2.5% and 97.5% percentiles of a statistic over resampled prompts; None where a part has a single prompt, which says nothing of others.

    Args:
        statistic: of the indices of some prompts.
        parts: prompts that are resampled by themselves, so that each part keeps its size.
    """
    if min(map(len, parts)) < 2:
        return None
    generator = np.random.default_rng(seed)
    values = [statistic(np.concatenate([generator.choice(own, len(own)) for own in parts])) for _ in range(_RESAMPLES)]
    return _percentiles(values)


def _percentiles(values: Sequence[float] | Array) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _with_interval(
    name: str, statistic: Callable[[Indices], float], parts: Sequence[Indices], *, judged: bool
) -> Signature:
    """A signature that is seen above 0."""
    value, interval = statistic(np.concatenate(parts)), bootstrap(statistic, parts)
    if interval is None:
        return Signature(name, value, verdict="unclear" if judged else "-", why="one prompt has no interval")
    if not judged:
        return Signature(name, value, *interval)
    prompts = sum(map(len, parts))
    if prompts - len(parts) < _FREEDOM:
        return Signature(name, value, *interval, verdict="unclear", why=f"{prompts} prompts are too few for a verdict")
    return Signature(name, value, *interval, verdict=_verdict(*interval))


def _verdict(low: float, high: float) -> Verdict:
    return "seen" if low > 0 else "not seen" if high < 0 else "unclear"


def mean_of(name: str, sums_P: Array, counts_P: Array) -> Signature:
    """A mean over tokens of all prompts."""
    parts = [np.arange(len(sums_P))]
    return _with_interval(name, lambda chosen: _ratio(sums_P[chosen], counts_P[chosen]), parts, judged=False)


def _ratio(sums: Array, counts: Array) -> float:
    return float(sums.sum() / max(counts.sum(), 1))


def depth_score_signature(effects_PL: Array) -> Signature:
    """The depth score of :mod:`megaloop.analysis.effective_depth`."""
    found = score_interval(effects_PL, _RESAMPLES)
    why = "" if found.value is not None else "no layer has an effect"
    return Signature("depth score", found.value, found.low, found.high, why=why)


def score_by_difficulty(effects_PL: Array, difficulty_P: NDArray[np.int64]) -> Signature:
    """How much the depth score grows with each step of difficulty: the slope of a straight line through each difficulty's score."""
    levels = sorted(set(difficulty_P.tolist()) - {-1})
    name = "depth score per step of difficulty"
    if len(levels) < 2:
        return Signature(name, None, why="the prompts are not of several difficulties")
    if any(depth_score(effects_PL[difficulty_P == level].mean(0)) is None for level in levels):
        return Signature(name, None, why="no layer has an effect at one of the difficulties")

    def slope(chosen: Indices) -> float:
        of_level = [chosen[difficulty_P[chosen] == level] for level in levels]
        scores = [depth_score(effects_PL[own].mean(0)) or 0.0 for own in of_level]
        return float(np.polyfit(levels, scores, 1)[0])

    return _with_interval(name, slope, [np.flatnonzero(difficulty_P == level) for level in levels], judged=True)


def period(sizes_L: Array, lag: int) -> float:
    """Autocorrelation at ``lag``, less the mean of that at lags that are no multiples of it; of log sizes less their straight line."""
    return float(_contrasts(_log(sizes_L)[None], lag)[0])


def period_test(sizes_PL: Array, lag: int, seed: int = 0) -> Signature:
    """Whether what attention adds repeats with the period of the block: the contrast of :func:`period` against that of shuffled layers.

    The straight line is taken away before layers are shuffled, and again after it, so that a trend over the layers does not count as a pattern.
    The period is *seen* where fewer than 5% of shuffles reach the contrast and its interval over resampled prompts lies above 0. Where more shuffles
    reach it, it is *not seen*, unless the layers are too few to tell: of patterns that repeat perfectly, the test finds fewer than 80%.

    Args:
        sizes_PL: of each prompt.
    """
    name = f"period of {lag}"
    prompts, depth = sizes_PL.shape
    if lag < 2:
        return Signature(name, None, why="blocks of one layer have no period")
    if depth < 2 * lag or depth < 6:
        return Signature(name, None, why=f"{depth} layers are too few for a period of {lag}")
    sizes_L = sizes_PL.mean(0)
    found, p = period(sizes_L, lag), float(_p_values(_log(sizes_L)[None], lag, _PERMUTATIONS, seed)[0])
    if prompts < 2:
        return Signature(name, found, p=p, verdict="unclear", why="one prompt has no interval")
    low, high = _percentiles(_contrasts(_log(_resampled_means(sizes_PL)), lag))
    verdict, why = _period_verdict(p, low, depth, lag)
    return Signature(name, found, low, high, p, verdict, why)


def _period_verdict(p: float, low: float, depth: int, lag: int) -> tuple[Verdict, str]:
    """And why it is unclear."""
    if p < _LEVEL:
        return ("seen", "") if low > 0 else ("unclear", "prompts differ too much")
    if (power := _power(depth, lag)) < _POWER:
        return "unclear", f"in {depth} layers the test finds {power:.0%} of perfect patterns"
    return "not seen", ""


def _p_values(x_NL: Array, lag: int, shuffles: int, seed: int) -> Array:
    """The share of a row's shuffles whose contrast is as high as its own; the row counts as one of them. [N]"""
    x_NL = _detrended(x_NL)
    shuffled = np.random.default_rng(seed).permuted(np.repeat(x_NL, shuffles, axis=0), axis=1)
    contrasts = _contrasts(shuffled, lag).reshape(len(x_NL), shuffles)
    reached_N = (contrasts >= _contrasts(x_NL, lag)[:, None] - 1e-12).sum(1)
    return np.asarray((1 + reached_N) / (1 + shuffles))


@cache
def _power(depth: int, lag: int) -> float:
    """The share of random patterns that the test finds where they repeat perfectly, whatever the noise of real ones takes from it."""
    patterns = np.random.default_rng(0).normal(size=(_PATTERNS, lag))
    repeated_NL = patterns[:, np.arange(depth) % lag]
    return float((_p_values(repeated_NL, lag, _PATTERN_PERMUTATIONS, 0) < _LEVEL).mean())


def _resampled_means(values_PL: Array, seed: int = 0) -> Array:
    """Means over resampled prompts, by how often each is drawn. [N, L]"""
    prompts = len(values_PL)
    drawn_NP = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=_RESAMPLES)
    return np.asarray(drawn_NP @ values_PL / prompts)


def _log(sizes_L: Array) -> Array:
    return np.log(np.maximum(sizes_L, 1e-12))


def _detrended(x_NL: Array) -> Array:
    """Less each row's straight line."""
    places_L = np.arange(x_NL.shape[1]) - (x_NL.shape[1] - 1) / 2
    centred_NL = x_NL - x_NL.mean(1, keepdims=True)
    slopes_N = centred_NL @ places_L / (places_L @ places_L)
    return centred_NL - slopes_N[:, None] * places_L


def _contrasts(x_NL: Array, lag: int) -> Array:
    x_NL = _detrended(x_NL)
    lags = range(1, min(2 * lag, x_NL.shape[1] - 2) + 1)
    others = [_autocorrelations(x_NL, other) for other in lags if other % lag]
    return _autocorrelations(x_NL, lag) - np.mean(others, axis=0)


def _autocorrelations(x_NL: Array, lag: int) -> Array:
    """Pearson's correlation of each row with itself, moved by ``lag``; 0 where it does not vary. [N]"""
    one, other = x_NL[:, :-lag], x_NL[:, lag:]
    one, other = one - one.mean(1, keepdims=True), other - other.mean(1, keepdims=True)
    norm = np.sqrt((one**2).sum(1) * (other**2).sum(1))
    return (one * other).sum(1) / np.where(norm > 1e-12, norm, np.inf)


def late_layers(loss_PI: Array, without_P: Array, targets_P: Array) -> Signature:
    """Late layers indispensable: how much more the loss rises when one of the last quarter is skipped than when one of the middle half is.

    Args:
        loss_PI: sums over the targets of each prompt with each layer skipped.
        without_P: without intervention.
    """
    depth = loss_PI.shape[1]
    quarter = max(depth // 4, 1)
    late, middle = slice(depth - quarter, depth), slice(quarter, depth - quarter)
    name = "late layers indispensable"
    if depth < 4:
        return Signature(name, None, why=f"{depth} layers have no middle")
    return _rise_difference(name, loss_PI, without_P, targets_P, late, middle)


def middle_permutable(loss_PI: Array, without_P: Array, targets_P: Array) -> Signature:
    """Permutable middle: how much more the loss rises when neighbours at the ends are exchanged than when those in the middle half are."""
    swaps = loss_PI.shape[1]
    name, quarter = "middle permutable", max((swaps + 1) // 4, 1)
    if swaps < 4:
        return Signature(name, None, why=f"{swaps + 1} layers have no middle")
    middle = np.zeros(swaps, bool)
    middle[quarter : swaps - quarter] = True
    return _rise_difference(name, loss_PI, without_P, targets_P, ~middle, middle)


def _rise_difference(
    name: str, loss_PI: Array, without_P: Array, targets_P: Array, of: slice | Array | Any, against: slice | Array | Any
) -> Signature:
    rise_PI = loss_PI - without_P[:, None]

    def difference(chosen: Indices) -> float:
        rise_I = rise_PI[chosen].sum(0) / max(targets_P[chosen].sum(), 1)
        return float(rise_I[of].mean() - rise_I[against].mean())

    return _with_interval(name, difference, [np.arange(len(rise_PI))], judged=True)


def repeat_gain(
    loss_PI: Array, without_P: Array, targets_P: Array, name: str = "gain from repeating a block"
) -> Signature:
    """How much the loss falls when the best block runs once more: chosen on one half of the prompts, measured on the other, both ways."""
    count = len(loss_PI)
    if count < 4 or not loss_PI.shape[1]:
        return Signature(name, None, why="too few prompts" if count < 4 else "no block fits")
    gain_PI = without_P[:, None] - loss_PI
    halves = [np.arange(0, count, 2), np.arange(1, count, 2)]

    def gain(chosen: Indices) -> float:
        total = 0.0
        for half in (0, 1):
            own, other = chosen[chosen % 2 == half], chosen[chosen % 2 != half]
            best = int(gain_PI[own].sum(0).argmax())
            total += _ratio(gain_PI[other, best], targets_P[other]) / 2
        return total

    return _with_interval(name, gain, halves, judged=True)
