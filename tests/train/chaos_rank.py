"""A run that is killed at a chosen moment.

``python -m tests.train.chaos_rank ATTEMPT RANKS LOGS`` is the launcher, ``python -m tests.train.chaos_rank ATTEMPT`` a rank. ATTEMPT is a directory with ``attempt.json``: the run's configuration, whether to resume, and the kill. A rank that
reaches the moment leaves a file ``killed`` there, so that no death goes on its account that was another's doing.
Besides training, each rank notes which samples each of its steps took.
"""

from __future__ import annotations

from launchers.rank import follow_launcher

if __name__ == "__main__":
    follow_launcher()

import contextlib
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from launchers.rank import open_store, report_error

__all__ = ["KILLED", "Kill", "Kind", "after_first_save", "kill_plan", "missing_points", "prepare", "samples_of"]

Kind = Literal["save", "growth", "data", "start", "random"]

KILLED = 3
"""Exit code of a launcher whose rank was killed."""
_PATIENCE = 120
"""Seconds after which a rank that hangs ends itself, and with it the test."""


@dataclass(frozen=True)
class _Point:
    """A function of megaloop: the moment is before or after one of its first ``most`` calls on a rank."""

    module: str
    name: str
    most: int = 1
    after: bool = False
    resumed: bool = False
    """Only a run that goes on from a checkpoint comes past it."""
    thread: str | None = None
    """Only calls in this thread count: the function is not megaloop's own."""


_POINTS: dict[str, tuple[_Point, ...]] = {
    "save": (
        _Point("checkpoint.background", "HostCopy.copy", 3),
        _Point("checkpoint.background", "HostCopy.copy", 3, after=True),
        _Point("checkpoint.background", "save_checkpoint", 3),
        _Point("checkpoint.background", "save_checkpoint", 3, after=True),
        _Point("checkpoint.writer", "_begin", 2, after=True),
        _Point("checkpoint.tensor_file", "_content", 100),  # in the middle of a file
        _Point("checkpoint.tensor_file", "_content", 100),
        _Point("checkpoint.writer", "write_tensors", 4, after=True),
        _Point("checkpoint.writer", "encode_manifest", 2),
        _Point("checkpoint.writer", "fsync_path", 10),  # of five a save, the last after the checkpoint has its name
        _Point("checkpoint.writer", "fsync_path", 10, after=True),
        _Point("checkpoint.writer", "_publish", 2),
        _Point("checkpoint.writer", "_publish", 2, after=True),
        _Point("train.saving", "prune", 2),
        _Point("train.saving", "prune", 2, after=True),
        _Point("checkpoint.resolve", "remove_checkpoint"),
        _Point("checkpoint.resolve", "shutil.rmtree", thread="megaloop-save"),  # the manifest is gone, the rest is there
        _Point("checkpoint.resolve", "shutil.os.rmdir", thread="megaloop-save"),  # in the middle of a deletion
        _Point("checkpoint.background", "BackgroundSaver.collect", 2),
        _Point("train.saving", "Saver.finish"),
        _Point("train.saving", "Saved", 2),  # the checkpoint is whole, and its event is not written
        _Point("runs.sinks", "Hub.event", 4, after=True),
    ),
    "growth": (
        _Point("train.loop", "reshard", 2),
        _Point("train.loop", "reshard", 2, after=True),
        _Point("parallel.live", "TrainingEngine"),
        _Point("parallel.live", "TrainingEngine", after=True),
        _Point("parallel.live", "transfers", after=True),
        _Point("parallel.live", "exchange"),
        _Point("parallel.live", "exchange", after=True),
        _Point("parallel.exchange", "_copy", 40),
        _Point("parallel.exchange", "dist.batch_isend_irecv"),
        _Point("train.report", "RunReporter.grown"),
        _Point("train.report", "RunReporter.grown", after=True),
    ),
    "data": (
        _Point("data.loader", "BatchLoader._read", 40),  # in the thread that reads ahead
        _Point("data.loader", "BatchLoader._read", 40, after=True),
        _Point("data.loader", "BatchLoader.__next__", 30),
        _Point("data.loader", "BatchLoader.__next__", 30, after=True),
        _Point("data.loader", "BatchLoader.close"),
        _Point("train.report", "RunReporter.stepped", 8),  # the samples are used, the metrics not written
        _Point("train.report", "RunReporter.stepped", 8, after=True),
    ),
    "start": (
        _Point("runs.directory", "RunDirectory.create_or_open"),
        _Point("runs.directory", "replace_file"),
        _Point("runs.directory", "RunDirectory.resume_at", resumed=True),
        _Point("runs.directory", "RunDirectory.resume_at", after=True, resumed=True),
        _Point("train.loop", "open_sources", after=True),
        _Point("train.loop", "starting_point"),
        _Point("train.loop", "starting_point", after=True),
        _Point("checkpoint.reader", "Checkpoint.verify", resumed=True),
        _Point("checkpoint.reader", "Checkpoint.verify", after=True, resumed=True),
        _Point("checkpoint.reader", "Checkpoint.read_piece", 40, resumed=True),
        _Point("train.loop", "TrainingEngine"),
        _Point("train.loop", "TrainingEngine", after=True),
        _Point("train.report", "RunReporter.begins", after=True),
    ),
}  # fmt: skip
_DELAYS: dict[str, tuple[float, float]] = {"start": (0.0, 0.3), "random": (0.2, 2.5)}
"""Seconds from a process's start on in which a moment may lie that no function marks."""


