"""``megaloop diagnose`` of one model, with its options by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaloop.analysis import diagnose as command
from megaloop.analysis.request import Request
from megaloop.analysis.results import DiagnosisRecord
from megaloop.runtime.share import OnPart

__all__ = ["diagnose"]


def diagnose(path: Path, on_part: OnPart | None = None, **options: Any) -> list[DiagnosisRecord]:
    """The records of a model; the last has its signatures. Options are those of :class:`Request`."""
    (records,) = command.diagnose([path], Request(**options), on_part)
    return records
