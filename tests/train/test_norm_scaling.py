"""A run with LN-scaling is saved, resumed and refused as any model is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megaloop.checkpoint import Checkpoint
from tests.distributed import RankError, RankPool
from tests.train.runs import configuration, losses, train


@pytest.fixture(scope="module")
def straight(ranks_2: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A looped run on two pipeline stages, 20 steps."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    ranks_2.run(train, _values(corpus, directory))
    return directory


def _values(corpus: Path, directory: Path, scaled: bool = True, **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"depth": "1-2x2-1", "model__norm_scaling": scaled, **changes}
    return configuration(corpus, directory, (2, 1, 1), **settings)


def test_a_resumed_run_has_the_bits_of_one_that_went_through(
    ranks_2: RankPool, corpus: Path, tmp_path: Path, straight: Path
) -> None:
    shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000020")
    ranks_2.run(train, _values(corpus, tmp_path / "run"), True)
    assert losses(tmp_path / "run") == losses(straight)


@pytest.mark.parametrize("begin", ["resume", "init"])
def test_a_checkpoint_of_the_other_kind_is_refused_in_a_line(
    ranks_2: RankPool, corpus: Path, tmp_path: Path, straight: Path, begin: str
) -> None:
    if begin == "resume":
        values = _values(corpus, Path(shutil.copytree(straight, tmp_path / "run")), False, train__steps=30)
    else:
        values = _values(corpus, tmp_path / "run", False, init=str(straight))
    message = (
        "it holds norm_scaling True; the configuration asks for norm_scaling False; change the configuration to match"
    )
    with pytest.raises(RankError, match=message):
        ranks_2.run(train, values, begin == "resume")


def test_manifests_hold_the_key_only_where_it_is_set(
    ranks_1: RankPool, corpus: Path, tmp_path: Path, straight: Path
) -> None:
    """Without, they are the bytes that they were before there was such a key."""
    values = configuration(corpus, tmp_path / "run", train__steps=1)
    ranks_1.run(train, values)
    for run, step, stored in ((straight, 20, {"norm_scaling": True}), (tmp_path / "run", 1, {})):
        checkpoint = run / f"checkpoints/step-{step:08d}"
        model = json.loads((checkpoint / "manifest.json").read_text())["model"]
        assert {key: value for key, value in model.items() if key == "norm_scaling"} == stored
        with Checkpoint.open(checkpoint) as opened:
            assert opened.manifest.model.norm_scaling is bool(stored)
