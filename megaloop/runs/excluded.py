"""Which samples a run passes over: `passed-over.json` of its directory."""

from __future__ import annotations

import json
from pathlib import Path

from megaloop.errors import MegaloopError
from megaloop.files import replace_file
from megaloop.text import printable

__all__ = ["HOLES", "add_hole", "read_holes"]


HOLES = "passed-over.json"


_MOST_SAMPLES = 10**18
"""No global sample number is as large."""


def add_hole(run: Path, samples: tuple[int, int]) -> None:
    """From now on, the run passes over these samples too.

    Raises:
        MegaloopError: this cannot be written down.
    """
    try:
        replace_file(run / HOLES, json.dumps({"samples": [*read_holes(run), samples]}).encode() + b"\n")
    except OSError as error:
        raise MegaloopError(f"{run / HOLES}: cannot be written ({error.strerror})") from None


def read_holes(run: Path) -> list[tuple[int, int]]:
    """The samples that a run passes over; none where it has no such file.

    Raises:
        MegaloopError: the file is something else.
    """
    path = run / HOLES
    try:
        values = json.loads(path.read_bytes())
        holes = [(start, stop) for start, stop in values["samples"]]
        if not all(type(each) is int and 0 <= each < _MOST_SAMPLES for hole in holes for each in hole):
            raise ValueError("something else than sample numbers")
        return holes
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MegaloopError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MegaloopError(
            f'{path} is damaged ({printable(error)}); expected {{"samples": [[START, STOP], ...]}}: mend it, or delete it '
            "to train on all samples"
        ) from None
