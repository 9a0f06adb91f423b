"""What a resumed run may find to be another than it was saved with, once the user says so."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

__all__ = ["Allow", "AllowOption", "allow_arguments"]


class Allow(StrEnum):
    """What the meaning of a place in the data rests on; ``--allow`` takes a change of it."""

    data = "data"
    seed = "seed"
    batch = "batch"


AllowOption = Annotated[
    list[Allow] | None,
    typer.Option(
        "--allow", help="With --resume: go on although this is another than the run was saved with; may be repeated."
    ),
]


def allow_arguments(allowed: list[Allow] | None) -> list[str]:
    """The words with which a command line passes them on."""
    return [word for what in allowed or [] for word in ("--allow", what.value)]
