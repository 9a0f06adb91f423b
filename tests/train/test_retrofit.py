"""Loops that come, go, grow and are untied in a run: the same in flight as offline or on load."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megaloop.checkpoint import Checkpoint
from megaloop.checkpoint.depth import grow_checkpoint, loop_checkpoint
from megaloop.config import Config
from megaloop.depth import DepthPlan, DepthSpec
from megaloop.depth.flops import flops_per_token
from megaloop.errors import MegaloopError
from tests.distributed import RankError, RankPool
from tests.train.runs import configuration, events, metrics, train, train_keeping_growths

STEPS, CHANGE = 12, 6
STAGES = [{"steps": 4, "layers": 4}, {"steps": 8, "layers": 8}]


@dataclass(frozen=True)
class Case:
    """A change of depth at step ``CHANGE`` of ``STEPS``.

    Attributes:
        settings: of the run.
        depths: how deep the model runs, by the step from which on.
        offline: the same change on disk.
        event: what the run calls it.
    """

    settings: dict[str, Any]
    depths: dict[int, int]
    offline: Callable[[Path, Path], Any]
    event: str = "loop"


GROWN = {"depth": "8", "growth": {"start": 4, "schedule": STAGES}}
CASES = {
    "a grown model loops": Case(
        GROWN | {"depth_events": [{"at": 0.5, "depth": "2-4x2-2"}]},
        {0: 4, 4: 8, CHANGE: 12},
        lambda before, out: loop_checkpoint(before, out, DepthSpec.parse("2-4x2-2")),
    ),
    "a grown model loops, with parameters of the loop's own": Case(
        GROWN
        | {
            "depth_events": [{"at": 0.5, "depth": "2-4x2-2"}],
            "loop": {"injection": "concat", "norm": True, "residual_scale": "1/k"},
        },
        {0: 4, 4: 8, CHANGE: 12},
        lambda before, out: loop_checkpoint(
            before, out, DepthSpec.parse("2-4x2-2"), changes={"injection": "concat", "norm": True, "residual_scale": "1/k"}
        ),
    ),
    "a looped model grows": Case(
        {"depth": "2-4x2-2", "growth": {"start": 4, "schedule": [{"steps": CHANGE, "layers": 4}, {"steps": STEPS - CHANGE, "layers": 8}]}},
        {0: 6, CHANGE: 12},
        lambda before, out: grow_checkpoint(before, out, "lidas", DepthSpec.parse("2-4x2-2")),
        "grow",
    ),
    "a looped model is untied": Case(
        {"depth": "1-2x3-1", "depth_events": [{"at": 0.5, "untie": True}]},
        {0: 8, CHANGE: 8},
        lambda before, out: loop_checkpoint(before, out, None),
        "grow",
    ),
    "a looped model with scaled norms is untied": Case(
        {"depth": "1-2x3-1", "depth_events": [{"at": 0.5, "untie": True}], "model__norm_scaling": True},
        {0: 8, CHANGE: 8},
        lambda before, out: loop_checkpoint(before, out, None),
        "grow",
    ),
    "a loop goes, and its parameters with it": Case(
        {
            "depth": "1-2x2-1",
            "depth_events": [{"at": 0.5, "depth": 4}],
            "loop": {"injection": "concat", "norm": True},
        },
        {0: 6, CHANGE: 4},
        lambda before, out: loop_checkpoint(before, out, DepthSpec.parse("4")),
    ),
    "a loop moves": Case(
        {"depth": "1-2x2-1", "depth_events": [{"at": 0.5, "depth": "0-3x2-1"}]},
        {0: 6, CHANGE: 7},
        lambda before, out: loop_checkpoint(before, out, DepthSpec.parse("0-3x2-1")),
    ),
}  # fmt: skip


def values(corpus: Path, directory: Path, layout: tuple[int, int, int], case: Case, **changes: Any) -> dict[str, Any]:
    settings = case.settings | {
        "train__steps": STEPS,
        "schedule__cooldown": 0.3,
        "checkpoint": {"every": CHANGE, "keep": 5},
    }
    return configuration(corpus, directory, layout, **settings, **changes)


@pytest.fixture(scope="module")
def alone(ranks_1: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a case on one rank, in fp32, made once."""

    @cache
    def run(name: str) -> Path:
        directory = tmp_path_factory.mktemp("alone") / "run"
        ranks_1.run(train, values(corpus, directory, (1, 1, 1), CASES[name]))
        return directory

    return run


