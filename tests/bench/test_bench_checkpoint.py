"""``megaloop bench checkpoint``: real ranks, real files, and nothing left. Its seconds are no business of tests."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests import processes

CONFIG = {
    "depth": 3,
    "model": {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64, "vocab_size": 128},
    "data": {"sources": [{"path": "none"}], "sequence_length": 16},
    "parallel": {"pp": 1, "dp": 2},
    "train": {"steps": 12, "global_batch": 2, "precision": "bf16"},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def _bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    return processes.run("bench", "checkpoint", *arguments)


@pytest.mark.slow
def test_everything_is_measured_and_nothing_is_left(config: Path, tmp_path: Path) -> None:
    done = _bench(config, "--rounds", "2", "--directory", tmp_path / "here", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["bytes"] > 14 * result["parameters"], "bf16 weights, fp32 masters and moments"
    assert result["written"] >= result["blocked"] > 0
    assert result["stall_spread"][0] <= result["stall"] <= result["stall_spread"][1]
    for key in ("step", "waited", "save_bytes_per_second", "load_bytes_per_second", "copy_bytes_per_second"):
        assert result[key] > 0, key
    assert "round 2: waited for" in done.stderr
    assert list((tmp_path / "here").iterdir()) == []


def test_what_cannot_be_measured_is_refused(config: Path, disk: Callable[[str], Path]) -> None:
    done = _bench(config, "model.vocab_size=")
    assert done.returncode == 2
    assert "model.vocab_size is empty; set it" in done.stderr
    done = _bench(config, "--directory", disk("64k"))
    assert done.returncode == 2
    assert "choose another --directory" in done.stderr
