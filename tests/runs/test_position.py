"""What a resumed run goes on with is what it has come from, or it says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from megaloop.checkpoint import Checkpoint, RunState
from megaloop.config import Config
from megaloop.data import Sources, open_sources
from megaloop.depth import DepthPlan, GrowthStage, growth_stages
from megaloop.errors import MegaloopError
from megaloop.runs.allow import Allow
from megaloop.runs.position import after_step, begin, go_on
from megaloop.train.console import describe_depths
from tests.data.corpus import documents
from tests.distributed import RankError, RankPool
from tests.train.runs import configuration, events, train


def _opened(corpus: Path, **changes: Any) -> tuple[Config, Sources]:
    config = Config.model_validate(configuration(corpus, Path("none"), **changes))
    return config, open_sources(config.data)


def _two(corpus: Path, *weights: Any) -> dict[str, Any]:
    return {"data__sources": [{"path": str(corpus), "weight": weight} for weight in weights]}


@pytest.fixture(scope="module")
def saved(corpus: Path) -> RunState:
    """After 10 steps of 4 samples."""
    return begin(*_opened(corpus)).model_copy(update={"step": 10, "samples": 40, "tokens": 1280, "lr": 3e-3})


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other data with the same tokenizer."""
    from data_prep.prepare import prepare

    folder = tmp_path_factory.mktemp("other")
    lines = (json.dumps({"text": document}) + "\n" for document in documents(100, seed=1))
    (folder / "text.jsonl").write_text("".join(lines))
    prepare(
        [folder / "text.jsonl"],
        folder / "shards",
        tokenizer=corpus / "tokenizer.model",
        sequence_length=32,
        validation_fraction=0.3,
    )
    return folder / "shards"


def test_the_same_goes_on(corpus: Path, saved: RunState, tmp_path: Path) -> None:
    moved = shutil.copytree(corpus, tmp_path / "moved")
    config, sources = _opened(moved, train__micro_batch=2, train__steps=40, optimizer={"lr": 1e-4})
    at, changes = go_on(config, sources, saved, ())
    assert (at, changes) == (saved.model_copy(update={"steps": 40, "data": at.data}), ())


@pytest.mark.parametrize(
    ("changes", "what", "message"),
    [
        ({"seed": 1}, Allow.seed, "it was trained with seed 0, and seed is 1 now"),
        ({"train__global_batch": 8}, Allow.batch, "trained with train.global_batch 4, which is 8 now"),
        ({"data__sequence_length": 16}, Allow.data, "trained with data.sequence_length 32, which is 16 now"),
        (_two(Path("CORPUS"), 1, 1), Allow.data, "it was trained on 1 sources, and data.sources has 2"),
    ],
    ids=["seed", "batch", "length", "sources"],
)
def test_a_change_is_refused_or_taken_with_a_flag(
    corpus: Path, saved: RunState, changes: dict[str, Any], what: Allow, message: str
) -> None:
    for source in changes.get("data__sources", []):
        source["path"] = str(corpus)
    config, sources = _opened(corpus, **changes)
    others = set(Allow) - {what}
    with pytest.raises(MegaloopError) as raised:
        go_on(config, sources, saved, others)
    assert message in str(raised.value)
    assert str(raised.value).endswith(f"sample 40, would not be where it was; go on with what it had, or take the change with --allow {what}")  # fmt: skip
    at, (change,) = go_on(config, sources, saved, [what])
    assert (change.what, message in change.text) == (what, True)
    now = begin(config, sources)
    assert (at.seed, at.batch, at.data) == (now.seed, now.batch, now.data)
    assert (at.step, at.samples, at.tokens, at.lr) == (10, 40, 1280, 3e-3)
    assert go_on(config, sources, at, ())[1] == (), "the next resume finds nothing to ask"


def test_other_samples_are_known_by_their_hashes(corpus: Path, other: Path, saved: RunState) -> None:
    config, sources = _opened(other)
    with pytest.raises(MegaloopError, match=r"holds other samples than it was trained on .*; .* other validation samp"):
        go_on(config, sources, saved, ())
    assert go_on(config, sources, saved, [Allow.data])[0].samples == 40


def test_fine_tunings_examples_are_known_by_what_is_made_of_them(corpus: Path, tmp_path: Path) -> None:
    from tests.data.test_sft import examples, write

    def state(count: int, **changes: Any) -> RunState:
        pairs = write(tmp_path / "pairs.jsonl", examples(count))
        made = {"data__format": "sft", "data__sequence_length": 64, "data__tokenizer": str(corpus / "tokenizer.model")}
        return begin(*_opened(pairs, **made, **changes))

    first = state(40)
    assert state(40) == first
    assert state(41).data != first.data
    assert state(40, data__validation_fraction=0.5).data != first.data


