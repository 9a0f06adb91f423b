from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megaloop.runs.metrics import METRICS, StepRecord
from megaloop.runs.records import JsonLines
from megaloop.runs.sinks import TENSORBOARD, RunFiles, TensorBoard

RECORD = StepRecord(
    step=1, tokens=4096, loss=3.5, lr=1e-3, grad_norm=0.5, layers=6, depth=6, flops=10**18, tokens_per_second=1e4,
    tflops=0.1, mfu=None, pp=2, tp=1, dp=1, seconds=0.4, memory_bytes=1 << 30,
)  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scalars(run: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(run / TENSORBOARD))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_every_step_is_a_line_with_the_documented_keys(tmp_path: Path) -> None:
    with closing(RunFiles(tmp_path)) as writer:
        writer.step(RECORD)
        writer.step(replace(RECORD, step=2))
    first, second = lines(tmp_path / METRICS)
    assert list(first) == [
        "step", "tokens", "loss", "lr", "grad_norm", "layers", "depth", "flops", "tokens_per_second", "tflops", "mfu",
        "pp", "tp", "dp", "seconds", "memory_bytes", "val_loss", "val_bits_per_byte",
    ]  # fmt: skip
    assert first["flops"] == 10**18
    assert first["mfu"] is None
    assert second["step"] == 2


def test_a_line_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with closing(RunFiles(tmp_path)) as writer:
        writer.step(RECORD)
        assert len(lines(tmp_path / METRICS)) == 1


def test_numbers_that_are_not_finite_become_null_and_are_named(tmp_path: Path) -> None:
    with closing(RunFiles(tmp_path)) as writer:
        writer.step(replace(RECORD, loss=float("nan"), grad_norm=float("inf")))
        writer.step(replace(RECORD, step=2))
    broken, fine = lines(tmp_path / METRICS)
    assert (broken["loss"], broken["grad_norm"]) == (None, None)
    assert broken["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}
    assert "nonfinite" not in fine


def test_validation_is_part_of_the_record_of_its_step(tmp_path: Path) -> None:
    with closing(RunFiles(tmp_path)) as writer:
        writer.step(RECORD)
        writer.step(replace(RECORD, step=2, val_loss=3.25, val_bits_per_byte=1.5))
    assert [record["val_loss"] for record in lines(tmp_path / METRICS)] == [None, 3.25]
    assert [record["val_bits_per_byte"] for record in lines(tmp_path / METRICS)] == [None, 1.5]


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    with closing(TensorBoard(tmp_path / TENSORBOARD)) as writer:
        writer.step(RECORD)
        writer.step(replace(RECORD, step=2, loss=3.0, val_loss=3.25, val_bits_per_byte=1.5))
    assert scalars(tmp_path, "train/loss") == {1: 3.5, 2: 3.0}
    assert scalars(tmp_path, "validation/loss") == {2: 3.25}


@pytest.mark.parametrize("checkpoint", [0, 1])
def test_tensorboard_forgets_what_a_killed_run_did_after_its_checkpoint(tmp_path: Path, checkpoint: int) -> None:
    with closing(TensorBoard(tmp_path / TENSORBOARD)) as writer:
        for step in (1, 2, 3):
            writer.step(replace(RECORD, step=step, loss=float(step)))
    with closing(TensorBoard(tmp_path / TENSORBOARD, start_step=checkpoint)) as writer:
        for step in range(checkpoint + 1, 3):
            writer.step(replace(RECORD, step=step, loss=20.0))
    assert scalars(tmp_path, "train/loss") == {1: 1.0 if checkpoint else 20.0, 2: 20.0}


@pytest.mark.parametrize("size", [0, 10, 200_000])
def test_a_line_torn_by_a_kill_does_not_spoil_the_next(tmp_path: Path, size: int) -> None:
    path = tmp_path / METRICS
    whole = json.dumps({"text": "x" * size}) + "\n"
    path.write_text(whole + '{"torn": "' + "y" * size)
    file = JsonLines(path)
    file.append({"next": 1})
    file.close()
    assert path.read_text() == whole + '{"next": 1}\n'


FILL = """
import resource, signal, sys
from pathlib import Path
from megaloop.errors import MegaloopError
from megaloop.runs.records import JsonLines
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a file that cannot grow any more, as on a full disk
file = JsonLines(Path(sys.argv[1]))
try:
    while True:
        file.append({"text": "x" * 60})
except MegaloopError as error:
    print(error)
"""


def test_a_full_disk_is_reported_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    run = subprocess.run([sys.executable, "-c", FILL, str(path)], capture_output=True, text=True, check=True)
    assert str(path) in run.stdout
    assert "--resume" in run.stdout
    assert path.read_bytes().endswith(b"}\n")
    assert len(lines(path)) == 1000 // 73
