"""A damaged checkpoint is named, quarantined and skipped: the run goes on from the one before, on the same curve."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import RankPool
from tests.train.runs import configuration, events, losses, train

FILES = [
    "manifest.json",
    "model/rank-00000.safetensors",
    "model/rank-00001.safetensors",
    "optim/rank-00000.safetensors",
    "optim/rank-00001.safetensors",
    "tokenizer.model",
]


def _remove(path: Path, seed: int) -> None:
    path.unlink()


def _truncate(path: Path, seed: int) -> None:
    path.write_bytes(path.read_bytes()[: random.Random(seed).randrange(path.stat().st_size)])


def _flip(path: Path, seed: int) -> None:
    data, chance = bytearray(path.read_bytes()), random.Random(seed)
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def straight(ranks_2: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    ranks_2.run(train, _values(corpus, directory, steps=6))
    return directory


def _values(corpus: Path, directory: Path, **train_changes: int) -> dict[str, Any]:
    values = configuration(corpus, directory, (2, 1, 1), checkpoint__every=2, validation__every=0)
    values["train"] |= train_changes
    values["schedule"] = {"warmup_steps": 2, "cooldown": 0}
    return values


def _until_4(straight: Path, run: Path) -> Path:
    """As if it had been killed after step 4."""
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints/step-00000006")
    return run / "checkpoints/step-00000004"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [_remove, _truncate, _flip])
def test_damage_of_any_file_is_fallen_back_from(
    ranks_2: RankPool, corpus: Path, tmp_path: Path, straight: Path, damage: Callable[[Path, int], None], name: str
) -> None:
    run = tmp_path / "run"
    damage(_until_4(straight, run) / name, FILES.index(name))
    ranks_2.run(train, _values(corpus, run, steps=6), True)
    (event,) = events(run, "rollback")
    assert (event["step_before"], event["step"]) == (4, 2)
    assert name in event["reason"]
    assert losses(run) == losses(straight)
    # what was damaged has gone, as there are newer ones by now
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000004", "step-00000006"
    ]  # fmt: skip


def test_what_is_damaged_is_set_aside_until_a_newer_one_is_whole(
    ranks_2: RankPool, corpus: Path, tmp_path: Path, straight: Path
) -> None:
    run = tmp_path / "run"
    _flip(_until_4(straight, run) / FILES[1], 0)
    values = _values(corpus, run, steps=3)
    values["checkpoint"]["every"] = 0
    ranks_2.run(train, values, True)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000002", "step-00000003", "step-00000004.damaged"
    ]  # fmt: skip


def test_several_damaged_ones_are_passed_over(ranks_2: RankPool, corpus: Path, tmp_path: Path, straight: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    _truncate(run / "checkpoints/step-00000006" / FILES[3], 0)
    _remove(run / "checkpoints/step-00000004" / FILES[0], 0)
    ranks_2.run(train, _values(corpus, run, steps=6), True)
    assert [(event["step_before"], event["step"]) for event in events(run, "rollback")] == [(6, 2), (4, 2)]
    assert losses(run) == losses(straight)


def test_what_a_killed_deletion_left_is_no_damage(
    ranks_2: RankPool, corpus: Path, tmp_path: Path, straight: Path
) -> None:
    run = tmp_path / "run"
    _until_4(straight, run)
    _remove(run / "checkpoints/step-00000002" / FILES[0], 0)
    ranks_2.run(train, _values(corpus, run, steps=6), True)
    assert events(run, "rollback") == []
    assert losses(run) == losses(straight)


def test_some_checkpoints_stay_for_good(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    values = _values(corpus, tmp_path / "run", steps=9)
    values["checkpoint"] = {"every": 1, "keep": 2, "keep_every": 4}
    ranks_2.run(train, values)
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-00000004", "step-00000008", "step-00000009"
    ]  # fmt: skip


def test_a_checkpoint_under_another_name_is_refused(
    ranks_2: RankPool, straight: Path, corpus: Path, tmp_path: Path
) -> None:
    checkpoint = _until_4(straight, tmp_path / "run")
    renamed = checkpoint.rename(checkpoint.with_name("step-00000005"))
    with pytest.raises(
        AssertionError, match="its name says step 5, but it was saved at step 4; rename it to step-00000004"
    ):
        ranks_2.run(train, _values(corpus, tmp_path / "run", steps=6), resume=True)
    assert renamed.is_dir()
