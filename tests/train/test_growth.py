"""A run that grows: the same in flight as offline or on load, on every layout, and whatever dies in between."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megaloop.checkpoint import Checkpoint
from megaloop.checkpoint.depth import grow_checkpoint
from megaloop.config import Config
from megaloop.depth import DepthPlan, DepthSpec, grow
from megaloop.depth.flops import flops_per_token
from tests import processes
from tests.distributed import RankError, RankPool
from tests.train.runs import configuration, events, metrics, train, train_dying_in_growth, train_keeping_growths

Layout = tuple[int, int, int]
LAYOUTS: list[Layout] = [(2, 1, 1), (2, 1, 2), (2, 2, 1)]
"""Every axis, and tensor parallelism only where there is a pipeline as well: what it adds is the same with and without."""


def growing(corpus: Path, directory: Path, layout: Layout = (1, 1, 1), **changes: Any) -> dict[str, Any]:
    """4 layers for 10 steps, then 8 for 10; a checkpoint every 8."""
    growth: dict[str, Any] = {
        "operator": "lidas",
        "block": 4,
        "start": 4,
        "schedule": STAGES,
        **changes.pop("growth", {}),
    }
    settings = {"depth": "8", "growth": growth, "checkpoint__every": 8, "schedule__cooldown": 0.3, **changes}
    return configuration(corpus, directory, layout, **settings)


STAGES = [{"steps": 10, "layers": 4}, {"steps": 10, "layers": 8}]


def _pool(request: pytest.FixtureRequest, layout: Layout) -> RankPool:
    pool: RankPool = request.getfixturevalue(f"ranks_{layout[0] * layout[1] * layout[2]}")
    return pool


def _losses(directory: Path) -> list[float]:
    records = metrics(directory)
    assert [record["step"] for record in records] == list(range(1, 21)), "each step exactly once"
    return [record["loss"] for record in records]


def _furthest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def alone(ranks_1: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The growing run on one rank, in fp32."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    ranks_1.run(train, growing(corpus, directory))
    return directory


@pytest.mark.parametrize(
    ("layout", "precision", "scaled"),
    [*((layout, "fp32", False) for layout in LAYOUTS), ((2, 1, 2), "bf16", False), ((2, 1, 1), "fp32", True)],
    ids=str,
)
def test_live_equals_offline_equals_on_load(
    request: pytest.FixtureRequest,
    corpus: Path,
    tmp_path: Path,
    alone: Path,
    layout: Layout,
    precision: str,
    scaled: bool,
) -> None:
    """``scaled``: with LN-scaling, whose factors change with the growth."""
    pool = _pool(request, layout)
    live, kept = tmp_path / "live", tmp_path / "kept"
    changes: dict[str, Any] = {"train__precision": precision, "train__micro_batch": 2 if layout[1] > 1 else 1}
    if scaled:
        changes["model__norm_scaling"] = True
        alone = tmp_path / "alone"
        request.getfixturevalue("ranks_1").run(train, growing(corpus, alone, **changes))
    pool.run(train_keeping_growths, growing(corpus, live, layout, **changes), str(kept))
    if precision == "fp32":
        assert _furthest(_losses(live), _losses(alone)) < (1e-4 if layout[1] > 1 else 2e-5)

    grow_checkpoint(kept / "before-10", kept / "grown", "lidas", DepthSpec.parse(8))
    with Checkpoint.open(kept / "grown") as grown, Checkpoint.open(kept / "after-10") as after:
        assert grown.manifest.plan == after.manifest.plan
        for state_name in ("model", "master", "exp_avg", "exp_avg_sq"):
            assert set(grown.names(state_name)) == set(after.names(state_name))
            for name in after.names(state_name):
                assert torch.equal(grown.read(state_name, name), after.read(state_name, name)), (
                    f"{state_name} of {name}"
                )

    for name, checkpoint in (("offline", kept / "grown"), ("on-load", kept / "before-10")):
        directory = tmp_path / name
        _stop_at(live, directory, 10, checkpoint)
        pool.run(train, growing(corpus, directory, layout, **changes), True)
        assert _furthest(_losses(directory)[10:], _losses(live)[10:]) < 1e-5
        assert [event["live"] for event in events(directory, "grow")] == ([False] if name == "on-load" else [])


def _stop_at(directory: Path, copy: Path, step: int, checkpoint: Path | None = None) -> None:
    """What a run leaves that was killed later, with its newest checkpoint at ``step``."""
    shutil.copytree(directory, copy)
    (copy / "events.jsonl").unlink()
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step or checkpoint is not None:
            shutil.rmtree(path)
    if checkpoint is not None:
        shutil.copytree(checkpoint, copy / "checkpoints" / f"step-{step:08d}")


@pytest.mark.slow
def test_what_a_run_tells_of_a_growth(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    values = growing(corpus, directory, (2, 1, 1), growth={"save_before": True})
    ranks_2.run(train, values)
    (event,) = events(directory, "grow")
    assert event["step"] == 10
    assert event["live"] is True
    assert event["plan_before"] == DepthPlan.plain(4).to_json()
    assert event["plan"] == grow(DepthPlan.plain(4), "lidas", 8, 4).plan.to_json()
    assert event["topology"] == event["topology_before"] == {"pp": 2, "tp": 1, "dp": 1}
    assert event["bytes"] == sum(event["moved_bytes"]) > 0
    assert sum(event["in_place_bytes"]) > 0
    assert event["seconds"] >= event["build_seconds"] + event["exchange_seconds"] > 0
    assert 0 < event["loss_before"] != event["loss_after"]
    assert [item["step"] for item in events(directory, "save")] == [8, 10, 16, 20]
    with Checkpoint.open(directory / "checkpoints" / "step-00000010") as checkpoint:
        assert checkpoint.manifest.plan == DepthPlan.plain(4)
        assert checkpoint.manifest.growth is not None
        assert checkpoint.manifest.growth.stage == 0
    with Checkpoint.open(directory / "checkpoints" / "step-00000020") as checkpoint:
        entry = checkpoint.manifest.growth
        assert entry is not None
        assert (entry.operator, entry.stage, entry.stages) == ("lidas", 1, 2)

    records = metrics(directory)
    assert [record["layers"] for record in records] == [4] * 10 + [8] * 10
    config = Config.model_validate(values)
    per_step = [
        flops_per_token(stage.plan, config.model, 32, vocab_size=records_vocabulary(directory)).total * 4 * 32
        for stage in config.stages
    ]
    assert records[-1]["flops"] == 10 * sum(per_step)


def records_vocabulary(directory: Path) -> int:
    with Checkpoint.open(directory / "checkpoints" / "step-00000020") as checkpoint:
        rows = checkpoint.manifest.vocab_size
        return rows


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["build", "exchange"])
@pytest.mark.parametrize("save_before", [False, True])
def test_a_rank_that_dies_in_a_growth_leaves_the_last_checkpoint(
    ranks_2: RankPool, corpus: Path, tmp_path: Path, alone: Path, moment: str, save_before: bool
) -> None:
    # written before the next step: a thread might not be done when the rank dies
    changes: dict[str, Any] = {"growth": {"save_before": save_before}, "checkpoint__asynchronous": False}
    values = growing(corpus, tmp_path / "run", (2, 1, 1), **changes)
    with pytest.raises(RankError):
        ranks_2.run(train_dying_in_growth, values, moment)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000008"] + ["step-00000010"] * save_before
    ranks_2.run(train, values, True)
    assert _furthest(_losses(tmp_path / "run"), _losses(alone)) < 2e-5
    assert [event["live"] for event in events(tmp_path / "run", "grow")] == [not save_before]


@pytest.mark.slow
def test_a_run_resumed_before_and_after_its_growth_is_the_run_that_was_not_stopped(
    ranks_1: RankPool, corpus: Path, tmp_path: Path, alone: Path
) -> None:
    for step in (8, 16):
        directory = tmp_path / str(step)
        _stop_at(alone, directory, step)
        ranks_1.run(train, growing(corpus, directory), True)
        assert _losses(directory) == _losses(alone)


@pytest.mark.slow
def test_the_topology_may_follow_the_depth(ranks_4: RankPool, corpus: Path, tmp_path: Path, alone: Path) -> None:
    topology = [{"layers": 4, "pp": 1}, {"layers": 8, "pp": 2}]
    samples = ranks_4.run(train, growing(corpus, tmp_path / "run", (1, 1, 4), growth={"topology": topology}))
    records = metrics(tmp_path / "run")
    assert [(record["pp"], record["dp"]) for record in records] == [(1, 4)] * 10 + [(2, 2)] * 10
    assert _furthest(_losses(tmp_path / "run"), _losses(alone)) < 2e-5
    validations = [
        [record["val_loss"] for record in metrics(path) if record["val_loss"]] for path in (tmp_path / "run", alone)
    ]
    assert _furthest(*validations) < 2e-5
    assert set(samples[0][:10]) | set(samples[1][:10]) | set(samples[2][:10]) | set(samples[3][:10]) == set(range(40))


@pytest.mark.slow
def test_the_learning_rate_warms_up_again_where_asked(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    ranks_1.run(train, growing(corpus, tmp_path / "run", growth={"warmup_steps": 4}))
    rates = [record["lr"] for record in metrics(tmp_path / "run")]
    assert rates[8:14] == pytest.approx([3e-3, 3e-3, 0.75e-3, 1.5e-3, 2.25e-3, 3e-3])


@pytest.mark.slow
@pytest.mark.parametrize("moments", ["copy", "zero"])
def test_a_new_run_takes_a_grown_checkpoint_and_grows_it_on(
    ranks_1: RankPool, corpus: Path, tmp_path: Path, alone: Path, moments: str
) -> None:
    """A checkpoint that was grown before is a plan of its own; growth begins with its layers."""
    stages = [{"steps": 10, "layers": 8}, {"steps": 10, "layers": 12}]
    changes: dict[str, Any] = {
        "growth": {"start": 8, "schedule": stages, "moments": moments},
        "depth": "12",
        "init": str(alone),
    }
    ranks_1.run(train, growing(corpus, tmp_path / "run", **changes))
    (event,) = events(tmp_path / "run", "grow")
    before = grow(DepthPlan.plain(4), "lidas", 8, 4).plan
    assert event["plan_before"] == before.to_json()
    assert event["plan"] == grow(before, "lidas", 12, 4).plan.to_json()
    assert metrics(tmp_path / "run")[0]["loss"] < metrics(alone)[0]["loss"] - 0.3
    _stop_at(tmp_path / "run", tmp_path / "resumed", 16)
    ranks_1.run(train, growing(corpus, tmp_path / "resumed", **changes), True)
    assert _losses(tmp_path / "resumed") == _losses(tmp_path / "run")


def test_a_grown_checkpoint_goes_on_without_growth(
    ranks_1: RankPool, corpus: Path, tmp_path: Path, alone: Path
) -> None:
    _stop_at(alone, tmp_path / "run", 16)
    values = growing(corpus, tmp_path / "run")
    ranks_1.run(train, {**values, "growth": None}, True)
    assert _losses(tmp_path / "run") == _losses(alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"growth": {"operator": "last", "block": 2}},
            "the lineage of its 8 layers is that of lidas (block 4, insert_at after), but growth.operator is last (block 2",
        ),
        (
            {"growth": {"block": 2}},
            "the lineage of its 8 layers is that of lidas (block 4, insert_at after), but growth.operator is lidas (block 2",
        ),
        (
            {"growth": {"schedule": [{"steps": 30, "layers": 4}, {"steps": 10, "layers": 8}]}, "train__steps": 40},
            "it has 8 layers, but at step 16 the growth schedule is at 4; growth never shrinks",
        ),
        ({"growth": {}, "depth": "4", "no_growth": True}, "the checkpoint is of another shape: it holds depth"),
    ],
    ids=["operator", "block", "shrinking", "depth"],
)
def test_a_checkpoint_that_does_not_fit_the_growth_is_refused(
    ranks_1: RankPool, corpus: Path, tmp_path: Path, alone: Path, changes: dict[str, Any], message: str
) -> None:
    _stop_at(alone, tmp_path / "run", 16)
    without = changes.pop("no_growth", False)
    values = growing(corpus, tmp_path / "run", **{"schedule__cooldown": 0.0, **changes})
    with pytest.raises(RankError) as caught:
        ranks_1.run(train, {**values, "growth": None} if without else values, True)
    assert message in str(caught.value.error)
    assert "\n" not in str(caught.value.error)
    assert (tmp_path / "run" / "checkpoints" / "step-00000016" / "manifest.json").is_file()


@pytest.mark.slow
def test_the_command_line_grows_in_flight_and_offline(corpus: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(growing(corpus, tmp_path / "run", (2, 1, 1), growth={"save_before": True})))
    shown = _megaloop("train", str(path))
    assert "growth lidas: 4 layers until step 10, 8 layers until step 20" in shown
    assert "step 10  grown from 4 to 8 layers in" in shown
    assert "growing saved" in shown
    checkpoints = tmp_path / "run" / "checkpoints"
    shown = _megaloop("grow", str(checkpoints / "step-00000010"), "--out", str(tmp_path / "grown"), "--layers", "8")
    assert "parameters before" in shown
    with Checkpoint.open(tmp_path / "grown", verify="checksums") as grown:
        assert grown.manifest.growth is not None
        assert grown.manifest.growth.operator == "lidas"
        assert (grown.manifest.step, grown.manifest.run.samples) == (10, 40)
        assert grown.tokenizer is not None
    refused = _megaloop("grow", str(tmp_path / "grown"), "--out", str(tmp_path / "worse"), "--layers", "10", code=2)
    assert "10 layers cannot be reached from 8 by blocks of 4" in refused
    assert not (tmp_path / "worse").exists()


def _megaloop(*arguments: str, code: int = 0) -> str:
    done = processes.run(*arguments)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr
