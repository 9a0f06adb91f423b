"""What the configuration that a checkpoint records tells of its run.

The record is the resolved configuration of whichever version wrote the checkpoint, so it stays as it was found, and what is
read from it is read once, here: nothing in it is relied on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megaloop.checkpoint.run_state import DataState, RunState, SourceState
from megaloop.config import Config
from megaloop.errors import MegaloopError

__all__ = ["RecordedData", "with_recorded"]


@dataclass(frozen=True)
class RecordedData:
    """The data section of a recorded configuration.

    Attributes:
        sequence_length: tokens per sample in training; None: the record does not say.
        paths: where the data sets lay; empty: the record does not say.
        is_fine_tuned: the data is prompts and answers.
    """

    sequence_length: int | None
    paths: tuple[Path, ...]
    is_fine_tuned: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Whatever makes sense; what does not counts as not said."""
        data = config.get("data")
        if not isinstance(data, dict):
            return cls(None, (), False)
        length, sources = data.get("sequence_length"), data.get("sources")
        paths = (
            [source.get("path") for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
        )
        return cls(
            sequence_length=length if type(length) is int and 0 < length < 1 << 31 else None,
            paths=tuple(Path(path) for path in paths if isinstance(path, str) and "\0" not in path),
            is_fine_tuned=data.get("format") == "sft",
        )


def with_recorded(state: RunState, config: Mapping[str, Any]) -> RunState:
    """A state of format version 1 with what only the configuration tells: batch, steps and data.

    As it was, where the record is no configuration of today's (of an import, say).
    """
    try:
        known = Config.model_validate(config)
        data = DataState(
            sequence_length=known.data.sequence_length,
            cooldown_sample=known.cooldown_sample,
            sources=tuple(
                SourceState(train=None, validation=None, stable=stable, cooldown=cooldown)
                for stable, cooldown in (source.weights for source in known.data.sources)
            ),
        )
    except (ValueError, ArithmeticError, MegaloopError):  # pydantic's errors are ValueErrors
        return state
    return state.model_copy(update={"batch": known.train.global_batch, "steps": known.train.steps, "data": data})
