"""Which checkpoints a run has, which is the newest, and which may go."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megaloop.checkpoint.manifest import MANIFEST, Manifest
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError

__all__ = ["check_same_model", "is_step_name", "list_checkpoints", "prune", "remove_checkpoint", "resolve_checkpoint"]

_NAME = re.compile(r"step-([0-9]+)")


def is_step_name(name: str) -> bool:
    """Whether a run's checkpoint could have this name."""
    return _NAME.fullmatch(name) is not None


def list_checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints (those with a manifest) of ``RUN/checkpoints``, oldest first."""
    try:
        if not directory.is_dir():
            return []
        found = [
            (int(match[1]), entry)
            for entry in directory.iterdir()
            if (match := _NAME.fullmatch(entry.name)) and (entry / MANIFEST).is_file()
        ]
    except OSError as error:
        raise MegaloopError(f"checkpoints in {directory} cannot be listed: {error.strerror}") from None
    return [entry for _, entry in sorted(found)]


def resolve_checkpoint(path: Path) -> Path:
    """A checkpoint's directory, from itself, from its run, or from the run's ``checkpoints`` (the newest whole one).

    Raises:
        MegaloopError: there is none.
    """
    try:
        if (path / MANIFEST).is_file():
            return path
        if not path.exists():
            raise MegaloopError(f"checkpoint {path}: no such directory")
    except OSError as error:
        raise MegaloopError(f"checkpoint {path}: cannot be read ({error.strerror})") from None
    for directory in (path / "checkpoints", path):
        whole = list_checkpoints(directory)
        if whole:
            return whole[-1]
    raise MegaloopError(
        f"no whole checkpoint in {path}: expected a checkpoint (a directory with {MANIFEST}) or a run that has saved one"
    )


def prune(directory: Path, keep: int) -> list[Path]:
    """Delete all but the newest ``keep`` (at least 1) checkpoints of ``RUN/checkpoints``; returns what was deleted.

    Raises:
        MegaloopError: one cannot be deleted.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, found {keep}")
    gone = list_checkpoints(directory)[:-keep]
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
    saved = _describe(ModelConfig.model_validate(manifest.model), DepthPlan.from_json(manifest.plan), None)
    asked = _describe(model, plan, vocab_size)
    if saved != asked:
        raise MegaloopError(
            f"the checkpoint is of another shape: it holds {_differences(saved, asked)}; "
            f"the configuration asks for {_differences(asked, saved)}; change the configuration to match"
        )


def _describe(model: ModelConfig, plan: DepthPlan, vocab_size: int | None) -> dict[str, object]:
    fields = ("hidden_size", "num_heads", "num_kv_heads", "ffn_size", "tied_embeddings", "rope_theta", "norm_eps")
    return {
        "depth": str(plan),
        **{name: getattr(model, name) for name in fields},
        "vocab_size": vocab_size or model.vocab_size,
    }


def _differences(one: dict[str, object], other: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in one.items() if other[key] != value)