@pytest.mark.parametrize(
    ("before", "after", "allowed", "same"),
    [
        ((1, 3), (2, 6), (), True),
        ((1, 3), (1, 2), (), False),
        ((1, 3), (1, 2), [Allow.data], True),
        # the cooldown (from sample 68 of 80 on) has not begun: what it will be, its beginning included, is still open
        ((1, {"stable": 3, "cooldown": 1}), (1, 3), (), True),
        ((1, 3), (1, {"stable": 3, "cooldown": 1}), (), True),
    ],
    ids=["the same shares", "others", "others, taken", "no cooldown more", "another cooldown"],
)
def test_weights_count_as_far_as_they_have_been_used(
    corpus: Path, before: tuple[Any, ...], after: tuple[Any, ...], allowed: Collection[Allow], same: bool
) -> None:
    state = begin(*_opened(corpus, **_two(corpus, *before))).model_copy(update={"step": 10, "samples": 40})
    config, sources = _opened(corpus, **_two(corpus, *after))
    if same:
        go_on(config, sources, state, allowed)
        return
    with pytest.raises(MegaloopError, match=r"the weights of its sources \(data\.sources"):
        go_on(config, sources, state, allowed)


def test_a_cooldown_that_has_begun_can_not_begin_elsewhere(corpus: Path) -> None:
    weights = _two(corpus, 1, {"stable": 3, "cooldown": 1})
    state = begin(*_opened(corpus, **weights)).model_copy(update={"step": 19, "samples": 76})
    longer = _opened(corpus, **weights, train__steps=40)
    with pytest.raises(MegaloopError, match="or the beginning of the cooldown"):
        go_on(*longer, state, ())
    go_on(*longer, state.model_copy(update={"step": 15, "samples": 60}), ())


def test_another_batch_would_move_a_cooldown_of_the_mixture(corpus: Path) -> None:
    weights = _two(corpus, 1, {"stable": 3, "cooldown": 1})
    state = begin(*_opened(corpus, **weights)).model_copy(update={"step": 10, "samples": 40})
    with pytest.raises(MegaloopError, match=r"begin at a sample that the batch decides; keep train\.global_batch"):
        go_on(*_opened(corpus, **weights, train__global_batch=8), state, [Allow.batch])


def test_a_cooldown_of_the_mixture_can_not_follow_another_batch(corpus: Path) -> None:
    """It would begin at sample 136, step 17 of 8 samples: but the first 10 steps took 4."""
    one, own = _two(corpus, 1, 3), _two(corpus, 1, {"stable": 3, "cooldown": 1})
    before = begin(*_opened(corpus, **one)).model_copy(update={"step": 10, "samples": 40, "tokens": 1280})
    at, _ = go_on(*_opened(corpus, **one, train__global_batch=8), before, [Allow.batch])
    with pytest.raises(MegaloopError, match=r"its 10 steps took 40 samples, not 8 \(train\.global_batch\) each"):
        go_on(*_opened(corpus, **own, train__global_batch=8), at, ())
    past_a_hole = before.model_copy(update={"samples": 52})
    go_on(*_opened(corpus, **own), past_a_hole, ())


def test_a_state_without_hashes_goes_on(corpus: Path, other: Path, saved: RunState) -> None:
    """As an earlier version wrote it; and one that knows nothing at all, as an imported checkpoint."""
    assert saved.data is not None
    sources = tuple(source.model_copy(update={"train": None, "validation": None}) for source in saved.data.sources)
    without = saved.model_copy(update={"data": saved.data.model_copy(update={"sources": sources})})
    config, opened = _opened(other)
    assert go_on(config, opened, without, ())[1] == ()
    unknown = saved.model_copy(update={"data": None, "batch": None})
    at, _ = go_on(config, opened, unknown, ())
    assert at.data == begin(config, opened).data


def test_the_order_is_that_with_which_the_run_began(corpus: Path, saved: RunState) -> None:
    assert begin(*_opened(corpus)).order_version == saved.order_version == 2
    at, _ = go_on(*_opened(corpus), saved.model_copy(update={"order_version": 1}), ())
    assert at.order_version == 1
    with pytest.raises(MegaloopError, match=r"in an order of version 7; this megaloop knows 1 to 2"):
        go_on(*_opened(corpus), saved.model_copy(update={"order_version": 7}), ())


def test_a_checkpoint_that_has_trained_nothing_is_compared_with_nothing(corpus: Path) -> None:
    """An import has neither a seed nor a place in the data; its run is a new one."""
    config, sources = _opened(corpus, seed=3)
    imported = RunState.fresh().at_depth(DepthPlan.plain(3))
    at, changes = go_on(config, sources, imported, ())
    assert changes == ()
    assert at == begin(config, sources).at_depth(DepthPlan.plain(3))


def test_a_step_keeps_what_it_does_not_count(corpus: Path) -> None:
    config, sources = _opened(corpus)
    first = begin(config, sources).at_depth(DepthPlan.plain(3))
    at = after_step(first, config, flops=5, lr=0.1, applied=False, excluded=[(2, 6)])
    counted = {"step": 1, "samples": 10, "tokens": 128, "flops": 5, "skipped": 1, "lr": 0.1}
    assert at == first.model_copy(update=counted)


