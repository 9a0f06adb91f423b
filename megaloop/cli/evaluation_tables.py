"""What ``megaloop eval`` prints."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from megaloop.cli.output import echo
from megaloop.terminal import SafeConsole
from megaloop.text import printable

if TYPE_CHECKING:
    from megaloop.evaluation.records import Record

__all__ = ["print_harness", "print_records"]


def print_records(records: list[Record], as_json: bool) -> None:
    values = [record.to_json() for record in records]
    if as_json:
        echo(json_module.dumps({"records": values}))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    settings = _settings(values)
    for name in ("task", *settings, "shots"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for name in ("accuracy", "exact match", "chance", "loss", "bits/byte"):
        table.add_column(name, justify="right")
    for value in values:
        if value.get("difficulty") is not None:
            continue
        shown = [_setting(value, name) for name in settings]
        if "loss" in value:
            bits = value.get("bits_per_byte")
            table.add_row(
                Text(printable(f"held out of {value['data']}")),
                *shown,
                *[""] * 4,
                _with_error(value["loss"], value.get("loss_stderr"), 4),
                "-" if bits is None else f"{bits:.4f}",
            )
            continue
        table.add_row(
            Text(printable(value["task"])),
            *shown,
            str(value["shots"]),
            *(_percent(value.get(name), value.get(f"{name}_stderr")) for name in ("accuracy", "exact_match")),
            _percent(value.get("chance"), None, digits=0),
        )
    console = SafeConsole(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if targeted := [value for value in values if value.get("last_accuracy") is not None]:
        console.print(_by_difficulty(targeted))
    if cached := [record for record in records if record.subject.cache != "full" and record.subject.difficulty is None]:
        console.print(_by_cache(cached, records))
    if any(value.get("loops_by_class") for value in values):
        console.print(_by_class(values))


def _settings(values: Sequence[dict[str, Any]]) -> list[str]:
    """What tells how models ran, besides their depth where that is not the same for all."""
    named = {
        "step": len({value["step"] for value in values}) > 1,
        "depth": True,
        "halt": any("halt" in value for value in values),
        "cache": any("cache" in value for value in values),
        "loops": any("loops_mean" in value for value in values),
    }
    return [name for name, has in named.items() if has]


def _setting(value: dict[str, Any], name: str) -> Text:
    if name == "loops":
        return Text(f"{value['loops_mean']:.2f}" if "loops_mean" in value else "all")
    return Text(printable(value.get(name, {"halt": "-", "cache": "full"}.get(name, ""))))


def _by_cache(cached: Sequence[Record], records: Sequence[Record]) -> Table:
    """What fewer caches cost, beside the memory that they save; against all of them, on the same questions and samples."""
    full = {record.subject: record for record in records}
    names = [name for name in _settings([record.to_json() for record in cached]) if name != "loops"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("fewer caches", *names, "accuracy", "loss", "bytes/token", "saved"):
        table.add_column(name, justify="left" if name == "fewer caches" else "right")
    for record in cached:
        value = record.to_json()
        plain = full[replace(record.subject, cache="full")].values
        title = f"held out of {value['data']}" if value["data"] else value["task"]
        table.add_row(
            Text(printable(title)),
            *(_setting(value, name) for name in names),
            _change(value, plain, "accuracy", 100, 1, " points"),
            _change(value, plain, "loss", 1, 4),
            f"{value['cache_bytes']:,}",
            f"{1 - value['cache_bytes'] / value['cache_bytes_full']:.0%}",
        )
    return table


def _change(value: dict[str, Any], plain: dict[str, Any], name: str, factor: int, digits: int, unit: str = "") -> str:
    if value.get(name) is None or plain.get(name) is None:
        return "-"
    return f"{factor * (value[name] - plain[name]):+.{digits}f}{unit}"


def _by_class(values: Sequence[dict[str, Any]]) -> Table:
    """Mean loops of the predictions of each kind of token."""
    halted = [value for value in values if value.get("loops_by_class")]
    names = [name for name in _settings(halted) if name != "loops"]
    classes = sorted({name for value in halted for name in value["loops_by_class"]})
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("loops for", *names, *map(printable, classes)):
        table.add_column(name, justify="left" if name == "loops for" else "right")
    for value in halted:
        found = value["loops_by_class"]
        table.add_row(
            Text(printable(value["data"])),
            *(_setting(value, name) for name in names),
            *(f"{found[name][0]:.2f}" if name in found else "-" for name in classes),
        )
    return table


def _by_difficulty(values: list[dict[str, Any]]) -> Table:
    """Accuracy on held-out samples with targets; the floor is what guessing by the statistics of the data scores."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    looped = any(value.get("block") for value in values)
    settings = _settings(values)
    at = settings.index("depth") + 1
    named = [*settings[: at - 1], "difficulty", "depth", *(["block"] if looped else []), *settings[at:]]
    for name in ("held out of", *named, "accuracy", "floor", "on the last", "floor", "loss"):
        table.add_column(name, justify="left" if name == "held out of" else "right")
    for value in values:
        own = {"difficulty": str(value.get("difficulty", "all")), "block": str(value.get("block") or "-")}
        table.add_row(
            Text(printable(value["data"])),
            *(Text(printable(own[name])) if name in own else _setting(value, name) for name in named),
            *(
                text
                for prefix in ("", "last_")
                for text in (
                    _percent(value.get(f"{prefix}accuracy"), value.get(f"{prefix}accuracy_stderr")),
                    _percent(value.get(f"{prefix}floor"), None),
                )
            ),
            _with_error(value["loss"], value.get("loss_stderr"), 4),
        )
    return table


def _percent(value: float | None, error: float | None, digits: int = 1) -> str:
    return "-" if value is None else _with_error(100 * value, None if error is None else 100 * error, digits) + " %"


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" if error is None else f"{value:.{digits}f} ± {error:.{digits}f}"


def print_harness(results: dict[str, Any], as_json: bool) -> None:
    if as_json:
        echo(json_module.dumps(results, default=str))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("task", "metric", "value", "standard error"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for task, values in results.items():
        for metric, value in values.items():
            name, _, form = metric.partition(",")
            if name.endswith("_stderr") or not isinstance(value, float):
                continue
            error = values.get(f"{name}_stderr,{form}")
            table.add_row(
                Text(printable(task)),
                Text(printable(name)),
                f"{value:.4f}",
                f"{error:.4f}" if isinstance(error, float) else "-",
            )
    SafeConsole().print(table)
