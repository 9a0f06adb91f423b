"""What the options of several commands have in common."""

from __future__ import annotations

import math

import typer

__all__ = ["finite"]


def finite(value: float | None) -> float | None:
    """Callback of an option: neither an infinity nor ``nan``, which lies within whatever limits there are."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value
