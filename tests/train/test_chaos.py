"""Ranks are killed at random moments, and the run is in the end the run that nothing disturbed."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megaloop.checkpoint import Checkpoint, list_checkpoints
from tests import processes
from tests.train.chaos_rank import KILLED, Kill, after_first_save, kill_plan, missing_points, prepare, samples_of
from tests.train.runs import configuration, events, metrics

KILLS = int(os.environ.get("MEGALOOP_CHAOS_KILLS", "10"))
SEED = int(os.environ.get("MEGALOOP_CHAOS_SEED", "0"))
RANKS, STEPS, BATCH, KEEP = 2, 96, 4, 2


def _values(corpus: Path, directory: Path) -> dict[str, Any]:
    """2 to 5 layers in four stages, from data parallel to a pipeline; a growth right after a checkpoint and in between."""
    stages = [
        {"steps": 20, "layers": 2},
        {"steps": 28, "layers": 3},
        {"steps": 28, "layers": 4},
        {"steps": 20, "layers": 5},
    ]
    values = configuration(
        corpus,
        directory,
        depth="5",
        growth={
            "start": 2,
            "block": 1,
            "schedule": stages,
            "topology": [{"layers": 2, "pp": 1, "dp": 2}, {"layers": 4, "pp": 2, "dp": 1}],
        },
        train__steps=STEPS,
        train__global_batch=BATCH,
        validation__every=16,
        checkpoint__every=6,
        checkpoint__keep=KEEP,
    )
    del values["parallel"]
    return values


class _Runs:
    """One run after another, each killed until it is at its end."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self._corpus, self._folder = corpus, folder
        self.finished: list[Path] = []
        self.attempts = 0
        self.fresh = True

    def attempt(self, kill: Kill | None) -> bool:
        """Start the run, or go on with it; True if it was killed, False if it got to its end before that."""
        self.attempts += 1
        folder = self._folder / f"run-{len(self.finished)}"
        attempt = folder / f"attempt-{self.attempts}"
        prepare(attempt, _values(self._corpus, folder / "run"), not self.fresh, kill)
        done = processes.run(attempt, RANKS, folder / "logs", module="tests.train.chaos_rank", timeout=300)
        if done.returncode == KILLED:
            if not (attempt / "killed").exists():
                pytest.fail(f"{kill or 'nobody was killed'}: {done.stderr}")
            self.fresh = False
            return True
        # the last kill may have come after the last save
        assert done.returncode == 0 or "nothing is left to train" in done.stderr, done.stderr
        self.finished.append(folder)
        self.fresh = True
        return False


def _check(folder: Path, expected: Path) -> None:
    """That nothing in a run's directory tells of its deaths but its events."""
    run = folder / "run"
    assert [record["step"] for record in metrics(run)] == list(range(1, STEPS + 1)), "each step exactly once"
    for key in ("loss", "val_loss", "grad_norm", "lr", "tokens", "flops", "layers", "pp"):
        assert [metric[key] for metric in metrics(run)] == [metric[key] for metric in metrics(expected / "run")], key

    samples = samples_of(folder, RANKS)
    assert samples == samples_of(expected, RANKS)
    taken = [sorted(set().union(*(sample[step] for sample in samples))) for step in range(1, STEPS + 1)]
    assert [number for step in taken for number in step] == list(range(STEPS * BATCH)), "every sample exactly once"

    whole = list_checkpoints(run / "checkpoints")
    names = os.listdir(run / "checkpoints")
    if events(run, "stop"):  # it was not killed after its last save
        assert sorted(names) == [path.name for path in whole[-KEEP:]], "nothing is left of saves and deletions"
    assert not [name for name in names if name.startswith(".")]
    for path in whole:
        Checkpoint.open(path, verify="checksums").close()
    with Checkpoint.open(whole[-1]) as ours, Checkpoint.open(expected / f"run/checkpoints/step-{STEPS:08d}") as theirs:
        assert ours.manifest.files == theirs.manifest.files


def test_every_point_at_which_a_rank_is_killed_is_a_function() -> None:
    assert missing_points() == []


@pytest.mark.slow
def test_whatever_dies_whenever_the_run_is_the_one_that_nothing_disturbed(corpus: Path, tmp_path: Path) -> None:
    """SIGKILL for one rank or all of them: inside saves and growths, while data is read, at the start, at any time.

    The kills of a seed are the same each time. A run that gets to its end is checked, and the next one begins.
    """
    straight = _Runs(corpus, tmp_path / "straight")
    assert not straight.attempt(None)
    (expected,) = straight.finished
    _check(expected, expected)

    runs = _Runs(corpus, tmp_path / "killed")
    pending = kill_plan(KILLS, SEED, RANKS)
    kinds: Counter[str] = Counter()
    while pending:
        kill = next((item for item in pending if not (runs.fresh and item.needs_checkpoint)), None)
        if kill is None:  # all that are left need a checkpoint
            assert runs.attempt(after_first_save())
            continue
        killed = runs.attempt(kill)
        print(
            f"attempt {runs.attempts}, run {len(runs.finished)}: {kill}: {'killed' if killed else 'end'}",
            file=sys.stderr,
        )
        if killed:
            pending.remove(kill)
            kinds[kill.kind] += 1
        else:
            _check(runs.finished[-1], expected)
        assert runs.attempts < 3 * KILLS + 10, f"the moments do not come: {', '.join(map(str, pending))}"
    while runs.attempt(None):
        pass
    _check(runs.finished[-1], expected)
    assert sum(kinds.values()) == KILLS
    assert KILLS < 5 or set(kinds) == {"save", "growth", "data", "start", "random"}
