"""Which samples a run excludes: `passed-over.json` of its directory."""

from __future__ import annotations

import json
from pathlib import Path

from megaloop.errors import MegaloopError
from megaloop.files import replace_file
from megaloop.text import printable

__all__ = ["EXCLUDED", "exclude_samples", "read_excluded"]


EXCLUDED = "passed-over.json"


_MOST_SAMPLES = 10**18
"""No global sample number is as large."""


def exclude_samples(run: Path, samples: tuple[int, int]) -> None:
    """From now on, the run excludes these samples too.

    Raises:
        MegaloopError: this cannot be written down.
    """
    try:
        replace_file(run / EXCLUDED, json.dumps({"samples": [*read_excluded(run), samples]}).encode() + b"\n")
    except OSError as error:
        raise MegaloopError(f"{run / EXCLUDED}: cannot be written ({error.strerror})") from None


def read_excluded(run: Path) -> list[tuple[int, int]]:
    """The samples that a run excludes; none where it has no such file.

    Raises:
        MegaloopError: the file is something else.
    """
    path = run / EXCLUDED
    try:
        values = json.loads(path.read_bytes())
        excluded = [(start, stop) for start, stop in values["samples"]]
        if not all(type(edge) is int and 0 <= edge < _MOST_SAMPLES for gap in excluded for edge in gap):
            raise ValueError("something else than sample numbers")
        return excluded
    except FileNotFoundError:
        return []
    except OSError as error:
        raise MegaloopError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MegaloopError(
            f'{path} is damaged ({printable(error)}); expected {{"samples": [[START, STOP], ...]}}: fix it, or delete it '
            "to train on all samples"
        ) from None
