"""What a sweep of learning rates found: ``lr_sweep.json`` of ``megaloop bench savings``, written by the bench and read by the report.

One object, with an entry for each contender::

    {"baseline": {"rates": {"0.001": 2.31, "0.002": 2.24, "0.004": null}, "chosen": 0.002, "edge": false, "tie": false,
                  "runs": {"0.001": {"1000": 2.3, "1001": 2.32}, ...}}}

``rates``: the last validation loss of the short runs at each learning rate, in nats per token, the mean over seeds; null: one
diverged. ``runs``: each seed's; there is one for each seed that is known, and a rate is in ``rates`` once all are. ``chosen``: the rate with
the lowest; null: some rates have not been trained yet. ``edge``: it is the lowest or the highest of the rates, so the best may lie
beyond them. ``tie``: another rate did as well, and the lower was taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

from megaloop.errors import MegaloopError
from megaloop.files import replace_file
from megaloop.runs.records import number, parse_record
from megaloop.text import parse_whole, printable

__all__ = ["LR_SWEEP", "RateSweep", "read_lr_sweep", "write_lr_sweep"]

LR_SWEEP = "lr_sweep.json"
_Key = TypeVar("_Key", int, float)
_KEYS = ("rates", "chosen", "edge", "tie")
_RUNS = "runs"
Runs = Mapping[float, Mapping[int, float | None]]
"""Losses by learning rate and seed; None: the run diverged."""


@dataclass(frozen=True)
class RateSweep:
    """A contender's sweep.

    Attributes:
        losses: by learning rate, in rising order: the last validation loss, nats per token, the mean over seeds; None: a run
            diverged.
        chosen: the rate with the lowest loss; None: the sweep is not over.
        edge: ``chosen`` is the lowest or the highest rate.
        tie: a higher rate did as well.
        runs: what each seed's run had.
    """

    losses: Mapping[float, float | None] = field(default_factory=dict)
    chosen: float | None = None
    edge: bool = False
    tie: bool = False
    runs: Runs = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", MappingProxyType(dict(sorted(self.losses.items()))))
        object.__setattr__(self, "runs", MappingProxyType({rate: dict(of) for rate, of in sorted(self.runs.items())}))

    @classmethod
    def over(cls, losses: Mapping[float, float | None], runs: Runs | None = None) -> Self:
        """A sweep that is over: the best rate is chosen, the lower of two that tie.

        Raises:
            ValueError: all rates diverged.
        """
        finite = {rate: loss for rate, loss in sorted(losses.items()) if loss is not None}
        best = min(finite.values())
        ties = [rate for rate, loss in finite.items() if loss == best]
        return cls(losses, ties[0], ties[0] in (min(losses), max(losses)), len(ties) > 1, runs or {})

    @property
    def text(self) -> str:
        """In a line: which rate was chosen, and how the others did."""
        losses = ", ".join(f"{rate:g}: {self.shown(rate)}" for rate in self.losses)
        if self.chosen is None:
            return f"no learning rate is chosen yet (validation losses: {losses or 'none'})"
        tie = "; a higher rate did as well" if self.tie else ""
        edge = "; it lies at the edge of the sweep, and the best may lie beyond" if self.edge else ""
        return f"learning rate {self.chosen:g} (validation losses: {losses}{tie}{edge})"

    def shown(self, rate: float) -> str:
        """What a rate gave: the loss, and of several seeds those that it is the mean of."""
        loss = self.losses[rate]
        each = [_loss(one) for one in self.runs.get(rate, {}).values()]
        return _loss(loss) + (f" ({', '.join(each)})" if len(each) > 1 else "")

    def to_json(self) -> dict[str, Any]:
        rates = {str(rate): loss for rate, loss in self.losses.items()}
        runs = {str(rate): {str(seed): loss for seed, loss in of.items()} for rate, of in self.runs.items()}
        values = {"rates": rates, "chosen": self.chosen, "edge": self.edge, "tie": self.tie}
        return values | ({_RUNS: runs} if runs else {})

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """What :meth:`to_json` gave.

        Raises:
            ValueError: it did not, with what is wrong.
        """
        if not isinstance(value, dict) or set(value) - {_RUNS} != set(_KEYS) or not isinstance(value["rates"], dict):
            raise ValueError(f"expected an object of {', '.join(_KEYS)}")
        losses = _losses(value["rates"], _rate)
        runs = value.get(_RUNS, {})
        if not isinstance(runs, dict) or not all(isinstance(of_rate, dict) for of_rate in runs.values()):
            raise ValueError(f"{_RUNS} is no object of objects")
        by_seed = {_rate(text): _losses(of_rate, _seed) for text, of_rate in runs.items()}
        chosen = value["chosen"]
        if chosen is not None and (number(value, "chosen") is None or losses.get(chosen) is None):
            raise ValueError("chosen is neither null nor a rate that has a loss")
        if not isinstance(value["edge"], bool) or not isinstance(value["tie"], bool):
            raise ValueError("edge and tie are not both true or false")
        return cls(losses, None if chosen is None else float(chosen), value["edge"], value["tie"], by_seed)


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def _losses(found: dict[str, Any], key_of: Callable[[str], _Key]) -> dict[_Key, float | None]:
    losses = {}
    for text, loss in found.items():
        key = key_of(text)
        if loss is not None and number(found, text) is None:
            raise ValueError(f"rate {printable(text, 40)}: the loss is neither a finite number nor null")
        losses[key] = None if loss is None else float(loss)
    return losses


def _seed(text: str) -> int:
    seed = parse_whole(text)
    if seed is None:
        raise ValueError(f"{printable(text, 40)} is no seed")
    return seed


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