REPLICATED = [
    "a grown model loops, with parameters of the loop's own",
    "a looped model grows",
    "a looped model is untied",
]
"""One of each kind, with replicas and in bf16 as well."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "precision"),
    [*((name, (2, 1, 1), "fp32") for name in CASES), *((name, (2, 1, 2), "bf16") for name in REPLICATED)],
    ids=str,
)
def test_live_equals_offline_equals_on_load(
    request: pytest.FixtureRequest,
    corpus: Path,
    tmp_path: Path,
    alone: Callable[[str], Path],
    name: str,
    layout: tuple[int, int, int],
    precision: str,
) -> None:
    case = CASES[name]
    pool: RankPool = request.getfixturevalue(f"ranks_{layout[0] * layout[2]}")
    live, kept = tmp_path / "live", tmp_path / "kept"
    pool.run(train_keeping_growths, values(corpus, live, layout, case, train__precision=precision), str(kept))
    if precision == "fp32":
        assert _furthest(_losses(live), _losses(alone(name))) < 2e-5

    case.offline(kept / f"before-{CHANGE}", kept / "changed")
    with Checkpoint.open(kept / "changed") as changed, Checkpoint.open(kept / f"after-{CHANGE}") as after:
        assert changed.manifest.plan == after.manifest.plan
        for state_name in ("model", "master", "exp_avg", "exp_avg_sq"):
            assert set(changed.names(state_name)) == set(after.names(state_name))
            for tensor in after.names(state_name):
                assert torch.equal(changed.read(state_name, tensor), after.read(state_name, tensor)), (
                    f"{state_name} of {tensor}"
                )

    for copy, checkpoint in (("offline", kept / "changed"), ("on-load", kept / f"before-{CHANGE}")):
        directory = tmp_path / copy
        shutil.copytree(live, directory)
        shutil.rmtree(directory / "checkpoints")
        shutil.copytree(checkpoint, directory / "checkpoints" / f"step-{CHANGE:08}")
        (directory / "events.jsonl").unlink()
        pool.run(train, values(corpus, directory, layout, case, train__precision=precision), True)
        assert _furthest(_losses(directory)[CHANGE:], _losses(live)[CHANGE:]) < 1e-5
        changes = [event["live"] for event in events(directory, case.event)]
        assert changes == ([False] if copy == "on-load" else [])


def _losses(directory: Path, steps: int = STEPS) -> list[float]:
    records = metrics(directory)
    assert [record["step"] for record in records] == list(range(1, steps + 1)), "each step exactly once"
    return [record["loss"] for record in records]


def _furthest(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_a_run_tells_of_it(alone: Callable[[str], Path], corpus: Path, name: str) -> None:
    case, run = CASES[name], alone(name)
    settings = values(corpus, run, (1, 1, 1), case)
    records = metrics(run)
    expected = [max(step for step in case.depths if step <= index) for index in range(STEPS)]
    assert [record["depth"] for record in records] == [case.depths[step] for step in expected]
    last = events(run, case.event)[-1]
    assert last["step"] == CHANGE
    plan = Config.model_validate(settings).stages[-1].plan
    assert last["plan"] == plan.to_json()
    if name == "a looped model is untied":
        assert last["loss_before"] == pytest.approx(last["loss_after"], rel=1e-6)
        assert [record["layers"] for record in records] == [4] * CHANGE + [8] * (STEPS - CHANGE)
    else:
        assert last["loss_before"] != last["loss_after"]
    per_token = flops_per_token(
        plan, Config.model_validate(settings).model, 32, vocab_size=_rows(run)
    )  # fmt: skip
    assert records[-1]["flops"] - records[-2]["flops"] == per_token.total * 4 * 32


def _rows(directory: Path) -> int:
    with Checkpoint.open(max((directory / "checkpoints").iterdir())) as checkpoint:
        rows = checkpoint.manifest.vocab_size
        return rows


@pytest.mark.slow
def test_a_drawn_count_is_told_and_resumes_alike(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"depth": "1-2x3-1", "loop": {"count": "uniform", "ramp": 0.5}}
    run = configuration(corpus, tmp_path / "run", (2, 1, 1), **changes)
    ranks_2.run(train, run)
    config, records = Config.model_validate(run), metrics(tmp_path / "run")
    counts = [config.loop_iterations(config.plan, step) for step in range(20)]
    assert len(set(counts)) > 2
    assert [record["depth"] for record in records] == [2 + 2 * (iterations or 0) for iterations in counts]
    losses = _losses(tmp_path / "run", 20)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000020")
    ranks_2.run(train, run, True)
    assert _losses(tmp_path / "run", 20) == losses
    steps = [
        flops_per_token(config.plan, config.model, 32, vocab_size=_rows(tmp_path / "run"), iterations=t) for t in counts
    ]
    assert metrics(tmp_path / "run")[-1]["flops"] == sum(item.total for item in steps) * 4 * 32


@pytest.mark.slow
def test_a_new_run_loops_a_plain_checkpoint_and_keeps_to_a_trained_style(
    ranks_1: RankPool, corpus: Path, tmp_path: Path
) -> None:
    ranks_1.run(train, configuration(corpus, tmp_path / "plain", depth="4"))
    begun: dict[str, Any] = {"depth": "1-2x2-1", "init": str(tmp_path / "plain"), "loop": {"injection": "add"}}
    ranks_1.run(train, configuration(corpus, tmp_path / "looped", **begun))
    (change,) = events(tmp_path / "looped", "loop")
    assert (change["step"], change["live"]) == (0, False)
    assert metrics(tmp_path / "looped")[0]["depth"] == 6
    other: dict[str, Any] = {"depth": "1-2x2-1", "init": str(tmp_path / "looped")}
    with pytest.raises(RankError, match=r"its loop has injection add.*but the configuration says injection none"):
        ranks_1.run(train, configuration(corpus, tmp_path / "other", **other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda run, out: loop_checkpoint(run, out, DepthSpec.parse("1-2x2-2")),
            "has 5 layers of its own, and there are 4: loops add none, growth does",
        ),
        (
            lambda run, out: loop_checkpoint(run, out, DepthSpec.parse("0-2x2-1")),
            "1 would be dropped, and loops leave the layers as they are",
        ),
        (lambda run, out: loop_checkpoint(run, out, DepthSpec.parse("4")), "is 4 already; choose another depth"),
        (lambda run, out: loop_checkpoint(run, out, None), "repeats no layer; there is nothing to untie"),
        (lambda run, out: loop_checkpoint(run, out, DepthSpec.parse("1-2xx2")), "cannot read '1-2xx2'"),
        (
            lambda run, out: grow_checkpoint(_looped(run), out, "lidas", DepthSpec.parse(6), 2),
            r"say which loop .* --depth 3-2x2-1",
        ),
        (
            lambda run, out: loop_checkpoint(_looped(run), out, DepthSpec.parse("0-3x2-1"), changes={"norm": True}),
            "its loop goes on as it was trained; leave --norm out",
        ),
    ],
)
def test_what_cannot_be_changed_is_refused(
    ranks_1: RankPool,
    corpus: Path,
    tmp_path: Path,
    change: Callable[[Path, Path], Any],
    message: str,
    plain_run: Path,
) -> None:
    with pytest.raises(MegaloopError, match=message) as caught:
        change(plain_run, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def plain_run(ranks_1: RankPool, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four layers."""
    directory = tmp_path_factory.mktemp("plain") / "run"
    ranks_1.run(train, configuration(corpus, directory, depth="4", train__steps=2, schedule__warmup_steps=0))
    return directory


def _looped(run: Path) -> Path:
    out = run.parent / "looped"
    if not out.exists():
        loop_checkpoint(run, out, DepthSpec.parse("1-2x2-1"))
    return out


def test_looping_and_unlooping_changes_no_bit(plain_run: Path, tmp_path: Path) -> None:
    looped = loop_checkpoint(plain_run, tmp_path / "looped", DepthSpec.parse("1-2x3-1"))
    assert (looped.depth_before, looped.depth, looped.layers, looped.effective_depth) == ("4", "1-2x3-1", 4, 8)
    loop_checkpoint(tmp_path / "looped", tmp_path / "plain", DepthSpec.parse("4"))
    newest = plain_run / "checkpoints" / "step-00000002"
    with Checkpoint.open(newest) as before, Checkpoint.open(tmp_path / "plain") as after:
        assert after.manifest.plan == DepthPlan.plain(4)
        assert (after.manifest.step, after.manifest.run.samples) == (before.manifest.step, before.manifest.run.samples)
        for state_name in ("model", "master", "exp_avg", "exp_avg_sq"):
            for name in before.names(state_name):
                assert torch.equal(before.read(state_name, name), after.read(state_name, name))
