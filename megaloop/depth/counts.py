"""How often a loop runs in each step: a pure function of (seed, step), the same on every rank.

Ranks that loop differently often would wait for each other forever, so nothing here depends on a rank, and nothing on
what was drawn before: a resumed run goes on with the counts that it would have had.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

__all__ = ["CountKind", "LoopCounts"]

CountKind = Literal["fixed", "uniform", "poisson", "lognormal-poisson"]


@dataclass(frozen=True)
class LoopCounts:
    """The counts of a run.

    Attributes:
        mean: how often the loop runs on average, once the ramp is over; at least ``least``.
        kind: ``fixed``; ``uniform`` over the whole numbers from ``least`` to as far above the mean; ``poisson``: ``least`` and
            a Poisson number; ``lognormal-poisson``: ``least`` and a Poisson number whose mean is log-normal, with
            standard deviation ``sigma`` of its logarithm: mostly few, sometimes very many (arXiv 2502.05171, section 3.3).
        least, most: no count is below or above; ``most`` None: four times the mean.
        first_step: the first step with a loop.
        ramp_steps: steps from there over which the mean rises linearly from ``least``.
        seed: of the run.
    """

    mean: int = 1
    kind: CountKind = "fixed"
    least: int = 1
    most: int | None = None
    sigma: float = 0.5
    first_step: int = 0
    ramp_steps: int = 0
    seed: int = 0

    def of(self, mean: int) -> LoopCounts:
        """The same for a loop that runs ``mean`` times on average."""
        return replace(self, mean=mean)

    @property
    def largest(self) -> int:
        """No step has a higher count."""
        limit = 4 * self.mean if self.most is None else self.most
        highest = {"fixed": self.mean, "uniform": 2 * self.mean - self.least}.get(self.kind, limit)
        return min(limit, highest)

    def mean_at(self, step: int) -> float:
        """The mean at a step, counted from 0: ``least`` at the first, whole when the ramp is over."""
        risen = (step - self.first_step) / self.ramp_steps if self.ramp_steps else 1.0
        return self.least + (self.mean - self.least) * min(1.0, risen)

    def at(self, step: int) -> int:
        """How often the loop runs in a step, counted from 0."""
        mean = self.mean_at(step)
        if self.kind == "fixed":
            return math.floor(mean + 0.5)
        beyond = mean - self.least
        first, second = self._uniform(step, 0), self._uniform(step, 1)
        if self.kind == "uniform":
            # from 0 to twice ``beyond``; while the ramp makes that a broken number, to the next lower or the next higher
            # one, drawn so that the mean is right
            span = math.floor(2 * beyond)
            count = math.floor(first * (span + 1 + (second < 2 * beyond - span)))
        else:
            if self.kind == "lognormal-poisson" and beyond > 0:
                # the logarithm's mean is lower by half its variance, so that the mean itself is ``beyond``
                beyond = math.exp(NormalDist(math.log(beyond) - self.sigma**2 / 2, self.sigma).inv_cdf(second))
            count = _poisson(beyond, first)
        count += self.least
        return min(count, self.largest)

    @lru_cache(maxsize=16)  # noqa: B019 - a value, which refers to nothing
    def drawn(self, first: int, stop: int) -> Counter[int]:
        """In how many of the steps [first, stop) the loop runs how often."""
        return Counter(self.at(step) for step in range(first, stop))

    def _uniform(self, step: int, number: int) -> float:
        """A number in (0, 1) that depends on seed, step and number alone."""
        digest = hashlib.blake2b(f"{self.seed}/loop/{step}/{number}".encode(), digest_size=8).digest()
        return ((int.from_bytes(digest, "little") >> 11) + 0.5) * 2.0**-53


def _poisson(mean: float, uniform: float) -> int:
    """The Poisson number whose distribution function first reaches ``uniform``."""
    if mean > 500:  # far out in the log-normal's tail, where e^-mean would be 0
        return max(round(NormalDist(mean, math.sqrt(mean)).inv_cdf(uniform)), 0)
    count, probability = 0, math.exp(-mean)
    reached = probability
    while reached < uniform and probability > 0:
        count += 1
        probability *= mean / count
        reached += probability
    return count
