"""Values as the page shows them: its template's filters."""

from __future__ import annotations

import math
from collections.abc import Callable

from markupsafe import Markup

from megaloop.report.depth_use import Row
from megaloop.report.difficulty import Level
from megaloop.report.primitives import Cell
from megaloop.report.savings import Spread

__all__ = ["FILTERS", "NONE", "format_cell", "format_percent", "format_spread"]

NONE = "\N{EN DASH}"
"""What the tables show for no value."""


def format_spread(value: Spread, digits: int = 4) -> str:
    if not value.count:
        return NONE
    return f"{value.mean:.{digits}f}" + (
        "" if value.deviation is None else f" ±\N{NO-BREAK SPACE}{value.deviation:.{digits}f}"
    )


def format_cell(cell: Cell | None, digits: int = 1) -> str:
    if cell is None:
        return NONE
    return f"{100 * cell.value:.{digits}f}" + ("" if cell.error is None else f" ± {100 * cell.error:.{digits}f}") + "%"


def format_number(value: float | None) -> str:
    """Scientific, three digits: FLOPs and tokens."""
    if value is None or math.isnan(value):
        return NONE
    if abs(value) < 1e5:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return Markup("{}·10<sup>{}</sup>").format(mantissa, int(exponent))


def format_short(value: float | None) -> str:
    """Three digits: 1.98M parameters."""
    if value is None:
        return NONE
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def format_count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def format_percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None or math.isnan(value) else f"{100 * value:.{digits}f}%"


def format_duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def format_size(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def format_level(level: Level | None) -> str:
    """An accuracy in percent with half its interval."""
    if level is None:
        return NONE
    margin = "" if level.margin is None else f" ±\N{NO-BREAK SPACE}{100 * level.margin:.1f}"
    return f"{100 * level.mean:.1f}{margin}"


def format_points(value: float | None) -> str:
    """A difference of accuracies in percentage points, with its sign."""
    return NONE if value is None else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def format_p(value: float | None) -> str:
    if value is None:
        return NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def format_signature(row: Row | None) -> str:
    """A number with where it lies, how many runs show it, and why it is unclear."""
    if row is None:
        return NONE
    if row.mean is None:
        return row.why
    text = f"{row.mean:.3g}"
    if row.low is not None and row.high is not None:
        text += f" ({row.low:.3g} to {row.high:.3g})"
    total = sum(row.verdicts.values())
    said = [verdict if total == 1 else f"{verdict} in {count} of {total}" for verdict, count in row.verdicts.items()]
    return "; ".join([text, *said, *([row.why] if row.why else [])])


FILTERS: dict[str, Callable[..., str]] = {
    "bytes": format_size,
    "cell": format_cell,
    "count": format_count,
    "duration": format_duration,
    "level": format_level,
    "number": format_number,
    "p": format_p,
    "percent": format_percent,
    "points": format_points,
    "short": format_short,
    "signature": format_signature,
    "spread": format_spread,
}
