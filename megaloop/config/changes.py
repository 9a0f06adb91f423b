"""What a configuration says of training that a saved one said otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megaloop.config.run import Config

__all__ = ["ChangedSetting", "changed_settings"]

_SHAPING = ("depth", "model", "optimizer", "schedule", "growth", "loop", "depth_events")
"""What decides the curve, and nothing else compares: seed, batch and data are compared by the place in the data, the learning rate by itself."""


@dataclass(frozen=True)
class ChangedSetting:
    """One setting that is another than it was.

    Attributes:
        key: dotted, as on a command line.
        before, now: as JSON has them; of a section that was empty or is, None.
    """

    key: str
    before: Any
    now: Any


def changed_settings(saved: Mapping[str, Any], config: Config) -> list[ChangedSetting]:
    """Settings that decide the curve and differ from those of a saved configuration, in the order of the sections.

    What the saved configuration does not have (an earlier version wrote it) counts as unchanged.

    Args:
        saved: as a manifest has it.
    """
    now = config.model_dump(mode="json")
    found = [change for section in _SHAPING for change in _changes(section, saved, now)]
    before = saved.get("train")
    if isinstance(before, Mapping):
        found += _changes("precision", before, now["train"], "train.")
    return found


def _changes(key: str, saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[ChangedSetting]:
    if key not in saved or saved[key] == now[key]:
        return
    before, after = saved[key], now[key]
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for inner in after:
            yield from _changes(inner, before, after, f"{prefix}{key}.")
    else:
        yield ChangedSetting(prefix + key, before, after)
