"""The preset ``reasoning`` of ``megaloop bench savings``: p-hop induction, by the number of hops.

Every contender sees the same samples in the same order. All numbers of hops take turns in training; what is asked has some besides that
training never has, to see whether what was learnt goes on.

In training a letter that follows itself is its own answer at every number of hops. That is a shortcut, and a stepping stone: without those targets the
same model was still at the floor after 720 steps (docs/SAVINGS.md). What is asked has none of them, so that every answer is as many hops away as it says.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megaloop.config import Config

__all__ = ["ASKED", "HOPS", "VALIDATION_FRACTION", "LadderEvaluation", "documents"]

HOPS = tuple(range(1, 7))
"""Numbers of hops in training."""
ASKED = (*HOPS, 7, 8, 10)
"""Numbers of hops that are asked; the last ones training never has."""
VALIDATION_FRACTION = 0.05
_SPARE, _FEWEST = 64, 2000
"""Documents beyond those that are needed: which are held out is chosen by their hash, so their number varies a little; and at least."""


def documents(config: Config) -> int:
    """How many samples the preset's data has: each is trained on once at most."""
    needed = config.train.steps * config.train.global_batch
    return max(round((needed + 4 * needed**0.5) / (1 - VALIDATION_FRACTION)) + _SPARE, _FEWEST)


@dataclass(frozen=True)
class LadderEvaluation:
    """How runs are evaluated.

    Attributes:
        data: the data sets of training.
        asked: the data set of questions; None: the held-out samples of training's.
        block: layers of a block that loops.
        samples: held-out samples of each data set, as trained and at the end.
        along: of what is asked, at every checkpoint.
        swept: of what is asked, with every block looped.
        loops: how often a block runs; of a model that was trained with a loop also as often as it was, and twice more.
    """

    data: tuple[Path, ...]
    block: int
    asked: Path | None = None
    samples: int = 2304
    along: int = 288
    swept: int = 144
    loops: tuple[int, ...] = (1, 2, 3, 4, 5)

    def commands(self, config: Config) -> list[list[str]]:
        """Arguments of ``megaloop eval`` for a run."""
        everything, asked = (
            [argument for path in paths for argument in ("--data", str(path))]
            for paths in (
                [*self.data, *([self.asked] if self.asked else [])],
                [self.asked] if self.asked else self.data,
            )
        )
        last = config.stages[-1].plan.loop
        trained = {last.iterations + more for more in range(3)} if last else set()
        loops = ",".join(map(str, sorted({*self.loops, *trained})))
        return [
            ["--tasks", "validation", "--samples", str(self.samples), *everything],
            ["--tasks", "validation", "--samples", str(self.along), *asked, "--every-checkpoint"],
            ["--tasks", "validation", "--samples", str(self.swept), *asked, "--block", f"every:{self.block}", "--loops", loops],
        ]  # fmt: skip
