"""Record the training curves of small configurations bit by bit, and compare two records.

    tools/record_curves.py before.json --tree BEFORE    # a checkout before the change
    tools/record_curves.py after.json --tree AFTER      # and after it
    tools/record_curves.py --compare before.json after.json

A refactoring changes no curve. To show that, the same configurations are trained by both trees with ``megaloop train``, and
every step's loss, gradient norm, learning rate and validation loss are compared as the bits that they are (``float.hex``).
The script imports nothing of megaloop: it rests on the command line, the keys of the configuration and ``RUN/metrics.jsonl``,
so one script, of either tree, records both. Equal bits can be expected of one machine with one set of packages only: the
record names both, and a comparison says where they differ.

A recording takes about five minutes on two quiet cores; everything runs on the CPU, one run at a time, at low priority.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Any

__all__ = ["CURVES", "FIELDS", "Curve", "compare", "read_steps", "record"]

FIELDS = ("loss", "grad_norm", "lr", "val_loss")
"""What is compared of each step, in this order; the names are those of ``metrics.jsonl``."""

NICE = 15
"""Priority of all that is run."""
STEPS = 12
TINY: dict[str, Any] = {
    "depth": "3",
    "model": {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64},
    "data": {"sequence_length": 32},
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 1, "precision": "fp32"},
    "optimizer": {"lr": 3e-3},
    "schedule": {"warmup_steps": 4, "cooldown": 0.3},
    "validation": {"every": 4, "samples": 4},
    "logging": {"tensorboard": False},
}
"""The configuration that the curves change; only what it needs is said, so defaults are under test, too."""


class RecordingError(Exception):
    """A command failed or left no whole curve: what to show, in a few lines."""


@dataclass(frozen=True)
class Curve:
    """A run, from start to end.

    Attributes:
        name: what it is called in records.
        layout: pp, tp, dp.
        changes: values of the configuration by their dotted keys.
        steps: optimizer steps of the run.
        sources: the data of the run, with the weight of each; see :func:`_prepare`.
        commands: options of each ``megaloop train``, one after the other in one run directory.
        init: the curve whose last checkpoint the run starts from.
        config: a configuration file of the tree, in place of ``TINY``.
    """

    name: str
    layout: tuple[int, int, int] = (1, 1, 1)
    changes: Mapping[str, Any] = field(default_factory=dict)
    steps: int = STEPS
    sources: Mapping[str, Any] = field(default_factory=lambda: {"tiny": 1.0})
    commands: Sequence[Sequence[str]] = ((),)
    init: str | None = None
    config: str | None = None


LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (4, 1, 1))
LOOP = {"depth": "1-2x3-1"}
BF16 = {"train.precision": "bf16"}


def _growth(operator: str, **options: Any) -> dict[str, Any]:
    """4 layers for 3 steps, 6 for 3, then 8: blocks of less than all layers, by which operators differ."""
    schedule = [{"steps": steps, "layers": layers} for steps, layers in ((3, 4), (3, 6), (STEPS - 6, 8))]
    return {"depth": "8", "growth": {"operator": operator, "start": 4, "block": 2, "schedule": schedule, **options}}


DRAWN = {"count": "uniform", "ramp": 0.5, "injection": "concat", "norm": True, "residual_scale": "1/k", "backprop": 2}
BY_DEPTH = [{"layers": 4, "pp": 1}, {"layers": 8, "pp": 2}]
SFT = {"data.format": "sft", "data.sequence_length": 64, "data.validation_fraction": 0.3}
SFT_BATCH = {"train.global_batch": 8, "train.micro_batch": 2}
CHANGING = {"tiny": {"stable": 1, "cooldown": 0.5}, "other": {"stable": 0.25, "cooldown": 0.5}}
DEMO = {"train.global_batch": 8, "train.micro_batch": 2, "validation.every": 10, "validation.samples": 8}

CURVES: tuple[Curve, ...] = (
    *(
        Curve(f"pp{pp}-tp{tp}-dp{dp}-{kind}", (pp, tp, dp), {"depth": str(max(pp, 3)), "train.precision": kind})
        for kind, (pp, tp, dp) in product(("fp32", "bf16"), LAYOUTS)
    ),
    Curve("recompute-full", (2, 1, 1), BF16 | {"train.recompute": "full"}),
    Curve("recompute-selective", (1, 1, 1), BF16 | {"train.recompute": "selective"}),
    Curve("sequence-parallel", (1, 2, 1), BF16 | {"parallel.sequence_parallel": True}),
    Curve("document-masking", (1, 1, 1), {"model.document_masking": True, "train.micro_batch": 2}),
    Curve("untied-embeddings", (2, 1, 1), {"model.tied_embeddings": False}),
    Curve("loop-pp1", (1, 1, 1), LOOP),
    Curve("loop-pp2", (2, 1, 1), LOOP),
    Curve("loop-injection-drawn", (2, 1, 1), LOOP | {"loop": DRAWN}),
    Curve("rounds-2", (2, 1, 1), {"depth": "4", "parallel.rounds": 2}),
    Curve("growth-lidas", (2, 1, 2), _growth("lidas")),
    Curve("growth-midas", (2, 1, 1), BF16 | _growth("midas", warmup_steps=2)),
    Curve("growth-then-loop", (2, 1, 1), _growth("lidas") | {"depth_events": [{"at": 0.75, "depth": "2-4x2-2"}]}),
    Curve("growth-topology", (1, 1, 2), _growth("lidas", topology=BY_DEPTH)),
    Curve("resume", (2, 1, 1), BF16, commands=(("--stop-at", "6"), ("--resume",))),
    Curve("sft", (1, 1, 2), SFT | SFT_BATCH, sources={"pairs.jsonl": 1.0}, init="pp1-tp1-dp1-fp32"),
    Curve("mixture", (1, 1, 1), {"schedule.cooldown": 0.4}, sources=CHANGING),
    Curve(
        "demo",
        (2, 1, 1),
        DEMO,
        steps=30,
        sources={"demo": 1.0},
        commands=(("--stop-at", "10"), ("--resume", "parallel.pp=1", "parallel.dp=2")),
        config="configs/demo.yaml",
    ),
)
"""Everything that decides what a step computes, each once and small: layouts and precisions, then one feature after the other."""


# --- recording ---


@dataclass(frozen=True)
class _Place:
    """The tree that is recorded and a folder to work in, which holds the data and a directory per run."""

    tree: Path
    folder: Path

    def run(self, *arguments: str) -> str:
        """What a Python of the tree prints.

        Raises:
            RecordingError: it failed.
        """
        # nothing of a job or launcher that this runs in, and no GPU: its sums need not come in one order
        rank = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        kept = {key: value for key, value in os.environ.items() if key not in rank and not key.startswith("SLURM_")}
        one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment = {**kept, **one, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(self.tree)}
        done = subprocess.run(
            ["nice", "-n", str(max(NICE - os.nice(0), 0)), sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="backslashreplace",
            check=False,
        )
        if done.returncode:
            end = "\n".join(done.stdout.splitlines()[-15:])
            raise RecordingError(f"python {' '.join(arguments)} ended with {done.returncode}:\n{end}")
        return done.stdout


def record(tree: Path, out: Path, patterns: Sequence[str] = ("*",)) -> bool:
    """Train the curves whose names match with ``tree`` and write ``out``, anew after each.

    Returns:
        Whether every curve was recorded. One that failed has its error in the record.

    Raises:
        RecordingError: Python does not take megaloop from the tree, the data cannot be made, or no name matches.
    """
    chosen = _chosen(patterns)
    with tempfile.TemporaryDirectory(prefix="record-curves-") as name:
        place = _Place(tree.resolve(), Path(name))
        found = Path(place.run("-c", "import megaloop; print(megaloop.__file__)").strip())
        if not found.is_relative_to(place.tree):
            raise RecordingError(f"{tree}: Python imports {found}; is this a checkout of megaloop?")
        written: dict[str, Any] = {"revision": _revision(tree), "machine": _machine()}
        start = time.monotonic()
        written["data"] = _prepare(place, {source for curve in chosen for source in curve.sources})
        written["curves"] = {curve.name: {"error": "the recording was interrupted before it"} for curve in chosen}
        print(f"data  {time.monotonic() - start:.1f} s", flush=True)
        for number, curve in enumerate(chosen, start=1):
            start = time.monotonic()
            try:
                entry: dict[str, Any] = {"steps": _train(place, curve)}
                told = f"{curve.steps} steps"
            except RecordingError as error:
                entry = {"error": str(error)}
                told = f"FAILED: {error}"
            written["curves"][curve.name] = entry
            print(f"[{number}/{len(chosen)}] {curve.name}  {time.monotonic() - start:.1f} s  {told}", flush=True)
            out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return all("steps" in entry for entry in written["curves"].values())


def _chosen(patterns: Sequence[str]) -> list[Curve]:
    matching = {curve.name for curve in CURVES if any(fnmatch.fnmatch(curve.name, pattern) for pattern in patterns)}
    if not matching:
        raise RecordingError(f"--only: no curve is called {' or '.join(patterns)}; --list shows their names")
    needed = {curve.init for curve in CURVES if curve.name in matching}
    return [curve for curve in CURVES if curve.name in matching | needed]


def _train(place: _Place, curve: Curve) -> list[dict[str, Any]]:
    run = place.folder / "runs" / curve.name
    pp, tp, dp = curve.layout
    values = {
        "run_dir": str(run),
        "data.sources": [{"path": str(place.folder / name), "weight": share} for name, share in curve.sources.items()],
        "parallel.pp": pp,
        "parallel.tp": tp,
        "parallel.dp": dp,
        "train.steps": curve.steps,
        **curve.changes,
    }
    if curve.init is not None:
        values["init"] = str(place.folder / "runs" / curve.init)
    config = place.tree / curve.config if curve.config else place.folder / "tiny.yaml"
    (place.folder / "tiny.yaml").write_text(json.dumps(TINY), encoding="utf-8")  # JSON is YAML
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    for options in curve.commands:
        # options last: overrides among them replace those of the curve
        place.run("-m", "megaloop", "train", str(config), "--ranks", str(pp * tp * dp), *overrides, *options)
    return read_steps(run / "metrics.jsonl", curve.steps)


def read_steps(path: Path, steps: int) -> list[dict[str, Any]]:
    """The curve in a run's ``metrics.jsonl``: of each step its number and ``FIELDS``, floats as ``float.hex``.

    Raises:
        RecordingError: not each of the steps is there once and in order with a finite loss and gradient norm and a learning
            rate, or none has a validation loss.
    """
    read = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        step: dict[str, Any] = {"step": values.get("step")}
        for name in FIELDS:
            value = values.get(name)
            if value is None and name != "val_loss":
                raise RecordingError(f"{path.name}: step {step['step']} has no finite {name}")
            step[name] = None if value is None else float(value).hex()
        read.append(step)
    numbers = [step["step"] for step in read]
    if numbers != list(range(1, steps + 1)):
        raise RecordingError(f"{path.name}: expected steps 1 to {steps} once each, found {numbers}")
    if all(step["val_loss"] is None for step in read):
        raise RecordingError(f"{path.name}: no step has a val_loss")
    return read


# --- data ---

WORDS = """the of and to in a god lord said unto king earth heaven water light day night man son house people stone hand
eye road field bread winter river gate""".split()  # noqa: SIM905


def _prepare(place: _Place, names: set[str]) -> dict[str, str]:
    """Make the data sets that curves name, with the tree's commands; returns a digest of each.

    ``tiny`` and ``other`` are short documents in samples of 32 tokens with one tokenizer, ``pairs.jsonl`` prompts and answers,
    ``demo`` the first chapters of the demo's text.
    """
    folder = place.folder
    prep = ("-m", "megaloop", "prep", "--workers", "1", "--validation-fraction", "0.1")
    tiny = ("--vocab-size", "400")
    for seed, (name, options) in enumerate({"tiny": tiny, "other": ("--tokenizer", "tiny/tokenizer.model")}.items()):
        _write_jsonl(folder / f"{name}.jsonl", _documents(random.Random(seed)))
        place.run(*prep, f"{name}.jsonl", "--out", name, "--sequence-length", "32", *options)
    _write_jsonl(folder / "pairs.jsonl", _pairs(random.Random(2)))
    if "demo" in names:
        place.run("-m", "data_prep.demo", "kjv.jsonl")
        chapters = (folder / "kjv.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "demo.jsonl").write_text("".join(chapters[:150]), encoding="utf-8")
        place.run(*prep, "demo.jsonl", "--out", "demo", "--sequence-length", "256", "--vocab-size", "4096")
    return {name: _digest(folder / name) for name in sorted(names)}


def _write_jsonl(path: Path, lines: Iterator[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _documents(chance: random.Random) -> Iterator[dict[str, str]]:
    """Texts of 5 to 120 words: some end within a sample, some go on for several."""
    for number in range(300):
        yield {"text": " ".join(chance.choices(WORDS, k=chance.randint(5, 120))) + f". {number}\n"}


def _pairs(chance: random.Random) -> Iterator[dict[str, str]]:
    """Answers of one to six words."""
    for number in range(200):
        asked = chance.choices(WORDS, k=chance.randint(1, 6))
        yield {"prompt": " ".join(asked) + " ->", "answer": f" {' '.join(reversed(asked)) if number % 3 else 'yes'}"}


def _digest(data: Path) -> str:
    """SHA-256 of what a model sees of a data set: its shards and its tokenizer, or the file of examples."""
    files = [data] if data.is_file() else sorted([*data.rglob("*.mds"), data / "tokenizer.model"])
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def _revision(tree: Path) -> str:
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _machine() -> dict[str, str]:
    """What bits may depend on besides the tree."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    packages = {distribution.name: distribution.version for distribution in metadata.distributions()}
    known = {name: packages.get(name, "none") for name in ("torch", "deepspeed", "numpy", "sentencepiece")}
    return {"cpu": model, "python": platform.python_version(), **known}


