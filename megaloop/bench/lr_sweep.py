"""Each contender at its own best learning rate: short runs at several rates, before those that are compared.

The best rate differs by contender, so one rate for all favours some. The short runs have a seed of their own, none of those that are
compared: what is chosen here owes nothing to the luck of a run that counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from megaloop.bench.contenders import contender, total_flops
from megaloop.bench.savings import Job, write_config
from megaloop.config import Config
from megaloop.errors import MegaloopError
from megaloop.report.lr_sweep import RateSweep, read_lr_sweep, write_lr_sweep
from megaloop.runs.directory import last_records
from megaloop.runs.records import number
from megaloop.text import printable

__all__ = ["SEED", "LrSweep", "Trials", "shortened"]

SEED = 1000
"""Added to the configuration's seed: a bench of fewer seeds has none of it."""
_SHARE = 0.4
"""The short runs' part of ``train.steps`` where nobody says how long they are."""


@dataclass(frozen=True)
class LrSweep:
    """What is swept.

    Attributes:
        rates: peak learning rates, rising.
        steps: of each short run.
        seeds: short runs of each contender at each rate; the mean of their losses decides.
    """

    rates: tuple[float, ...]
    steps: int
    seeds: int = 1

    @classmethod
    def parse(cls, text: str, steps: int | None, config: Config, seeds: int = 1) -> LrSweep:
        """What ``--lr-sweep`` and ``--lr-steps`` say.

        Args:
            text: rates, separated by commas.
            steps: None: 40% of the configuration's.

        Raises:
            MegaloopError: fewer than two different rates, one that is none, or more steps than the whole run has.
        """
        found = [_positive(part) for part in text.split(",") if part.strip()]
        rates = sorted({rate for rate in found if rate is not None})
        if len(rates) < 2 or len(rates) < len(found):
            raise MegaloopError(
                f"--lr-sweep {printable(text, 60)}: expected two or more different learning rates, separated by commas, "
                "such as 1e-3,2e-3,4e-3"
            )
        whole = config.train.steps
        if steps is not None and steps > whole:
            raise MegaloopError(
                f"--lr-steps {steps} is more than train.steps {whole}; the short runs have at most as many"
            )
        return cls(tuple(rates), max(round(_SHARE * whole), 1) if steps is None else steps, seeds)

    def to_json(self) -> dict[str, Any]:
        """As a bench's directory keeps it."""
        return {"rates": list(self.rates), "steps": self.steps, "seeds": self.seeds}


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def shortened(config: Config, steps: int) -> Config:
    """The same recipe in ``steps`` steps: what is a fraction of the run stays one, the warm-up has at most all steps.

    The stages of an explicit growth schedule become shorter in proportion. Only the newest checkpoint is kept.

    Raises:
        MegaloopError: a stage would have no step.
    """
    values = config.model_dump(mode="json")
    values["train"]["steps"] = steps
    values["schedule"]["warmup_steps"] = min(config.schedule.warmup_steps, steps)
    values["checkpoint"] |= {"keep": 1, "keep_every": 0}
    if config.growth is not None and not isinstance(config.growth.schedule, str):
        stops = [
            round(stop * steps / config.train.steps) for stop in accumulate(s.steps for s in config.growth.schedule)
        ]
        lengths = [stop - start for start, stop in pairwise([0, *stops])]
        if min(lengths) < 1:
            raise MegaloopError(
                f"--lr-steps {steps}: the stages of growth.schedule would last {', '.join(map(str, lengths))} steps; give more"
            )
        for stage, length in zip(values["growth"]["schedule"], lengths, strict=True):
            stage["steps"] = length
    return Config.model_validate(values)


class Trials:
    """The short runs of a sweep that are left to be trained, and what has come of all.

    What is known already, from ``lr_sweep.json``, is not trained again, be it a loss or a divergence.

    Attributes:
        jobs: one for each contender and rate that is not known yet.
    """

    def __init__(
        self, config: Config, vocab_size: int, directory: Path, *, contenders: Sequence[str], sweep: LrSweep
    ) -> None:
        self._directory, self._sweep = directory, sweep
        self._names = tuple(dict.fromkeys(contenders))
        self._found = {
            name: {rate: dict(of_rate) for rate, of_rate in found.runs.items()}
            for name, found in read_lr_sweep(directory).items()
        }
        self._of: dict[str, tuple[str, float, int]] = {}
        self._seeds = range(config.seed + SEED, config.seed + SEED + sweep.seeds)
        self.jobs: list[Job] = []
        short = shortened(config, sweep.steps)
        for seed in self._seeds:
            for name in self._names:
                for rate in sweep.rates:
                    if seed not in self._found.get(name, {}).get(rate, {}):
                        self._add(short, vocab_size, name, rate, seed)

    def _add(self, config: Config, vocab_size: int, name: str, rate: float, seed: int) -> None:
        label = f"{name}-lr{rate}" + (f"-seed{seed}" if seed != self._seeds[0] else "")
        made = contender(
            config, name, vocab_size, seed=seed, lr=rate, label=label, directory=self._directory / "sweep" / label
        )
        file = write_config(made, self._directory)
        flops = total_flops(made, vocab_size)
        self.jobs.append(Job(label, file, made.directory, made.train.steps, made.seed, flops, [], may_diverge=True))
        self._of[label] = name, rate, seed

    def keep(self, jobs: Sequence[Job]) -> None:
        """Write down what has come of those that are over.

        Raises:
            MegaloopError: a run that is done has no record of its last step.
        """
        new = False
        for job in jobs:
            name, rate, seed = self._of[job.name]
            runs = self._found.setdefault(name, {}).setdefault(rate, {})
            if job.is_over and seed not in runs:
                runs[seed] = None if job.state == "diverged" else _last_loss(job)
                new = True
        if new:
            write_lr_sweep(self._directory, {name: self._of_contender(name) for name in self._found})

    def _of_contender(self, name: str) -> RateSweep:
        runs = {rate: dict(sorted(found.items())) for rate, found in self._found.get(name, {}).items() if found}
        losses: dict[float, float | None] = {}
        for rate, found in runs.items():
            if set(found) >= set(self._seeds):
                each = [loss for loss in found.values() if loss is not None]
                losses[rate] = fmean(each) if len(each) == len(found) else None
        over = set(losses) >= set(self._sweep.rates) and any(loss is not None for loss in losses.values())
        return RateSweep.over(losses, runs) if over else RateSweep(losses, runs=runs)

    def results(self) -> dict[str, RateSweep]:
        """The whole sweep, once all jobs are over, by contender.

        Raises:
            MegaloopError: a contender diverged at every rate.
        """
        found = {name: self._of_contender(name) for name in self._names}
        for name, sweep in found.items():
            if sweep.chosen is None:
                rates = ", ".join(map(str, sweep.losses))
                raise MegaloopError(
                    f"bench savings: {name} diverged at every learning rate of the sweep ({rates}); choose lower ones and "
                    "another --out"
                )
        return found


def _last_loss(job: Job) -> float | None:
    """The validation loss after a run's last step, nats per token; None: it is not finite."""
    last = last_records(job.run, 1)
    if not last or last[0]["step"] != job.steps:
        raise MegaloopError(
            f"bench savings: {job.run} has no record of its last step, {job.steps}; remove it, and it is trained again"
        )
    return number(last[0], "val_loss")
