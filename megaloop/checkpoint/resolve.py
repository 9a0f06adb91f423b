"""Which checkpoints a run has, which is the newest, which may go, and which were quarantined as damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from megaloop.checkpoint.manifest import MANIFEST, Manifest
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.text import printable

__all__ = [
    "DAMAGED",
    "check_same_model",
    "is_step_name",
    "list_checkpoints",
    "list_damaged",
    "list_incomplete",
    "prune",
    "quarantine",
    "remove_checkpoint",
    "resolve_checkpoint",
    "step_name",
    "step_of",
]

DAMAGED = ".damaged"
"""What a damaged checkpoint's name ends in once a run has passed it over; nothing takes it for a checkpoint."""
_NAME = re.compile(r"step-([0-9]+)")


def is_step_name(name: str) -> bool:
    """Whether a run's checkpoint could have this name."""
    return _NAME.fullmatch(name) is not None


def step_name(step: int) -> str:
    """The name of the checkpoint that a run saves after a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a run's checkpoint, quarantined or not."""
    match = _NAME.fullmatch(path.name.removesuffix(DAMAGED))
    assert match is not None
    return int(match[1])


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints (those with a manifest) of ``RUN/checkpoints``, oldest first."""
    return [path for path in _list(directory) if (path / MANIFEST).is_file()]


def list_incomplete(directory: Path) -> list[Path]:
    """Those that have lost their manifest: by damage, or because deleting them was interrupted; oldest first."""
    return [path for path in _list(directory) if not (path / MANIFEST).is_file()]


def list_damaged(directory: Path) -> list[Path]:
    """Those that :func:`quarantine` has renamed, oldest first."""
    return _list(directory, DAMAGED)


def _list(directory: Path, suffix: str = "") -> list[Path]:
    try:
        if not directory.is_dir():
            return []
        named = [path for path in directory.iterdir() if path.name.endswith(suffix) and path.is_dir()]
    except OSError as error:
        raise MegaloopError(f"checkpoints in {directory} cannot be listed: {error.strerror}") from None
    return sorted((path for path in named if is_step_name(path.name.removesuffix(suffix))), key=step_of)


def quarantine(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is passed over from now on but may still be looked at."""
    aside = path.with_name(path.name + DAMAGED)
    try:
        if aside.exists():
            shutil.rmtree(aside)
        return path.rename(aside)
    except OSError as error:
        raise MegaloopError(
            f"damaged checkpoint {path} cannot be quarantined as {aside.name}: {error.strerror}"
        ) from None


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint's directory, from itself, from its run, or from the run's ``checkpoints`` (the newest complete one).

    Raises:
        MegaloopError: there is none.
    """
    try:
        if (path / MANIFEST).is_file():
            return path
        if not path.exists():
            raise MegaloopError(f"checkpoint {printable(path, 1000)}: no such directory")
    except OSError as error:
        raise MegaloopError(f"checkpoint {printable(path, 1000)}: cannot be read ({error.strerror})") from None
    for directory in (path / "checkpoints", path):
        complete = list_checkpoints(directory)
        if complete:
            return complete[-1]
    if what := _model_of_others(path):
        raise MegaloopError(
            f"no complete checkpoint in {path}: it is {what}; import it first: megaloop import {path} --out CKPT"
        )
    raise MegaloopError(
        f"no complete checkpoint in {path}: expected a checkpoint (a directory with {MANIFEST}) or a run that has saved one"
    )


def _model_of_others(path: Path) -> str | None:
    """What a path looks like that 'megaloop import' reads; None: nothing of the kind."""
    if path.is_file():
        return "a GGUF file" if path.suffix.lower() == ".gguf" else None
    if (path / "config.json").is_file():
        return "a Hugging Face directory"
    return "a directory with a GGUF file" if any(path.glob("*.gguf")) else None


def prune(directory: Path, keep: int, every: int = 0) -> list[Path]:
    """Delete all but the newest ``keep`` (at least 1) checkpoints of ``RUN/checkpoints``; returns what was deleted.

    What was quarantined as damaged goes too, once there is a newer checkpoint, and what is left of deletions that were
    interrupted: older ones without a manifest.

    Args:
        every: checkpoints of steps that this divides stay for good; 0: none does.

    Raises:
        MegaloopError: one cannot be deleted.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, found {keep}")
    complete = list_checkpoints(directory)
    gone = [path for path in complete[:-keep] if not (every and step_of(path) % every == 0)]
    gone += [path for path in list_damaged(directory) if complete and step_of(complete[-1]) >= step_of(path)]
    gone += [path for path in list_incomplete(directory) if complete and step_of(complete[-1]) > step_of(path)]
    for path in gone:
        try:
            remove_checkpoint(path)
        except OSError as error:
            raise MegaloopError(f"old checkpoint {path} cannot be deleted: {error.strerror}") from None
    return gone


def remove_checkpoint(directory: Path) -> None:
    """Delete a checkpoint, the manifest first: half deleted, it does not exist."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory)


def check_same_model(manifest: Manifest, model: ModelConfig, plan: DepthPlan, vocab_size: int) -> None:
    """Raise MegaloopError, with both shapes in one line, unless a checkpoint fits a configuration."""
    saved = _describe(manifest.model, manifest.plan, None)
    asked = _describe(model, plan, vocab_size)
    if saved != asked:
        raise MegaloopError(
            f"the checkpoint is of another shape: it holds {_differences(saved, asked)}; "
            f"the configuration asks for {_differences(asked, saved)}; change the configuration to match (megaloop init-config writes one from the checkpoint)"
        )


def _describe(model: ModelConfig, plan: DepthPlan, vocab_size: int | None) -> dict[str, object]:
    fields = (
        "hidden_size",
        "num_heads",
        "num_kv_heads",
        "ffn_size",
        "tied_embeddings",
        "rope_theta",
        "norm_eps",
        "norm_scaling",
    )
    scaling = model.rope_scaling
    return {
        "depth": str(plan),
        **{name: getattr(model, name) for name in fields},
        "head_dim": model.head_size,
        "rope_scaling": "none" if scaling is None else json.dumps(scaling.model_dump(exclude_none=True)),
        "vocab_size": vocab_size or model.vocab_size,
    }


def _differences(one: dict[str, object], other: dict[str, object]) -> str:
    return ", ".join(f"{key} {printable(value)}" for key, value in one.items() if other[key] != value)
