"""A run that was stopped and resumed is the run that was not, on the same topology and on others."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoint.states import reseal
from tests.distributed import RankError, RankPool
from tests.train.runs import (
    configuration,
    events,
    losses,
    metrics,
    release,
    start,
    start_held,
    steps_done,
    train,
    train_with_a_drifting_replica,
)

Layout = tuple[int, int, int]


def _pool(request: pytest.FixtureRequest, layout: Layout) -> RankPool:
    pool: RankPool = request.getfixturevalue(f"ranks_{layout[0] * layout[1] * layout[2]}")
    return pool


def _validation(directory: Path) -> list[float]:
    return [record["val_loss"] for record in metrics(directory) if record["val_loss"] is not None]


def _stop_at_10(directory: Path, copy: Path) -> None:
    """What a run leaves that was killed after its checkpoint of step 10, while it went on."""
    shutil.copytree(directory, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000020")


@pytest.fixture(scope="module")
def straight(request: pytest.FixtureRequest, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """20 steps in one go, made once per layout."""
    made: dict[tuple[Layout, str], Path] = {}

    def make(layout: Layout, precision: str = "fp32") -> Path:
        if (layout, precision) not in made:
            directory = tmp_path_factory.mktemp("straight") / "run"
            _pool(request, layout).run(train, configuration(corpus, directory, layout, train__precision=precision))
            made[layout, precision] = directory
        return made[layout, precision]

    return make


@pytest.mark.parametrize(
    ("layout", "precision"),
    [((1, 1, 1), "fp32"), ((2, 1, 1), "fp32"), ((1, 2, 1), "fp32"), ((1, 1, 2), "fp32"), ((2, 1, 1), "bf16"), ((1, 1, 2), "bf16")],
    ids=str,
)  # fmt: skip
def test_resuming_on_the_same_topology_is_bit_identical(
    request: pytest.FixtureRequest, corpus: Path, tmp_path: Path, straight: Any, layout: Layout, precision: str
) -> None:
    _stop_at_10(straight(layout, precision), tmp_path / "run")
    _pool(request, layout).run(train, configuration(corpus, tmp_path / "run", layout, train__precision=precision), True)
    assert losses(tmp_path / "run") == losses(straight(layout, precision))
    assert _validation(tmp_path / "run") == _validation(straight(layout, precision))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "sequence_parallel"),
    [
        ((2, 1, 1), (1, 2, 1), False),
        ((1, 2, 2), (1, 1, 1), False),
        ((1, 1, 2), (2, 1, 1), False),
        ((2, 1, 2), (1, 2, 2), True),
        ((1, 1, 1), (2, 2, 1), False),
    ],
    ids=str,
)
def test_resuming_on_another_topology_follows_the_same_curve(
    request: pytest.FixtureRequest,
    corpus: Path,
    tmp_path: Path,
    straight: Any,
    first: Layout,
    second: Layout,
    sequence_parallel: bool,
) -> None:
    _stop_at_10(straight(first), tmp_path / "run")
    values = configuration(corpus, tmp_path / "run", second)
    values["parallel"]["sequence_parallel"] = sequence_parallel
    _pool(request, second).run(train, values, True)
    limit = 2e-5 if first[1] == second[1] else 1e-4
    assert losses(tmp_path / "run") == pytest.approx(losses(straight(first)), rel=limit)


def test_no_sample_is_repeated_or_skipped(ranks_1: RankPool, ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    alone = configuration(corpus, tmp_path / "run", (1, 1, 1), train__steps=10)
    replicas = configuration(corpus, tmp_path / "run", (1, 1, 2), train__steps=20)
    first = ranks_1.run(train, alone)
    second = ranks_2.run(train, replicas, True)
    assert first[0] == list(range(40))
    assert sorted(second[0] + second[1]) == list(range(40, 80))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(corpus: Path, tmp_path: Path, straight: Any) -> None:
    """Real processes, SIGKILL beyond the checkpoint, --resume: the same bits, each step once."""
    values = configuration(corpus, tmp_path / "killed", (2, 1, 1))
    process = start_held(values, tmp_path, 12)
    process.send_signal(signal.SIGKILL)  # its ranks die with it
    process.wait()
    assert steps_done(tmp_path / "killed") == 12
    release(tmp_path)
    resumed = start(values, tmp_path, "--resume")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output.decode()
    assert losses(tmp_path / "killed") == losses(straight((2, 1, 1)))
    state_names = [
        json.loads(line)["event"] for line in (tmp_path / "killed" / "events.jsonl").read_text().splitlines()
    ]
    # whether the save of step 10 had been collected by then is up to the machine
    assert [state_name for state_name in state_names if state_name != "save"] == ["start", "resume", "start", "stop"]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", train__steps=6, checkpoint__every=0)
    ranks_1.run(train, values)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    before = losses(tmp_path / "run")
    ranks_1.run(train, values, True)
    assert losses(tmp_path / "run") == before


def test_old_checkpoints_make_room_for_new_ones(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", train__steps=6, checkpoint__every=2, checkpoint__keep=2)
    ranks_1.run(train, values)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step-00000004", "step-00000006"]


def test_other_settings_of_a_resume_are_said(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", train__steps=4, checkpoint__every=2)
    ranks_1.run(train, values)
    longer = configuration(corpus, tmp_path / "run", train__steps=6, optimizer__beta2=0.9, model__document_masking=True)
    ranks_1.run(train, longer, True)
    said = events(tmp_path / "run", "settings")
    assert [(event["step"], event["changes"]) for event in said] == [
        (4, {"model.document_masking": [False, True], "optimizer.beta2": [0.95, 0.9]})
    ]
    ranks_1.run(train, longer | {"train": longer["train"] | {"steps": 8}}, True)
    assert events(tmp_path / "run", "settings") == said, "nothing is other now"


def test_a_new_run_starts_from_anothers_weights(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    ranks_1.run(train, configuration(corpus, tmp_path / "first", train__steps=10))
    ranks_1.run(train, configuration(corpus, tmp_path / "second", train__steps=2, init=str(tmp_path / "first")))
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "first")[0] - 0.1


def test_a_new_run_does_not_start_from_altered_bytes(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    """Whichever file it is, and so whichever rank reads it."""
    first = configuration(corpus, tmp_path / "first", (1, 1, 2), train__steps=2, checkpoint__every=0)
    ranks_2.run(train, first)
    (path,) = (tmp_path / "first/checkpoints").iterdir()
    second = configuration(corpus, tmp_path / "second", (1, 1, 2), train__steps=2, init=str(tmp_path / "first"))
    for file in sorted(path.rglob("*-*.safetensors")):
        whole = file.read_bytes()
        file.write_bytes(whole[:-40] + bytes([whole[-40] ^ 64]) + whole[-39:])
        with pytest.raises(
            RankError, match=rf"{file.name} is altered: its checksum is .*; begin with another checkpoint"
        ):
            ranks_2.run(train, second)
        file.write_bytes(whole)
    assert not (tmp_path / "second" / "metrics.jsonl").exists()
    ranks_2.run(train, second)


def test_numbers_that_are_not_finite_end_the_start_on_all_ranks(
    ranks_2: RankPool, corpus: Path, tmp_path: Path
) -> None:
    values = configuration(corpus, tmp_path / "run", (1, 1, 2), train__steps=2, checkpoint__every=0)
    ranks_2.run(train, values)
    (path,) = (tmp_path / "run/checkpoints").iterdir()
    file = path / "optim/rank-00001.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.startswith("exp_avg/"))
    tensors[key][0] = math.nan
    save_file(tensors, file, metadata={"format": "pt", "megaloop": "optim state of rank 1"})
    reseal(path)
    name = key.removeprefix("exp_avg/")
    longer = {**values, "train": {**values["train"], "steps": 4}}
    new = {**values, "run_dir": str(tmp_path / "new"), "init": str(path)}
    for refused in (longer, new):
        with pytest.raises(RankError, match=f"exp_avg of {name} holds numbers that are not finite"):
            ranks_2.run(train, refused, refused is longer)


def test_the_replica_check_passes_while_it_trains(ranks_4: RankPool, corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", (2, 2, 1), train__steps=4, train__check_replicas=2)
    ranks_4.run(train, values)
    assert len(losses(tmp_path / "run")) == 4


def test_a_drifting_replica_stops_the_run_with_its_name(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", (1, 1, 2), train__steps=8, train__check_replicas=2)
    name = "layers.1.mlp.w_up.weight"
    with pytest.raises(RankError, match=rf"step 4: ranks that should hold the same bits differ in model {name}"):
        ranks_2.run(train_with_a_drifting_replica, values, name, 4)
    assert len(losses(tmp_path / "run")) == 4
