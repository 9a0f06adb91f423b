"""What earlier versions wrote is still read, verified, resumed and grown; see fixtures/README.md."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaloop.checkpoint import Checkpoint, resolve_checkpoint
from megaloop.checkpoint.depth import grow_checkpoint
from megaloop.depth import DepthPlan
from tests.checkpoint.states import read_all
from tests.distributed import RankPool
from tests.train.runs import losses, metrics, train

FIXTURES = Path(__file__).parent / "fixtures"


def _configuration(kept: Path) -> dict[str, Any]:
    """The run's own, where it now lies, for one rank."""
    values: dict[str, Any] = yaml.safe_load((kept / "run/config.yaml").read_text())
    values |= {"run_dir": str(kept / "run"), "parallel": {"dp": 1}}
    values["data"]["sources"] = [{"path": str(kept / "data")}]
    return values


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A copy of a run and its data."""
    return Path(shutil.copytree(FIXTURES / "before-run-state", tmp_path / "kept"))


def test_a_checkpoint_is_read_and_verified(kept: Path) -> None:
    path = resolve_checkpoint(kept / "run")
    read_all(path)
    with Checkpoint.open(path) as checkpoint:
        run = checkpoint.manifest.run
        assert (run.step, run.samples, run.tokens, run.flops, run.skipped) == (5, 20, 640, 20152320, 1)
        assert (run.seed, run.batch, run.steps, run.order_version) == (3, 4, 14, 1)
        assert run.data is not None
        assert (run.data.sequence_length, run.data.cooldown_sample) == (32, 48)
        assert [(each.train, each.stable) for each in run.data.sources] == [(None, 1.0)]


def test_a_run_is_resumed_and_has_the_losses_that_it_would_have_had(kept: Path, ranks_1: RankPool) -> None:
    expected = [record["loss"] for record in metrics(kept / "run")]
    ranks_1.run(train, _configuration(kept), True)
    found = losses(kept / "run")
    assert found[:5] == expected[:5]
    assert found[5:] == pytest.approx(expected[5:], rel=2e-5)  # on one rank instead of two


def test_a_checkpoint_is_grown(kept: Path) -> None:
    grow_checkpoint(kept / "run", kept / "grown", "lidas", 4, 2)
    read_all(kept / "grown")
    with Checkpoint.open(kept / "grown") as grown:
        assert DepthPlan.from_json(grown.manifest.plan).layers == 4
        run = grown.manifest.run
        assert (run.step, run.samples, run.skipped, run.batch) == (5, 20, 1, 4)
        assert [(each.step, each.layers) for each in run.depths] == [(5, 4)]