def _stages(steps: list[int]) -> tuple[GrowthStage, ...]:
    return growth_stages([4, 8, 12][: len(steps)], steps, "lidas", 4)


def test_the_depths_that_are_told_are_those_that_the_run_had() -> None:
    """Of a run that went through 10, 20 and 30 steps, and of which another configuration now says 100, 200 and 300."""
    at = RunState.fresh().at_depth(DepthPlan.plain(4))
    for step, layers in ((10, 8), (30, 12)):
        at = at.model_copy(update={"step": step}).at_depth(DepthPlan.plain(layers), grown=True)
    at = at.model_copy(update={"step": 60})
    stages = (GrowthStage(0, 600, DepthPlan.plain(12), _stages([1])[0].growth),)
    assert describe_depths(at, stages) == "4 layers until step 10, 8 layers until step 30, 12 layers until step 600"
    first = RunState.fresh().at_depth(DepthPlan.plain(4))
    whole = "4 layers until step 10, 8 layers until step 30, 12 layers until step 60"
    assert describe_depths(first, _stages([10, 20, 30])) == whole
    later = RunState.fresh().model_copy(update={"step": 20}).at_depth(DepthPlan.plain(8))
    assert describe_depths(later, _stages([10, 20, 30])) == (
        "what it had until step 20 is not known, 8 layers until step 30, 12 layers until step 60"
    )


# --- from the command line ---


def test_flags_reach_the_run_and_the_job(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megaloop.cli.main import app

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(configuration(corpus, tmp_path / "run")))
    seen: list[Any] = []
    monkeypatch.setattr("megaloop.cli.train._train_here", lambda *arguments, **options: seen.extend(arguments))
    flags = ["--allow", "data", "--allow", "batch"]
    runner = CliRunner()
    done = runner.invoke(app, ["train", str(file), "--ranks", "1", "--resume", *flags])
    assert not done.exception, done.output
    assert [Allow.data, Allow.batch] in seen
    done = runner.invoke(app, ["train", str(file), *flags])
    assert isinstance(done.exception, MegaloopError)
    assert str(done.exception) == "--allow says what --resume may find changed; add --resume"
    assert runner.invoke(app, ["train", str(file), "--resume", "--allow", "all"]).exit_code == 2
    job = ["--nodes", "1", "--tasks-per-node", "1", "--dry-run"]
    assert "--resume --allow data --allow batch" in runner.invoke(app, ["submit", str(file), *job, *flags]).stdout


# --- on ranks ---


@pytest.mark.slow
def test_a_run_resumed_with_something_else_says_so(
    ranks_1: RankPool, corpus: Path, other: Path, tmp_path: Path
) -> None:
    """Ten steps of 4 samples, then ten of 8: no sample is repeated or left out, and the learning rate goes on by steps."""
    run = tmp_path / "run"
    ranks_1.run(train, configuration(corpus, run, train__steps=10, schedule={"warmup_steps": 4, "cooldown": 0}))
    values = configuration(corpus, run, train__global_batch=8, schedule={"warmup_steps": 4, "cooldown": 0})
    for refused, flags in (
        (values, "batch"),
        ({**values, "seed": 1}, "seed --allow batch"),
        (configuration(other, run), "data"),
    ):
        with pytest.raises(RankError, match=f"take the change with --allow {flags}"):
            ranks_1.run(train, refused, True)
    (taken,) = ranks_1.run(train, values, True, [Allow.batch])
    assert taken == list(range(40, 120))
    (event,) = events(run, "changed")
    assert (event["step"], event["what"]) == (10, "batch")
    assert not events(run, "schedule")
    with Checkpoint.open(run / "checkpoints/step-00000020") as checkpoint:
        state = checkpoint.manifest.run
    assert (state.step, state.samples, state.tokens, state.batch) == (20, 120, 120 * 32, 8)


def test_a_finished_run_that_goes_on_warns_of_its_learning_rate(
    ranks_1: RankPool, corpus: Path, tmp_path: Path
) -> None:
    run, growth = tmp_path / "run", {"operator": "lidas", "start": 2, "block": 1, "end": 0.5}
    ranks_1.run(train, configuration(corpus, run, train__steps=10, growth=growth))
    with Checkpoint.open(run / "checkpoints/step-00000010") as checkpoint:
        first = checkpoint.manifest.run
    assert [(depth.step, depth.layers, depth.grown) for depth in first.depths] == [(0, 2, False), (2, 3, True)]
    ranks_1.run(train, configuration(corpus, run, train__steps=20, growth=growth), True)
    (event,) = events(run, "schedule")
    assert (event["step"], event["steps_before"], event["steps"]) == (10, 10, 20)
    assert (event["lr_before"], event["lr"]) == (first.lr, 3e-3)
    assert event["lr_before"] < 3e-3
    with Checkpoint.open(run / "checkpoints/step-00000020") as checkpoint:
        assert checkpoint.manifest.run.depths == first.depths
