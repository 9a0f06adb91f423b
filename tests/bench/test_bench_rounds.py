"""``megaloop bench rounds``: real ranks, both ways, and what it refuses. Its seconds are no business of tests."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests import processes


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return processes.run("bench", "rounds", "--shape", "tiny", "--sequence-length", "16", *arguments, timeout=300)


@pytest.mark.slow
def test_rounds_are_measured_against_stock_deepspeed() -> None:
    done = _bench("--rounds", "2", "--steps", "1", "--unlooped", "8", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ways = {item["name"]: item for item in result["contenders"]}
    ours, stock = ways["rounds"], ways["tied"]
    assert (ours["passes"], stock["passes"]) == (4, 1)
    assert ours["loss"] == pytest.approx(stock["loss"], rel=2e-5), "both train the same model"
    assert result["loop_bytes_ratio"] == pytest.approx(0.5)
    layers = 4 * 20 * (4 * 256**2 + 3 * 256 * 688 + 2 * 256)
    assert (stock["loop_bytes"], ours["loop_bytes"]) == (layers, layers // 2)
    # on two ranks: a copy of each layer's gradient on each, and the embedding's at both ends
    assert stock["tied_layer_bytes"] == 2 * layers // 5
    assert ours["tied_layer_bytes"] == 0
    assert ours["tied_bytes"] == stock["tied_bytes"] - stock["tied_layer_bytes"] == 2 * 4 * 4096 * 256
    state = 4 * 16 * 256 * 4  # activations of four micro-batches
    assert stock["sent_bytes"] == 2 * state
    assert ours["sent_bytes"] == 2 * 7 * state
    for rounds in ("1 round", "2 rounds", "4 rounds"):
        assert ways[f"unlooped, {rounds}"]["tied_bytes"] == ours["tied_bytes"], "both ends have the embedding"
    losses = [ways[name]["loss"] for name in ("unlooped, 1 round", "unlooped, 2 rounds", "unlooped, 4 rounds")]
    assert losses == pytest.approx([losses[0]] * 3, rel=2e-5)
    assert ways["unlooped, 2 rounds"]["ideal"] == pytest.approx((8 / 9) / (4 / 5))
    assert all(way["spread"][0] <= way["ratio"] <= way["spread"][1] for way in ways.values())
    assert "round 2: tokens/s: tied" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pp", "1"], "one rank has no pipeline; choose --pp 2 or more"),
        (["--depth", "12"], "depth 12 has no loop; choose one such as 0-4x4-0"),
        (
            ["--micro-batches", "1"],
            "makes 1 micro-batches of 1 per step and replica; rounds over 2 pipeline ranks need 2",
        ),
        (["--unlooped", "6"], "parallel.rounds 4 x parallel.pp 2 makes 8 slices, more than the 6 layers"),
        (["--shape", "huge"], "unknown shape 'huge'; choose one of"),
    ],
    ids=["one rank", "no loop", "micro-batches", "layers", "shape"],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], message: str) -> None:
    done = _bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