@dataclass(frozen=True)
class Kill:
    """What dies when.

    Attributes:
        kind: of moment.
        victims: the rank that gets there, or it and all others.
        rank: that dies by the clock; None: whichever gets to the point first.
        point: index into the points of the kind; None: after ``delay`` seconds.
        call: before or after which call.
    """

    kind: Kind
    victims: Literal["one", "all"]
    rank: int | None
    point: int | None
    call: int = 0
    delay: float = 0.0

    @property
    def needs_checkpoint(self) -> bool:
        """The moment does not come in a run that begins anew."""
        return self.point is not None and _POINTS[self.kind][self.point].resumed

    def __str__(self) -> str:
        if self.point is None:
            moment = f"{self.delay:.2f} s after its start"
        else:
            point = _POINTS[self.kind][self.point]
            moment = f"{'after' if point.after else 'before'} call {self.call} of {point.name}"
        who = "a rank" if self.rank is None else f"rank {self.rank}"
        return f"{self.kind}: {who}{' and all others' * (self.victims == 'all')}, {moment}"


def _find(point: _Point) -> tuple[Any, str]:
    """The module or class that has a point's function, and its name there."""
    owner: Any = importlib.import_module(f"megaloop.{point.module}")
    *path, name = point.name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, name


def missing_points() -> list[str]:
    """Points that no call can come past, as megaloop has no such function; none."""
    found = {f"{point.module}.{point.name}": _find(point) for points in _POINTS.values() for point in points}
    return [point for point, (owner, name) in found.items() if not callable(getattr(owner, name, None))]


def kill_plan(count: int, seed: int, ranks: int) -> list[Kill]:
    """Random kills, the same for the same seed, all kinds of them in turn."""
    chance = random.Random(seed)
    kinds = get_args(Kind)
    return [_draw(chance, kinds[number % len(kinds)], ranks) for number in range(count)]


def _draw(chance: random.Random, kind: Kind, ranks: int) -> Kill:
    victims: Literal["one", "all"] = "all" if chance.random() < 0.4 else "one"
    if kind not in _POINTS or (kind == "start" and chance.random() < 0.3):
        return Kill(kind, victims, chance.randrange(ranks), None, delay=chance.uniform(*_DELAYS[kind]))
    index = chance.randrange(len(_POINTS[kind]))
    call = chance.randint(1, _POINTS[kind][index].most)
    return Kill(kind, victims, None, index, call)


def after_first_save() -> Kill:
    """All ranks, once there is a checkpoint."""
    names = [(point.name, point.after) for point in _POINTS["save"]]
    return Kill("save", "all", None, names.index(("prune", True)), 1)


def prepare(attempt: Path, values: dict[str, Any], resume: bool, kill: Kill | None) -> None:
    """Write down an attempt."""
    attempt.mkdir(parents=True)
    task = {"values": values, "resume": resume, "kill": None if kill is None else asdict(kill)}
    (attempt / "attempt.json").write_text(json.dumps(task))


