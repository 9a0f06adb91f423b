"""How much of its depth a model uses, in one number each.

* *Effective depth* (arXiv 2512.14064), by three signs that layers no longer compute something new, but refine the prediction: the last crossing
  of the layer's cosine from negative to positive; the first layer whose lens has a KL below half of its maximum; the first whose overlap is above 0.2. Layers count
  from 1: what leaves layer l is place l of a lens, whose place 0 is the embedding.
* *Depth score* (arXiv 2505.13898 and 2602.16490, section 4): sum l e_l / sum e_l, where e_l is the mean over prompts of the largest change of the output
  when layer l is skipped (future setting). Layers count from 0, as in the authors' code, so that scores compare with the papers'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["DepthScore", "depth_score", "first_below_half", "first_overlap", "last_crossing", "score_interval"]

_OVERLAP = 0.2
_LEVEL = 0.95


def last_crossing(cosine_L: ArrayLike) -> int | None:
    """The last layer whose cosine is positive after a negative one; None: there is none.

    Layers whose cosine is 0, such as those that add nothing, are passed over.
    """
    cosine = np.asarray(cosine_L, np.float64)
    (signed,) = cosine.nonzero()
    (crossings,) = ((cosine[signed[:-1]] < 0) & (cosine[signed[1:]] > 0)).nonzero()
    return int(signed[crossings[-1] + 1]) + 1 if len(crossings) else None


def first_below_half(kl_K: ArrayLike) -> int | None:
    """The first place of a lens (0 to L) whose KL is below 0.5 of its maximum; None: there is none."""
    kl = np.asarray(kl_K, np.float64)
    return _first(kl < 0.5 * kl.max(initial=0.0))


def first_overlap(overlap_K: ArrayLike) -> int | None:
    """The first place of a lens (0 to L) whose overlap (0 to 1) is above 0.2; None: there is none."""
    return _first(np.asarray(overlap_K, np.float64) > _OVERLAP)


def _first(holds: NDArray[np.bool_]) -> int | None:
    return int(holds.argmax()) if holds.any() else None


def depth_score(effects_L: ArrayLike) -> float | None:
    """sum l e_l / sum e_l, l from 0: 0 to L - 1; None where no layer has an effect."""
    effects = np.asarray(effects_L, np.float64)
    total = effects.sum()
    return float(np.arange(len(effects)) @ effects / total) if total > 0 else None


@dataclass(frozen=True)
class DepthScore:
    """Of some prompts.

    Attributes:
        value: None where no layer has an effect.
        low, high: ends of its interval of 95%; None for fewer than two prompts, or where there is no value.
    """

    value: float | None
    low: float | None
    high: float | None


def score_interval(effects_PL: ArrayLike, samples: int = 1000, seed: int = 0) -> DepthScore:
    """The depth score of the mean over prompts, with the interval in which 95% of ``samples`` resamplings of the prompts have it.

    Resamplings in which no layer has an effect have no score, and do not count.
    """
    effects = np.asarray(effects_PL, np.float64)
    prompts, depth = effects.shape
    value = depth_score(effects.mean(0))
    if value is None or prompts < 2:
        return DepthScore(value, None, None)
    drawn = np.random.default_rng(seed).integers(prompts, size=(samples, prompts))
    means = np.stack([effects[one].mean(0) for one in drawn])
    totals = means.sum(1)
    scores = means[totals > 0] @ np.arange(depth) / totals[totals > 0]
    low, high = np.quantile(scores, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return DepthScore(value, float(low), float(high))
