"""``megaloop bench schedule``: real ranks, both schedules, the same bits, and what it refuses. Its seconds are no business of tests."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests import processes


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.run("bench", "schedule", "--sequence-length", "16", *arguments, timeout=400)


@pytest.mark.slow
def test_the_schedules_train_the_same_bits() -> None:
    done = _bench("--pp", "1", "--pp", "2", "--recompute", "none", "--repeats", "1", "--steps", "2", "--depth", "4",
                  "--micro-batches", "3", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [(item["pp"], item["precision"]) for item in result["comparisons"]] == [
        (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"),
    ]  # fmt: skip
    for item in result["comparisons"]:
        assert item["identical"]
        assert item["steps"] == 4
        assert item["spread"] == [item["ratio"]] * 2
    assert "pp 2, bf16, recompute none, repetition 1: tokens/s: ours" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "bench schedule: unknown shape 'huge'; choose one of"),
        (
            ["--depth", "1-2x3-1", "--pp", "2"],
            "bench schedule: depth 1-2x3-1 loops over 2 pipeline ranks in several rounds",
        ),
        (["--depth", "2", "--pp", "4"], "parallel.pp 4 is more pipeline ranks than the 2 layers of depth 2"),
    ],
    ids=["shape", "loop", "layers"],
)
def test_what_cannot_be_compared_is_refused(arguments: list[str], message: str) -> None:
    done = _bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
