"""Run directories with curves of one's choice, in the format of real runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml

from megaloop.config import Config, ModelConfig
from megaloop.depth import DepthSpec
from megaloop.depth.flops import parameters
from megaloop.evaluation.records import DIFFICULTY, Record, Subject, append_record
from megaloop.evaluation.tasks import TASKS, TASKS_VERSION
from megaloop.runs.metrics import StepRecord

__all__ = ["CONTENDERS", "evaluated", "graded", "write_contender", "write_run", "written_by_tokenizer"]


def write_run(
    path: Path,
    name: str,
    *,
    seed: int = 0,
    steps: int = 100,
    done: int | None = None,
    loss: Callable[[int], float] = lambda step: 2 + 3 * math.exp(-step / 20),
    flops: int = 10**12,
    validate: int = 10,
    grown_at: int | None = None,
    bits: float = 0.5,
    layers: int = 8,
    executed: int = 8,
    start_parameters: int = 10_000,
    **changes: Any,
) -> Path:
    """A run whose every step costs ``flops`` (half of it before ``grown_at``) and takes half a second; ``bits`` per byte for a nat per token.

    It ends with ``layers``, of which ``executed`` run; ``start_parameters`` are those of the depth that it begins with.
    """
    values = {
        "name": name,
        "run_dir": str(path),
        "seed": seed,
        "depth": "8",
        "model": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "ffn_size": 128},
        "data": {"sources": [{"path": "data/text"}], "sequence_length": 128},
        "train": {"steps": steps},
        **changes,
    }
    path.mkdir(parents=True)
    config = Config.model_validate(values)
    (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    total, lines = 0, []
    for step in range(1, (done or steps) + 1):
        shallow = grown_at is not None and step <= grown_at
        total += flops // 2 if shallow else flops
        record = StepRecord(
            step=step,
            tokens=step * 1024,
            loss=loss(step),
            lr=1e-3,
            grad_norm=1.0,
            layers=4 if shallow else layers,
            depth=4 if shallow else executed,
            flops=total,
            tokens_per_second=2048.0,
            tflops=0.1,
            mfu=None,
            pp=1,
            tp=1,
            dp=2,
            seconds=0.5,
            memory_bytes=1 << 30,
            val_loss=loss(step) if step % validate == 0 else None,
            val_bits_per_byte=loss(step) * bits if step % validate == 0 else None,
        )
        lines.append(json.dumps(record.to_json()))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    events = _events(4 if grown_at is not None else layers, start_parameters, grown_at)
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return path


def _events(began: int, parameters: int, grown_at: int | None) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [
        {
            "event": "start",
            "step": 0,
            "plan": str(began),
            "parameters": parameters,
            "torch": "2.13",
            "attention": "torch SDPA",
        }
    ]
    if grown_at is not None:
        plan = {"order": list(range(8)), "lineage": {}}
        events.append({"event": "grow", "step": grown_at, "plan": plan, "loss_before": 3.5, "loss_after": 3.75})
    return events


def evaluated(
    run: Path,
    task: str,
    accuracy: float,
    *,
    shots: int = 5,
    loops: int = 1,
    error: float = 0.01,
    version: int = TASKS_VERSION,
) -> None:
    """Add a result to a run's evaluations."""
    validation = task == "validation"
    depth = "8" if loops == 1 else f"2-4x{loops}-2"
    subject = Subject(
        task=task, data="data/text" if validation else None, shots=shots, loops=loops, depth=depth,
        block=None if loops == 1 else "2:6", examples=1000, seed=0, precision="fp32", version=version, step=100, checkpoint="c",
    )  # fmt: skip
    if validation:
        values = {"loss": accuracy, "loss_stderr": error, "bits_per_byte": accuracy / 2, "tokens": 1000}
    else:
        values = {
            "accuracy": accuracy,
            "accuracy_stderr": error,
            "exact_match": accuracy / 2,
            "exact_match_stderr": error,
            "chance": TASKS[task].chance if version == TASKS_VERSION else 0.2,
        }
    append_record(run / "evaluation.jsonl", Record(subject, values, "2026-01-01T00:00:00+00:00"))


