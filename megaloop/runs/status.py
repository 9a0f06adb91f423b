"""``megaloop status`` of a run on this machine: where it is and how to go on, read from its directory alone."""

from __future__ import annotations

import shlex
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaloop.checkpoint import list_checkpoints, step_of
from megaloop.config import Config, load_config
from megaloop.errors import MegaloopError
from megaloop.runs.directory import CONFIG, holder, is_locked, last_records
from megaloop.runs.doctor import State, state_of
from megaloop.runs.metrics import EVENTS, METRICS
from megaloop.runs.records import number, read_records, whole_number

__all__ = ["RunStatus", "local_status"]

_RECENT = 50
"""Steps from which the time that is left is estimated."""
_LONGEST_STEP = 1e7
"""Seconds."""


@dataclass(frozen=True)
class RunStatus:
    """Where a run is.

    Attributes:
        state: as of :class:`megaloop.runs.doctor.Diagnosis`.
        holder: the host and process of a run that is running.
        step, steps: optimizer steps done, and of the whole run (None: nothing says how many).
        loss: of the last step, nats per token.
        seconds_left: of training, at the speed of the last steps.
        restarts: how often the launcher started the ranks again in the last start.
        go_on: the command that goes on with the run; None where it is running or finished.
    """

    run: str
    state: State
    holder: str | None
    step: int
    steps: int | None
    loss: float | None
    seconds_left: float | None
    last_checkpoint: str | None
    restarts: int
    go_on: str | None


def local_status(run: Path) -> RunStatus:
    """Read a run's directory; nothing in it is changed, and it may be running.

    Raises:
        MegaloopError: there is no run, or its files cannot be read.
    """
    alive = is_locked(run)
    if not alive and not any((run / name).is_file() for name in (CONFIG, EVENTS, METRICS)):
        raise MegaloopError(
            f"{run}: no run; expected a directory with {CONFIG} and {METRICS} in it, or one that megaloop submit has put "
            "on a cluster"
        )
    config = load_config(run / CONFIG) if (run / CONFIG).is_file() else None
    events, records = list(read_records(run / EVENTS)), last_records(run, _RECENT)
    state = state_of(events, alive)
    start: dict[str, Any] = next((event for event in reversed(events) if event.get("event") == "start"), {})
    complete = list_checkpoints(run / "checkpoints")
    last: dict[str, Any] = records[-1] if records else {}
    step = whole_number(last, "step") or (step_of(complete[-1]) if complete else 0)
    steps = config.train.steps if config else None
    seconds = [each for record in records if (each := number(record, "seconds")) and 0 < each < _LONGEST_STEP]
    return RunStatus(
        run=str(run),
        state=state,
        holder=holder(run) if alive else None,
        step=step,
        steps=steps,
        loss=number(last, "loss"),
        seconds_left=max(statistics.median(seconds) * (steps - step), 0.0) if seconds and steps else None,
        last_checkpoint=complete[-1].name if complete else None,
        restarts=whole_number(start, "restarts") or 0,
        go_on=None if state in ("running", "finished") else _go_on(run, config, whole_number(start, "ranks")),
    )


def _go_on(run: Path, config: Config | None, ranks: int | None) -> str:
    command = ["megaloop", "train", str(run), "--resume"]
    if config is not None and ranks is not None and ranks != config.smallest_world:
        command += ["--ranks", str(ranks)]
    return shlex.join(command)
