"""The preset ``reasoning`` of ``megaloop bench savings``: p-hop induction, by the number of hops.

Every contender sees the same samples in the same order. All numbers of hops take turns in training; some that training never
has are held out, to see whether what was learnt goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megaloop.config import Config

__all__ = ["BEYOND", "HOPS", "VALIDATION_FRACTION", "LadderEvaluation", "documents"]

HOPS = tuple(range(1, 9))
"""Numbers of hops in training."""
BEYOND = (9, 10, 12)
"""Numbers of hops that are only asked."""
VALIDATION_FRACTION = 0.05
_SPARE = 64
"""Documents made beyond those that are needed: which are held out is chosen by their hash, so their number varies a little."""


def documents(config: Config) -> int:
    """How many samples the preset's data has: each is trained on once at most."""
    needed = config.train.steps * config.train.global_batch
    return round((needed + 4 * needed**0.5) / (1 - VALIDATION_FRACTION)) + _SPARE


@dataclass(frozen=True)
class LadderEvaluation:
    """How runs are evaluated.

    Attributes:
        data: the data sets: that of training, and that of difficulties beyond.
        block: layers of a block that loops.
        samples: held-out samples of each, as trained and at the end.
        along: of the training data's, at every checkpoint.
        swept: of each, with every block looped.
        loops: how often a block runs; of a model that was trained with a loop also as often as it was, and twice more.
    """

    data: tuple[Path, ...]
    block: int
    samples: int = 2048
    along: int = 1024
    swept: int = 256
    loops: tuple[int, ...] = (1, 2, 3, 4, 5)

    def commands(self, config: Config) -> list[list[str]]:
        """Arguments of ``megaloop eval`` for a run."""
        everything = [argument for path in self.data for argument in ("--data", str(path))]
        last = config.stages[-1].plan.loop
        trained = {last.iterations + more for more in range(3)} if last else set()
        loops = ",".join(map(str, sorted({*self.loops, *trained})))
        return [
            ["--tasks", "validation", "--samples", str(self.samples), *everything],
            ["--tasks", "validation", "--samples", str(self.along), "--data", str(self.data[0]), "--every-checkpoint"],
            ["--tasks", "validation", "--samples", str(self.swept), *everything, "--block", f"every:{self.block}", "--loops", loops],
        ]  # fmt: skip