def written_by_tokenizer(run: Path, sha256: str, validation: str | None = None) -> Path:
    """Give a run a checkpoint that names this tokenizer, and the validation samples; nothing else of it is there."""
    folder = run / "checkpoints" / "step-00000100"
    folder.mkdir(parents=True)
    manifest: dict[str, Any] = {"tokenizer": {"file": "tokenizer.model", "sha256": sha256}}
    if validation is not None:
        manifest["run"] = {"data": {"sources": [{"validation": validation}]}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return run


# --- reasoning by difficulty

HOPS, BEYOND = "data/hops", "data/hops-beyond"
TRAINED, FURTHER = (1, 2, 4, 6, 8), (10, 12, 16)
EVALUATED = (40, 80, 100)
"""Steps at which checkpoints of made-up contenders were evaluated, of 100."""


def grade(
    difficulty: int,
    accuracy: float,
    *,
    data: str = HOPS,
    step: int = 100,
    depth: str = "8",
    loops: int = 1,
    block: str | None = None,
    last: float | None = None,
    floor: float | None = 0.5,
    error: float | None = 0.01,
    examples: int = 512,
) -> Record:
    """The result of one difficulty."""
    subject = Subject(
        task=DIFFICULTY, data=data, shots=0, loops=loops, depth=depth, block=block, examples=examples, seed=0, precision="fp32",
        version=1, step=step, checkpoint="c", difficulty=difficulty,
    )  # fmt: skip
    values = {
        "accuracy": accuracy, "accuracy_stderr": error, "last_accuracy": accuracy if last is None else last,
        "last_accuracy_stderr": error, "floor": floor, "last_floor": floor, "loss": 2 * (1 - accuracy), "loss_stderr": 0.01,
        "tokens": 20_000, "seconds": 1.0,
    }  # fmt: skip
    return Record(subject, values, "2026-01-01T00:00:00+00:00")


def graded(run: Path, difficulty: int, accuracy: float, **options: Any) -> None:
    """Add the result of one difficulty to a run's evaluations."""
    append_record(run / "evaluation.jsonl", grade(difficulty, accuracy, **options))


@dataclass(frozen=True)
class Contender:
    """A made-up contender of 8 layers: its depth, the layers that hold parameters and that run, and how good it is (0 to 1)."""

    depth: str
    layers: int
    executed: int
    skill: float
    steps: int = 100
    grown_at: int | None = None
    block: str | None = None
    loops: int = 1
    gain: float = 0.0


CONTENDERS = {
    "baseline": Contender("8", 8, 8, 0.94, gain=0.01),
    "baseline-matched": Contender("8", 8, 8, 0.88, steps=78),
    "midas": Contender("8", 8, 8, 0.92, grown_at=44, gain=0.03),
    "lidas": Contender("8", 8, 8, 0.93, grown_at=44, gain=0.05),
    "late-stack": Contender("8", 8, 8, 0.85, grown_at=80),
    "looped": Contender("1-2x3-1", 4, 8, 0.96, block="1:3", loops=3),
    "looped-full": Contender("0-2x4-0", 2, 8, 0.7, block="0:2", loops=4),
    "iso-params": Contender("2", 2, 2, 0.3),
    "iso-params-middle": Contender("4", 4, 4, 0.55),
    "lidas+loop": Contender("3-2x2-3", 8, 10, 0.95, grown_at=44, block="3:5", loops=2),
}


def write_contender(folder: Path, name: str, seed: int, *, looped_too: bool = True) -> Path:
    """A run of a made-up contender, evaluated by difficulty; with loops at inference over every block of 2 where it has none of its own."""
    made, random = CONTENDERS[name], Random(f"{name} {seed}")
    model = ModelConfig(hidden_size=64, num_heads=4, num_kv_heads=4, ffn_size=128)
    began = 4 if made.grown_at is not None else made.layers
    run = write_run(
        folder / f"{name}-seed{seed}", f"{name}-seed{seed}", seed=seed, steps=made.steps, grown_at=made.grown_at,
        flops=10**12 * made.executed // 8, layers=made.layers, executed=made.executed,
        loss=lambda step: 1.6 - made.skill * (1 - math.exp(-step / 30)),
        start_parameters=parameters(DepthSpec.parse(began).plan, model, vocab_size=100), depth=made.depth,
        data={"sources": [{"path": HOPS}], "sequence_length": 64},
        growth={"start": 4, "end": made.grown_at / 100, "operator": "midas" if name == "midas" else "lidas"}
        if made.grown_at and made.loops == 1
        else None,
    )  # fmt: skip
    ease = random.gauss(0, 0.02)

    def accuracy(difficulty: int, step: int, more: float = 0.0) -> float:
        solved = made.skill * (1 - math.exp(-step / 25)) * (2 / (difficulty + 1)) ** 0.2 + ease + more
        right = 0.45 + 0.55 / (1 + math.exp(-14 * (solved - 0.55)))
        return min(max(right + random.gauss(0, 0.008), 0.4), 1.0)

    found = []
    for data, difficulties in ((HOPS, TRAINED), (BEYOND, FURTHER)):
        for difficulty in difficulties:
            floor = 0.42 if difficulty == 1 else 0.5 if difficulty < 8 else 0.55
            for step in sorted({min(step, made.steps) for step in EVALUATED}):
                shallow = made.grown_at is not None and step <= made.grown_at
                block, loops = (None, 1) if shallow else (made.block, made.loops)
                value = accuracy(difficulty, step)
                found.append(grade(difficulty, value, data=data, step=step, depth="4" if shallow else made.depth, loops=loops,
                                   block=block, last=value - 0.04, floor=floor))  # fmt: skip
            for start in range(made.layers - 1 if looped_too and made.gain else 0):
                for loops in range(2, 6):
                    more = made.gain * (1.5 - abs(start - 4) / 2) / (loops - 1)
                    value = accuracy(difficulty, made.steps, more)
                    found.append(grade(difficulty, value, data=data, step=made.steps, loops=loops, floor=floor,
                                       depth=f"{start}-2x{loops}-{6 - start}", block=f"{start}:{start + 2}"))  # fmt: skip
    (run / "evaluation.jsonl").write_text("".join(json.dumps(record.to_json()) + "\n" for record in found))
    return run
