"""The doctor says what happened: to runs that it really happened to, and to records made up for what takes a cluster."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from megaloop.runs.directory import RunDirectory
from megaloop.runs.doctor import Diagnosis, examine
from megaloop.runs.status import local_status
from tests import processes
from tests.distributed import RankPool
from tests.train.runs import configuration, start, steps_done, train, train_on_bad_samples, wait_for


def _texts(diagnosis: Diagnosis, topic: str) -> list[str]:
    return [finding.text for finding in diagnosis.findings if finding.topic == topic]


def _levels(diagnosis: Diagnosis) -> set[str]:
    return {finding.level for finding in diagnosis.findings}


def test_a_run_in_which_nothing_happened(ranks_2: RankPool, corpus: Path, tmp_path: Path) -> None:
    values = configuration(corpus, tmp_path / "run", (2, 1, 1))
    values["logging"]["ranks_every"] = 5
    ranks_2.run(train, values)
    found = examine(tmp_path / "run")
    assert (found.state, found.steps, found.starts, found.killed) == ("finished", 20, 1, 0)
    assert (found.lost_steps, found.skipped_steps, found.rollbacks) == (0, 0, 0)
    assert found.stage_imbalance is not None
    assert 1 <= found.stage_imbalance < 2
    assert "checkpoints" in {finding.topic for finding in found.findings if finding.level == "good"}
    records = [json.loads(line) for line in (tmp_path / "run/ranks.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for record in records:
        assert all(0 < busy <= steps[record["step"] - 1]["seconds"] for busy in record["busy_seconds"])


@pytest.mark.slow
def test_a_run_that_was_killed_signalled_and_finished(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    values = configuration(corpus, run, train__global_batch=32, checkpoint__every=3)
    process = start(values, tmp_path)
    wait_for(lambda: steps_done(run) >= 5, process)
    assert examine(run).state == "running"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = steps_done(run)
    killed = examine(run)
    assert (killed.state, killed.killed) == ("killed", 1)
    assert "ended without a word" in _texts(killed, "restarts")[0]
    process = start(values, tmp_path, "--resume")
    wait_for(lambda: steps_done(run) >= max(done, 8), process)
    process.send_signal(signal.SIGUSR1)
    process.wait()
    assert examine(run).state == "stopped"
    assert start(values, tmp_path, "--resume").wait() == 0
    found = examine(run)
    assert (found.state, found.starts, found.killed) == ("finished", 3, 1)
    assert found.lost_steps == len((run / "metrics.discarded.jsonl").read_text().splitlines()) > 0
    assert any("as SIGUSR1 asked" in text for text in _texts(found, "restarts"))
    assert found.down_seconds > 0


def test_skipped_steps_and_going_back(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    faults = {"max_skipped": 2}
    values = configuration(corpus, tmp_path / "run", checkpoint__every=3, faults=faults, train__steps=12)
    ranks_1.run(train_on_bad_samples, values, [17, 21])
    found = examine(tmp_path / "run")
    assert (found.state, found.starts, found.skipped_steps, found.rollbacks) == ("finished", 1, 2, 1)
    assert any("went back from step 6 to 3: 2 steps in a row" in text for text in _texts(found, "numbers"))
    assert any("samples 16 to 23 are excluded" in text for text in _texts(found, "numbers"))


def _write(run: Path, name: str, records: list[dict[str, Any]]) -> None:
    run.mkdir(exist_ok=True)
    (run / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def _ranks(**changes: Any) -> dict[str, Any]:
    record = {"step": 50, "pp": 2, "tp": 1, "dp": 2, "memory_bytes": [1] * 4, "hosts": ["a", "a", "b", "b"]}
    return record | {"busy_seconds": [1.0, 1.0, 1.05, 1.0], "clock_seconds": [0.0] * 4} | changes


def test_slow_ranks_uneven_stages_and_clocks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _write(run, "metrics.jsonl", [])
    _write(run, "ranks.jsonl", [_ranks()] * 3)
    assert _levels(examine(run)) == {"good"}
    _write(run, "ranks.jsonl", [_ranks(busy_seconds=[1.0, 1.5, 1.0, 1.0], clock_seconds=[0, 0, 3.5, 3.5])] * 3)
    found = examine(run)
    assert found.slowest_ranks == [1]
    assert _texts(found, "ranks") == ["rank 1 (a) computes 20% longer than the others of its stage"]
    assert _texts(found, "clocks")[0].startswith("differ from rank 0's: b by +3.5 s")
    _write(run, "ranks.jsonl", [_ranks(busy_seconds=[1.0, 1.0, 2.0, 2.0])] * 3)
    found = examine(run)
    assert found.stage_imbalance == pytest.approx(2 / 1.5)
    assert "set parallel.layer_costs" in _texts(found, "stages")[0]


def _steps(seconds: list[float], memory: list[int] | None = None) -> list[dict[str, Any]]:
    sizes = memory or [1] * len(seconds)
    return [
        {"step": step, "seconds": item, "layers": 4, "depth": 4, "dp": 1, "memory_bytes": size}
        for step, (item, size) in enumerate(zip(seconds, sizes, strict=True), 1)
    ]


def test_gaps_and_growing_memory(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _write(run, "metrics.jsonl", _steps([60.0] + [1.0] * 100 + [30.0] + [1.0] * 100))
    found = examine(run)
    assert _texts(found, "speed") == ["1 steps took far longer than the median of 1.00 s: 102 (30.0 s)"], (
        "not the first"
    )
    assert _texts(found, "memory") == []
    _write(run, "metrics.jsonl", _steps([1.0] * 400, [1000 + step for step in range(400)]))
    assert len(_texts(examine(run), "memory")) == 1


def test_half_a_line_does_not_stop_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _write(run, "metrics.jsonl", _steps([1.0] * 3))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "sec')
    assert examine(run).steps == 3


_VALUES = (
    "null", "true", "-1", "0", "3", "2.5", "1" + "0" * 40, "1" * 5000, "1e308", "-1e308", "1e999", "NaN", '""', '"word"',
    f'"{"x" * 3000}"', '"[/red]\\u001b[2J"', '"rollback"', '"error: [/b] \\u001b]0;x"', '"0001-01-01T00:00:00+23:59"',
    '"2026-01-01T00:00:00Z"', "[]", "[1, 2]", '["a", "b"]', '[[], {}]', "[NaN, 1e308]", "{}", '{"pp": [1]}', "[" * 5000,
)  # fmt: skip
_FIELDS: dict[str, tuple[str, ...]] = {
    "metrics.jsonl": ("step", "loss", "seconds", "layers", "depth", "dp", "memory_bytes"),
    "metrics.discarded.jsonl": ("step", "seconds"),
    "ranks.jsonl": ("pp", "tp", "dp", "busy_seconds", "clock_seconds", "hosts"),
    "events.jsonl": (
        "step", "time", "seconds", "bytes", "reason", "loss", "step_before", "samples", "stall_seconds", "plan",
        "plan_before", "ranks", "restarts",
    ),
}  # fmt: skip
_KINDS = ("start", "resume", "stop", "skip", "spike", "rollback", "save", "save_failed", "grow", "signal")


def _tampered(chance: random.Random, run: Path) -> None:
    """Write records of which some values are what nobody expects there."""
    for name, fields in _FIELDS.items():
        lines = []
        for _ in range(chance.randrange(12)):
            values = dict.fromkeys(fields, "1") | {
                "time": '"2026-01-01T00:00:00Z"',
                "event": f'"{chance.choice(_KINDS)}"',
            }
            if name == "ranks.jsonl":
                values |= {"busy_seconds": "[1.0]", "clock_seconds": "[0.0]", "hosts": '["a"]'}
            for key in chance.sample(fields, min(chance.randrange(4), len(fields))):
                values[key] = chance.choice(_VALUES)
            if chance.random() < 0.1:
                values["event"] = chance.choice(_VALUES)
            lines.append("{" + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "}")
            if chance.random() < 0.1:
                lines.append(chance.choice([*_VALUES, "\x00", "{", '{"step": 1']))
        (run / name).write_text("\n".join(lines) + chance.choice(["", "\n"]), encoding="utf-8")


def test_whatever_stands_in_its_files_the_doctor_has_an_answer(tmp_path: Path) -> None:
    """So have status, and whoever resumes: tampered values are skipped, never a traceback or a flood."""
    chance = random.Random(14)
    (tmp_path / "config.yaml").write_text('{"data": {"sources": [{"path": "x"}]}, "train": {"steps": 1000000}}')
    for _ in range(120):
        _tampered(chance, tmp_path)
        found = examine(tmp_path)
        json.dumps(asdict(found), allow_nan=False)
        assert all(len(finding.text) < 2000 and finding.text.isprintable() for finding in found.findings)
        json.dumps(asdict(local_status(tmp_path)), allow_nan=False)
        directory = RunDirectory.create_or_open(tmp_path, resume=True)
        directory.last_step()
        directory.resume_at(1)
        assert directory.last_step() in (None, 0, 1)
        directory.release()


def test_what_is_left_of_tampered_records_still_counts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _write(run, "metrics.jsonl", [*_steps([1.0] * 3), {"step": "4", "seconds": [1]}, {"step": 10**40, "seconds": 1.0}])
    _write(
        run, "ranks.jsonl", [_ranks(busy_seconds=[1.0, 1.5, 1.0, 1.0]), _ranks(busy_seconds=[1.0]), _ranks(pp=10**9)]
    )
    _write(
        run,
        "events.jsonl",
        [
            {"event": "start", "step": 0},
            {"event": "rollback", "step": 2, "step_before": 3, "reason": "x\x1b[2J" + "y" * 5000, "samples": [1, "a"]},
            {"event": "spike", "step": 3, "loss": "[/red]"},
        ],
    )
    found = examine(run)
    assert (found.steps, found.state, found.slowest_ranks) == (3, "killed", [1])
    assert _texts(found, "numbers") == ["1 spikes of the loss: step 3 (?)"]
    (text,) = (item for item in _texts(found, "checkpoints") if "went back" in item)
    assert text.startswith("went back from step 3 to 2: x\\x1b[2Jyyy")
    assert len(text) < 600


def _megaloop(*arguments: object) -> subprocess.CompletedProcess[str]:
    return processes.run(*arguments)


def test_the_command(ranks_1: RankPool, corpus: Path, tmp_path: Path) -> None:
    ranks_1.run(train, configuration(corpus, tmp_path / "run", train__steps=4))
    result = _megaloop("doctor", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"{tmp_path / 'run'}: finished, 4 steps"
    assert result.stdout.splitlines()[-1] == "  nothing to worry about"
    values = json.loads(_megaloop("doctor", tmp_path / "run", "--json").stdout)
    assert (values["state"], values["steps"]) == ("finished", 4)


def test_no_run_is_an_error(tmp_path: Path) -> None:
    result = _megaloop("doctor", tmp_path)
    assert result.returncode == 2
    assert "no run; expected a directory with events.jsonl" in result.stderr
