"""What a sweep of learning rates found: ``lr_sweep.json`` of ``megaloop bench savings``, written by the bench and read by the report.

One object, with an entry for each contender::

    {"baseline": {"rates": {"0.001": 2.31, "0.002": 2.24, "0.004": null}, "chosen": 0.002, "edge": false, "tie": false}}

``rates``: the last validation loss of the short run at each learning rate, in nats per token; null: it diverged. ``chosen``: the rate with
the lowest; null: some rates have not been trained yet. ``edge``: it is the lowest or the highest of the rates, so the best may lie
beyond them. ``tie``: another rate did as well, and the lower was taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from megaloop.errors import MegaloopError
from megaloop.files import replace_file
from megaloop.runs.records import number, parse_record
from megaloop.text import printable

__all__ = ["LR_SWEEP", "RateSweep", "read_lr_sweep", "write_lr_sweep"]

LR_SWEEP = "lr_sweep.json"
_KEYS = ("rates", "chosen", "edge", "tie")


@dataclass(frozen=True)
class RateSweep:
    """A contender's sweep.

    Attributes:
        losses: by learning rate, in rising order: the last validation loss, nats per token; None: the run diverged.
        chosen: the rate with the lowest loss; None: the sweep is not over.
        edge: ``chosen`` is the lowest or the highest rate.
        tie: a higher rate did as well.
    """

    losses: Mapping[float, float | None] = field(default_factory=dict)
    chosen: float | None = None
    edge: bool = False
    tie: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", MappingProxyType(dict(sorted(self.losses.items()))))

    @classmethod
    def over(cls, losses: Mapping[float, float | None]) -> Self:
        """A sweep that is over: the best rate is chosen, the lower of two that tie.

        Raises:
            ValueError: all rates diverged.
        """
        finite = {rate: loss for rate, loss in sorted(losses.items()) if loss is not None}
        best = min(finite.values())
        ties = [rate for rate, loss in finite.items() if loss == best]
        return cls(losses, ties[0], ties[0] in (min(losses), max(losses)), len(ties) > 1)

    @property
    def text(self) -> str:
        """In a line: which rate was chosen, and how the others did."""
        losses = ", ".join(
            f"{rate:g}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in self.losses.items()
        )
        if self.chosen is None:
            return f"no learning rate is chosen yet (validation losses: {losses or 'none'})"
        tie = "; a higher rate did as well" if self.tie else ""
        edge = "; it lies at the edge of the sweep, and the best may lie beyond" if self.edge else ""
        return f"learning rate {self.chosen:g} (validation losses: {losses}{tie}{edge})"

    def to_json(self) -> dict[str, Any]:
        rates = {str(rate): loss for rate, loss in self.losses.items()}
        return {"rates": rates, "chosen": self.chosen, "edge": self.edge, "tie": self.tie}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """What :meth:`to_json` gave.

        Raises:
            ValueError: it did not, with what is wrong.
        """
        if not isinstance(value, dict) or set(value) != set(_KEYS) or not isinstance(value["rates"], dict):
            raise ValueError(f"expected an object of {', '.join(_KEYS)}")
        losses = {}
        for text, loss in value["rates"].items():
            rate = _rate(text)
            if loss is not None and number(value["rates"], text) is None:
                raise ValueError(f"rate {printable(text, 40)}: the loss is neither a finite number nor null")
            losses[rate] = None if loss is None else float(loss)
        chosen = value["chosen"]
        if chosen is not None and (number(value, "chosen") is None or losses.get(chosen) is None):
            raise ValueError("chosen is neither null nor a rate that has a loss")
        if not isinstance(value["edge"], bool) or not isinstance(value["tie"], bool):
            raise ValueError("edge and tie are not both true or false")
        return cls(losses, None if chosen is None else float(chosen), value["edge"], value["tie"])


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"{printable(text, 40)} is no learning rate")
    return rate


def read_lr_sweep(directory: Path) -> dict[str, RateSweep]:
    """What the sweep of a bench in ``directory`` has found, by contender; empty: there was none.

    Raises:
        MegaloopError: the file cannot be read, or is not what the bench writes.
    """
    file = directory / LR_SWEEP
    try:
        record = parse_record(file.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise MegaloopError(f"{file}: cannot be read ({error.strerror or error})") from None
    if record is None:
        raise MegaloopError(f"{file}: no object of JSON; remove it, and the sweep is read from its runs again")
    found = {}
    for name, value in record.items():
        try:
            found[name] = RateSweep.from_json(value)
        except ValueError as error:
            raise MegaloopError(
                f"{file}: {printable(name, 40)}: {error}; remove the file, and the sweep is read from its runs again"
            ) from None
    return found


def write_lr_sweep(directory: Path, found: Mapping[str, RateSweep]) -> None:
    """Write what :func:`read_lr_sweep` reads.

    Raises:
        MegaloopError: it cannot be written.
    """
    file, values = directory / LR_SWEEP, {name: sweep.to_json() for name, sweep in found.items()}
    try:
        replace_file(file, json.dumps(values, indent=1, allow_nan=False).encode())
    except OSError as error:
        raise MegaloopError(f"{file}: cannot be written ({error.strerror or error})") from None