def samples_of(run: Path, ranks: int) -> list[dict[int, list[int]]]:
    """By rank, the samples that each step took.

    Steps that were rolled back are there again; they must have taken the same, and count once.
    """
    found: list[dict[int, list[int]]] = []
    for rank in range(ranks):
        steps: dict[int, list[int]] = {}
        for line in _samples_file(run, rank).read_text().splitlines():
            step, samples = json.loads(line)
            assert steps.setdefault(step, samples) == samples, f"step {step} took other samples the second time"
        found.append(steps)
    return found


def _samples_file(run: Path, rank: int) -> Path:
    return run / f"samples-{rank}.jsonl"


class _Killer:
    """Waits for the moment."""

    def __init__(self, kill: Kill, attempt: Path) -> None:
        self._kill, self._attempt = kill, attempt
        self._rank = int(os.environ["RANK"])
        self._calls = 0

    def start_clock(self) -> None:
        """For kills that no function marks."""
        if self._kill.point is None and self._kill.rank == self._rank:
            threading.Thread(target=self._wait, daemon=True).start()

    def install(self) -> None:
        """For those that one marks."""
        if self._kill.point is None:
            return
        point = _POINTS[self._kill.kind][self._kill.point]
        owner, name = _find(point)
        plain = owner.__dict__[name]
        function = plain.__func__ if isinstance(plain, classmethod) else plain

        def counting(*arguments: Any, **options: Any) -> Any:
            if point.thread in (None, threading.current_thread().name):
                self._calls += 1
            now = self._calls == self._kill.call
            if now and not point.after:
                self._strike()
            result = function(*arguments, **options)
            if now:
                self._strike()
            return result

        setattr(owner, name, classmethod(counting) if isinstance(plain, classmethod) else counting)

    def _wait(self) -> None:
        time.sleep(self._kill.delay)
        self._strike()

    def _strike(self) -> None:
        (self._attempt / "killed").touch()
        if self._kill.victims == "all":
            for path in self._attempt.glob("pid-*"):
                if path.name != f"pid-{self._rank}":
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(path.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def _record_samples(run: Path) -> None:
    """Note the samples of each step right before its metrics are written."""
    import megaloop.train.loop as loop
    from megaloop.data import BatchLoader, MicroBatch
    from megaloop.train.report import RunReporter

    taken: list[int] = []
    stepped = RunReporter.stepped
    file = os.open(_samples_file(run, int(os.environ["RANK"])), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    class Recording(BatchLoader):
        def __next__(self) -> MicroBatch:
            batch = super().__next__()
            taken.extend(batch.sample_ids)
            return batch

    def noting(reporter: RunReporter, at: Any, *arguments: Any) -> None:
        os.write(file, json.dumps([at.step, taken]).encode() + b"\n")
        taken.clear()
        stepped(reporter, at, *arguments)

    loop.BatchLoader = Recording  # type: ignore[attr-defined]
    RunReporter.stepped = noting  # type: ignore[method-assign, assignment]


def _launch(attempt: str, ranks: str, logs: str) -> None:
    from launchers.local import RankFailed, launch
    from megaloop.errors import MegaloopError

    try:
        launch([sys.executable, "-m", "tests.train.chaos_rank", attempt], int(ranks), Path(logs), grace=5.0)
    except (RankFailed, MegaloopError) as error:
        print(error, file=sys.stderr)
        sys.exit(KILLED if isinstance(error, RankFailed) else 2)


def main() -> None:
    if len(sys.argv) > 2:
        _launch(*sys.argv[1:])
        return
    attempt = Path(sys.argv[1])
    task = json.loads((attempt / "attempt.json").read_text())
    signal.alarm(_PATIENCE)
    pid = attempt / f"pid-{os.environ['RANK']}"
    written = pid.with_name(f".{pid.name}")
    written.write_text(str(os.getpid()))
    written.rename(pid)
    killer = None if task["kill"] is None else _Killer(Kill(**task["kill"]), attempt)
    if killer:
        killer.start_clock()
    store = open_store()
    from megaloop.config import Config
    from megaloop.errors import MegaloopError
    from megaloop.train.loop import run

    config = Config.model_validate(task["values"])
    _record_samples(attempt.parent)
    if killer:
        killer.install()
    try:
        run(config, resume=task["resume"])
    except MegaloopError as error:
        report_error(str(error))
        os._exit(2)
    del store


if __name__ == "__main__":
    main()