# --- comparing ---


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, str | None]:
    """Where two records differ.

    Returns:
        By the name of each curve that either record has, and of each data set (``data NAME``): None where all is the same
        to the last bit, otherwise what differs first, by step and then in the order of ``FIELDS``.
    """
    found: dict[str, str | None] = {}
    for name in [*first["data"], *(name for name in second["data"] if name not in first["data"])]:
        known = name in first["data"] and name in second["data"]
        if known and first["data"][name] != second["data"][name]:
            found[f"data {name}"] = "the samples or the tokenizer are others"
    ours, theirs = first["curves"], second["curves"]
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        found[name] = _difference(ours.get(name), theirs.get(name))
    return found


def _difference(first: dict[str, Any] | None, second: dict[str, Any] | None) -> str | None:
    for entry, which in ((first, "first"), (second, "second")):
        if entry is None:
            return f"missing in the {which} record"
        if "error" in entry:
            return f"failed in the {which} record: {entry['error'].splitlines()[-1][:200]}"
    assert first is not None
    assert second is not None
    for left, right in zip(first["steps"], second["steps"], strict=False):
        for name in FIELDS:
            if left[name] != right[name]:
                return f"step {left['step']} {name}: {_shown(left[name], right[name])}"
    if len(first["steps"]) != len(second["steps"]):
        return f"{len(first['steps'])} steps against {len(second['steps'])}"
    return None if first["steps"] else "no steps in either record"


