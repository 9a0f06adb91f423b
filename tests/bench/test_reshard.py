"""``megaloop bench reshard``: real ranks, both ways, and what it refuses. Its seconds are no business of tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests import processes

CONFIG = {
    "depth": 6,
    "model": {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64, "vocab_size": 128},
    "data": {"sources": [{"path": "none"}], "sequence_length": 16},
    "parallel": {"pp": 2, "dp": 1},
    "train": {"steps": 12, "global_batch": 2, "precision": "fp32"},
    "growth": {"block": 2, "start": 2},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.run("bench", "reshard", *arguments)


@pytest.mark.slow
def test_a_growth_is_measured_both_ways(config: Path) -> None:
    done = _bench(str(config), "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["layers"] == [4, 6]
    assert result["topology"] == ["pp 2 x tp 1 x dp 1"] * 2
    assert result["pause"] >= result["build"] + result["exchange"] > 0
    assert 0 < result["received_bytes"] <= result["moved_bytes"]
    assert result["bound"] == pytest.approx(result["received_bytes"] / result["bandwidth"] + result["build"])
    assert result["restart"] > result["pause"], "starting Python again takes seconds"
    assert result["ratio"] == pytest.approx(result["restart"] / result["pause"])
    assert "round 1: in flight" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["growth="], "no growth into stage 0; the run does not grow: set growth"),
        (["--stage", "3"], "no growth into stage 3; it has stages 1 to 2 to grow into"),
        (["model.vocab_size="], "model.vocab_size is empty; set it"),
    ],
    ids=["no growth", "no stage", "no vocabulary"],
)
def test_what_cannot_be_measured_is_refused(config: Path, arguments: list[str], message: str) -> None:
    done = _bench(str(config), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
