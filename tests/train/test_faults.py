"""Steps without a finite gradient, spikes, and going back: on real ranks, against runs in which nothing went wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megaloop.checkpoint import Checkpoint, RunState
from megaloop.config import FaultsConfig
from megaloop.errors import MegaloopError
from megaloop.parallel.engine import StepResult
from megaloop.runs.excluded import read_excluded
from megaloop.train.faults import Faults, RollBack, Spike
from tests.distributed import RankError, RankPool
from tests.train.runs import configuration, events, losses, metrics, train, train_on_bad_samples

Layout = tuple[int, int, int]


def _values(corpus: Path, directory: Path, layout: Layout = (1, 1, 1), **changes: Any) -> dict[str, Any]:
    """12 steps of 4 samples, checkpoints every 3: step 6 takes samples 20 to 23."""
    basis: dict[str, Any] = {
        "train__steps": 12,
        "checkpoint__every": 3,
        "validation__every": 0,
        "schedule__cooldown": 0,
    }
    return configuration(corpus, directory, layout, **{**basis, **changes})


@pytest.mark.parametrize(
    ("layout", "precision"),
    [((1, 1, 1), "fp32"), ((2, 1, 1), "fp32"), ((1, 2, 1), "fp32"), ((1, 1, 2), "fp32"), ((2, 1, 1), "bf16")],
    ids=str,
)
def test_a_step_without_a_finite_gradient_is_skipped_by_all_ranks_and_counted(
    request: pytest.FixtureRequest, corpus: Path, tmp_path: Path, layout: Layout, precision: str
) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks_{math.prod(layout)}")
    values = _values(corpus, tmp_path / "run", layout, train__precision=precision, train__check_replicas=1)
    pool.run(train_on_bad_samples, values, [21])
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records if "nonfinite" in record] == [6]
    assert [(event["step"], event["skipped"]) for event in events(tmp_path / "run", "skip")] == [(6, 1)]
    with Checkpoint.open(tmp_path / "run/checkpoints/step-00000012") as checkpoint:
        assert checkpoint.manifest.run.skipped == 1
    pool.run(train, _values(corpus, tmp_path / "plain", layout, train__precision=precision))
    plain = metrics(tmp_path / "plain")
    assert [record["loss"] for record in records[:5]] == [record["loss"] for record in plain[:5]]
    assert records[6]["loss"] != plain[6]["loss"], "what follows has a step less behind it"


def test_a_run_resumed_after_a_skipped_step_is_the_run_that_was_not(
    ranks_1: RankPool, corpus: Path, tmp_path: Path
) -> None:
    """Adam counts the steps that were taken: with the skipped one, its bias correction would differ."""
    ranks_1.run(train_on_bad_samples, _values(corpus, tmp_path / "straight"), [21])
    ranks_1.run(train_on_bad_samples, _values(corpus, tmp_path / "run", train__steps=9), [21])
    ranks_1.run(train, _values(corpus, tmp_path / "run"), True)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 1, 1), (1, 1, 2)], ids=str)
def test_several_in_a_row_lead_back_and_past_their_samples(
    request: pytest.FixtureRequest, corpus: Path, tmp_path: Path, layout: Layout
) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks_{math.prod(layout)}")
    values = _values(corpus, tmp_path / "run", layout, faults={"max_skipped": 2})
    taken = pool.run(train_on_bad_samples, values, [17, 18, 22])
    (event,) = events(tmp_path / "run", "rollback")
    assert (event["step_before"], event["step"], event["samples"]) == (6, 3, [16, 24])
    assert json.loads((tmp_path / "run/passed-over.json").read_text()) == {"samples": [[16, 24]]}
    (tmp_path / "known").mkdir()
    (tmp_path / "known/passed-over.json").write_text('{"samples": [[16, 24]]}')
    known = pool.run(train, _values(corpus, tmp_path / "known", layout))
    assert losses(tmp_path / "run") == losses(tmp_path / "known")
    everything = [*range(16), *range(24, 56)]
    assert sorted({number for numbers in known for number in numbers}) == everything
    assert {number for numbers in taken for number in numbers} == {*everything, *range(16, 24)}


def test_going_back_to_no_checkpoint_is_to_the_beginning(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    values = _values(corpus, tmp_path / "run", faults={"max_skipped": 1}, checkpoint__every=0)
    ranks_1.run(train_on_bad_samples, values, [9])
    (event,) = events(tmp_path / "run", "rollback")
    assert (event["step_before"], event["step"], event["samples"]) == (3, 0, [8, 12])
    assert len(losses(tmp_path / "run")) == 12


def test_going_back_too_often_is_an_error_that_names_the_samples(
    ranks_2: RankPool, corpus: Path, tmp_path: Path
) -> None:
    values = _values(corpus, tmp_path / "run", (1, 1, 2), faults={"max_skipped": 1, "max_rollbacks": 2})
    with pytest.raises(RankError, match=r"step 6: 1 steps in a row .* after 2 rollbacks .*; look at samples 28 to 31"):
        ranks_2.run(train_on_bad_samples, values, list(range(20, 100)))
    assert read_excluded(tmp_path / "run") == [(20, 24), (24, 28)]


@pytest.mark.parametrize("roll_back", [False, True])
def test_a_spike_is_recorded_or_rolled_back(ranks_2: RankPool, corpus: Path, tmp_path: Path, roll_back: bool) -> None:
    faults = {"spike_window": 4, "spike_deviations": 20, "spike_rollback": roll_back}
    values = _values(corpus, tmp_path / "run", (1, 1, 2), faults=faults)
    ranks_2.run(train_on_bad_samples, values, [30], 50.0)
    if roll_back:
        (event,) = events(tmp_path / "run", "rollback")
        assert (event["step_before"], event["step"], event["samples"]) == (8, 6, [28, 32])
        assert max(losses(tmp_path / "run")) < 10
    else:
        (event,) = events(tmp_path / "run", "spike")
        assert event["step"] == 8
        assert event["loss"] == losses(tmp_path / "run")[7] > event["median"] + 10


def _at(step: int) -> RunState:
    return RunState.fresh().model_copy(update={"step": step, "samples": 4 * step})


def _check_step(config: dict[str, Any], series: list[float]) -> list[Spike | RollBack | None]:
    faults = Faults(FaultsConfig.model_validate(config), 4)
    return [
        faults.stepped(_at(step), StepResult(loss, 1.0, math.isfinite(loss))) for step, loss in enumerate(series, 1)
    ]


def test_a_spike_is_measured_by_median_and_deviation() -> None:
    calm = [5.0, 5.1, 4.9, 5.0, 5.2, 4.8] * 5
    verdicts = _check_step({"spike_deviations": 5}, [*calm, 5.6, 6.0, 5.0])
    assert verdicts[:31] == [None] * 31
    spike = verdicts[31]
    assert isinstance(spike, Spike)
    assert (spike.loss, spike.median, round(spike.deviation, 3)) == (6.0, 5.0, 0.148)
    assert verdicts[32] is None
    assert not any(_check_step({"spike_deviations": 0}, [*calm, 600.0])), "0 asks for none"
    assert not any(_check_step({"spike_deviations": 5}, [*calm[:15], 600.0])), "too few to judge by"
    assert not any(_check_step({"spike_deviations": 5}, [*calm, 1.0])), "falling is no fault"


def test_the_margin_reaches_back_before_the_first_bad_step() -> None:
    verdicts = _check_step({"max_skipped": 2, "margin": 3}, [5.0] * 9 + [math.nan] * 2)
    assert verdicts[-1] == RollBack(11, "2 steps in a row without a finite gradient", (24, 44))
    assert _check_step({"max_skipped": 0}, [math.nan] * 50) == [None] * 50
    assert _check_step({"max_skipped": 2}, [math.nan, 5.0] * 20) == [None] * 40, "in a row, they must be"


@pytest.mark.parametrize("text", ["", "[]", '{"samples": [[1]]}', '{"samples": [[1, "2"]]}', '{"samples": [[-1, 2]]}'])
def test_a_damaged_list_of_samples_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "passed-over.json").write_text(text)
    with pytest.raises(MegaloopError, match=r"passed-over\.json is damaged .*; expected"):
        read_excluded(tmp_path)
