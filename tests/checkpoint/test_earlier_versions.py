"""What earlier versions wrote is still read, verified, resumed and grown; see fixtures/README.md."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaloop.checkpoint import Checkpoint, CheckpointInfo, GrowthEntry, resolve_checkpoint, save_checkpoint
from megaloop.checkpoint.depth import grow_checkpoint
from megaloop.checkpoint.manifest import MANIFEST, encode_manifest, read_manifest
from megaloop.depth import DepthPlan, DepthSpec, LoopStyle
from megaloop.layout.topology import Topology
from tests.checkpoint.states import info, read_all, state
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
        assert [(source.train, source.stable) for source in run.data.sources] == [(None, 1.0)]


def test_a_run_is_resumed_and_has_the_losses_that_it_would_have_had(kept: Path, ranks_1: RankPool) -> None:
    expected = [record["loss"] for record in metrics(kept / "run")]
    ranks_1.run(train, _configuration(kept), True)
    found = losses(kept / "run")
    assert found[:5] == expected[:5]
    assert found[5:] == pytest.approx(expected[5:], rel=2e-5)  # on one rank instead of two


def test_a_checkpoint_is_grown(kept: Path) -> None:
    grow_checkpoint(kept / "run", kept / "grown", "lidas", DepthSpec.parse(4), 2)
    read_all(kept / "grown")
    with Checkpoint.open(kept / "grown") as grown:
        assert grown.manifest.plan.layers == 4
        run = grown.manifest.run
        assert (run.step, run.samples, run.skipped, run.batch) == (5, 20, 1, 4)
        assert [(depth.step, depth.layers) for depth in run.depths] == [(5, 4)]


# --- format version 2 ---


def _written_before() -> CheckpointInfo:
    """What the manifest in fixtures/version-2 says."""
    return info(
        3,
        plan=DepthPlan((0, 4, 4, 2), {4: 0}, LoopStyle("add", "1/k", norm=False)),
        growth=GrowthEntry(operator="lidas", stage=1, stages=2),
        topology=Topology(pp=2, tp=1, dp=4),
        config={
            "name": "test",
            "depth": "4-4x1-4",
            "data": {"sequence_length": 64, "sources": [{"path": "/data"}], "format": "sft"},
            "of another version": {"\u00fcnicode": [1.5, None]},
        },
    )


def test_a_manifest_is_read_as_values_and_encoded_to_the_same_bytes() -> None:
    manifest, expected = read_manifest(FIXTURES / "version-2"), _written_before()
    for name in ("run", "plan", "growth", "model", "precision", "topology", "config"):
        assert getattr(manifest, name) == getattr(expected, name), name
    assert (manifest.data.sequence_length, manifest.data.paths, manifest.data.is_fine_tuned) == (
        64,
        (Path("/data"),),
        True,
    )
    assert encode_manifest(manifest) == (FIXTURES / "version-2" / MANIFEST).read_bytes()


def test_what_is_written_is_what_was_written_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_manifest(FIXTURES / "version-2")
    monkeypatch.setattr("megaloop.checkpoint.writer.__version__", before.megaloop)
    tokenizer = tmp_path / "tokenizer.source"
    tokenizer.write_bytes(b"as if sentencepiece had written it")
    saved = save_checkpoint(tmp_path / "step-00000003", state((0, 1), (0, 1)), _written_before(), tokenizer).path
    found = read_manifest(saved)
    assert encode_manifest(found) == (saved / MANIFEST).read_bytes()
    again = found.model_copy(update={"created": before.created})  # the one thing that differs
    assert encode_manifest(again) == (FIXTURES / "version-2" / MANIFEST).read_bytes()
