"""Sharded checkpoints: every rank writes what it owns, any topology reads it, nothing is ever unpickled."""

from megaloop.checkpoint.background import BackgroundSaver
from megaloop.checkpoint.manifest import GrowthEntry, Manifest
from megaloop.checkpoint.reader import Checkpoint
from megaloop.checkpoint.resolve import (
    check_same_model,
    list_checkpoints,
    list_damaged,
    list_incomplete,
    prune,
    quarantine,
    resolve_checkpoint,
    step_name,
    step_of,
)
from megaloop.checkpoint.run_state import DataState, DepthState, RunState, SourceState
from megaloop.checkpoint.writer import CheckpointInfo, SaveResult, save_checkpoint

__all__ = [
    "BackgroundSaver",
    "Checkpoint",
    "CheckpointInfo",
    "DataState",
    "DepthState",
    "GrowthEntry",
    "Manifest",
    "RunState",
    "SaveResult",
    "SourceState",
    "check_same_model",
    "list_checkpoints",
    "list_damaged",
    "list_incomplete",
    "prune",
    "quarantine",
    "resolve_checkpoint",
    "save_checkpoint",
    "step_name",
    "step_of",
]
