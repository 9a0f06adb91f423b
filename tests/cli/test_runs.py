"""``megaloop checkpoints``, through the real command line, on checkpoints that were really saved."""

from __future__ import annotations

import fcntl
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import processes
from tests.checkpoint.states import save


def _megaloop(*arguments: object) -> subprocess.CompletedProcess[str]:
    return processes.run(*arguments)


def _listed(*arguments: object) -> dict[str, Any]:
    result = _megaloop("checkpoints", *arguments, "--json")
    values: dict[str, Any] = json.loads(result.stdout)
    return values


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at 1, 2, 3 and 4."""
    directory = tmp_path / "a run"
    for step in (1, 2, 3, 4):
        save(directory, step)
    config = {"data": {"sources": [{"path": "x"}]}, "checkpoint": {"keep": 2, "keep_every": 3}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def test_they_are_listed(run: Path) -> None:
    result = _megaloop("checkpoints", run)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == [
        "step",
        "state",
        "size",
        "depth",
        "pp",
        "x",
        "tp",
        "x",
        "dp",
        "precision",
        "saved",
        "(UTC)",
    ]
    assert [line.split()[:2] for line in lines[1:]] == [[str(step), "complete"] for step in (1, 2, 3, 4)]


def test_a_damaged_one_is_named_and_the_exit_code_says_so(run: Path) -> None:
    victim = run / "checkpoints/step-00000002/model/rank-00000.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    assert _megaloop("checkpoints", run).returncode == 0, "sizes and manifests are whole"
    result = _megaloop("checkpoints", run, "--verify")
    assert result.returncode == 2
    assert "step-00000002: model/rank-00000.safetensors is altered: its checksum is" in result.stdout
    states = {row["step"]: row["state"] for row in _listed(run, "--verify")["checkpoints"]}
    assert states == {1: "whole", 2: "damaged", 3: "whole", 4: "whole"}


def test_pruning_follows_the_runs_configuration(run: Path) -> None:
    (run / "checkpoints/step-00000002").rename(run / "checkpoints/step-00000002.damaged")
    values = _listed(run, "--prune", "--keep", "1")
    assert [row["step"] for row in values["checkpoints"]] == [3, 4]
    assert values["deleted"] == ["step-00000001", "step-00000002.damaged"]


def test_nothing_is_deleted_where_the_newest_is_damaged(run: Path) -> None:
    damaged = run / "checkpoints/step-00000004/model/rank-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    result = _megaloop("checkpoints", run, "--prune", "--keep", "1")
    assert result.returncode == 2
    assert "the newest checkpoint, step-00000004, is damaged" in result.stderr
    assert len(list((run / "checkpoints").iterdir())) == 4


def test_those_without_a_manifest_and_those_set_aside_are_shown(run: Path) -> None:
    (run / "checkpoints/step-00000001/manifest.json").unlink()
    (run / "checkpoints/step-00000002").rename(run / "checkpoints/step-00000002.damaged")
    states = [row["state"] for row in _listed(run)["checkpoints"]]
    assert states == ["no manifest", "quarantined", "complete", "complete"]


def test_a_live_run_is_left_alone(run: Path) -> None:
    with (run / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = _megaloop("checkpoints", run, "--prune")
    assert result.returncode == 2
    assert "is in use by a live run" in result.stderr
    assert len(list((run / "checkpoints").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere: no run with checkpoints"), ([".", "--keep", "2"], "--keep says how many --prune leaves")],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    result = _megaloop("checkpoints", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
