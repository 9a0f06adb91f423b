"""The one reader of files of JSON objects, a line each: metrics, events, ranks, jobs, evaluations.

Such a file may end in a torn line, and somebody may have edited it: a line that is no object of JSON is passed over,
and whoever takes a value from a record asks for its type (:func:`number`, :func:`whole_number`, :func:`text`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaloop.errors import MegaloopError

__all__ = ["number", "parse_record", "read_lines", "read_records", "text", "whole_number"]

_LARGEST = 10**30
"""No count of steps, tokens, bytes or FLOPs is as large."""


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The object that a line holds; None where it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8, not JSON, an integer of thousands of digits; nested too deep
        return None
    return value if isinstance(value, dict) else None


def read_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The lines of a file, each with a line end and with its record, or None where it is none.

    A file that is not there has no lines.

    Raises:
        MegaloopError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            for line in file:
                yield line if line.endswith(b"\n") else line + b"\n", parse_record(line)
    except FileNotFoundError:
        return
    except OSError as error:
        raise MegaloopError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; lines that are none are passed over. Raises as :func:`read_lines` does."""
    return (record for _, record in read_lines(path) if record is not None)


def number(record: dict[str, Any], key: str) -> float | None:
    """A finite number of a record; None where it has none under this key."""
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return None
    return float(value) if math.isfinite(value) else None


def whole_number(record: dict[str, Any], key: str) -> int | None:
    """A whole number from 0 on of a record (a step, tokens, bytes); None where it has none under this key."""
    value = record.get(key)
    return value if type(value) is int and 0 <= value < _LARGEST else None


def text(record: dict[str, Any], key: str) -> str | None:
    """A text of a record; None where it has none under this key."""
    value = record.get(key)
    return value if isinstance(value, str) else None