def _shown(left: str | None, right: str | None) -> str:
    if left is None or right is None:
        return f"{left or 'none'} against {right or 'none'}"
    a, b = float.fromhex(left), float.fromhex(right)
    relative = abs(a - b) / max(abs(a), abs(b)) if math.isfinite(a - b) else math.inf
    return f"{a!r} against {b!r}, relative {relative:.1e}"


def _report(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Print a line per curve; returns whether all are the same."""
    for key in sorted(first["machine"].keys() | second["machine"].keys()):
        left, right = first["machine"].get(key), second["machine"].get(key)
        if left != right:
            print(f"note: {key} {left} against {right}; equal bits can not be expected")
    found = compare(first, second)
    width = max(map(len, found), default=0)
    for name, difference in found.items():
        print(f"{name:{width}}  {'identical' if difference is None else f'DIFFERS  {difference}'}")
    same = sum(difference is None for difference in found.values())
    print(f"{first['revision']} and {second['revision']}: {same} of {len(found)} identical")
    return bool(found) and same == len(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 where curves differ or could not be recorded, 2 where the arguments make no sense."""
    parser = argparse.ArgumentParser(description="Record training curves bit by bit, and compare two records.")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT.json", help="record into this file")
    parser.add_argument(
        "--tree", type=Path, default=Path(__file__).parents[1], help="checkout to record; default: this one"
    )
    parser.add_argument("--only", action="append", metavar="PATTERN", help="curves with such a name (may be repeated)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="compare two records")
    parser.add_argument("--list", action="store_true", help="print the names of the curves")
    options = parser.parse_args(arguments)
    if (options.out is not None) + (options.compare is not None) + options.list != 1:
        parser.error("give one of OUT.json, --compare A.json B.json and --list")
    try:
        if options.compare:
            return 0 if _report(*(json.loads(path.read_text(encoding="utf-8")) for path in options.compare)) else 1
        if options.list:
            print("\n".join(curve.name for curve in CURVES))
            return 0
        return 0 if record(options.tree, options.out, options.only or ("*",)) else 1
    except (RecordingError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
