"""Run directories with curves of one's choice, in the format of real runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megaloop.config import Config
from megaloop.evaluation.records import Record, Subject, append_record
from megaloop.evaluation.tasks import TASKS, TASKS_VERSION
from megaloop.runs.metrics import StepRecord

__all__ = ["evaluated", "write_run", "written_by_tokenizer"]


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
    **changes: Any,
) -> Path:
    """A run whose every step costs ``flops`` (half of it before ``grown_at``) and takes half a second; ``bits`` per byte for a nat per token."""
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
            layers=4 if shallow else 8,
            depth=4 if shallow else 8,
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
    began = 4 if grown_at is not None else 8
    events: list[dict[str, Any]] = [
        {
            "event": "start",
            "step": 0,
            "plan": str(began),
            "parameters": 10_000,
            "torch": "2.13",
            "attention": "torch SDPA",
        }
    ]
    if grown_at is not None:
        plan = {"order": list(range(8)), "lineage": {}}
        events.append({"event": "grow", "step": grown_at, "plan": plan, "loss_before": 3.5, "loss_after": 3.75})
    (path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return path


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
