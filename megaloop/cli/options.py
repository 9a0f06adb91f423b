"""What the options of several commands have in common."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

import typer

from megaloop.depth import DepthSpec

__all__ = ["Json", "OnError", "Overrides", "Precision", "Recompute", "finite", "read_depth"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override configuration values: train.steps=100")
]


def finite(value: float | None) -> float | None:
    """Callback of an option: neither an infinity nor ``nan``, which lies within whatever limits there are."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


def read_depth(text: str | None) -> DepthSpec | None:
    """What ``--depth`` says.

    Raises:
        MegaloopError: it cannot be read.
    """
    return None if text is None else DepthSpec.parse(text)


class OnError(StrEnum):
    stop = "stop"
    skip = "skip"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(StrEnum):
    none = "none"
    full = "full"
    selective = "selective"
