"""What growing and looping save: contenders trained side by side on the same samples, evaluated, and reported.

Each contender with each seed is a run of its own, in a directory of its own, trained by ``megaloop train`` and
evaluated by ``megaloop eval`` in processes of their own. Everything is resumable: what is there is not done again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megaloop.bench.contenders import contender, total_flops
from megaloop.bench.reasoning import LadderEvaluation
from megaloop.checkpoint import list_checkpoints, step_of
from megaloop.config import Config
from megaloop.errors import CONTINUE, MegaloopError
from megaloop.files import replace_file
from megaloop.runs.directory import last_records
from megaloop.runs.metrics import EVENTS
from megaloop.runs.records import read_records

__all__ = ["Evaluation", "Job", "Plan", "Runner", "prepare_jobs", "write_config"]

_PLAN = "savings.json"
_REFUSED = 2
"""The exit code of a command that ends with a MegaloopError."""
_LOOK_EVERY = 3.0
"""Seconds between two looks at the metrics of runs under way."""
State = Literal["waiting", "training", "evaluating", "done", "diverged", "failed"]


@dataclass(frozen=True)
class Evaluation:
    """How runs are evaluated.

    Attributes:
        examples: of each primitive.
        shots: numbers of shots, at the depth that was trained.
        loops: how often the middle block runs, with five shots (or the most that ``shots`` has).
        samples: held-out samples of each data set.
    """

    examples: int = 400
    shots: tuple[int, ...] = (0, 2, 5)
    loops: tuple[int, ...] = (1, 2, 3)
    samples: int = 64

    def commands(self, config: Config) -> list[list[str]]:
        """Arguments of ``megaloop eval`` for a run."""
        shared = ["--examples", str(self.examples), "--samples", str(self.samples), "--tasks", "primitives,validation"]
        trained = config.stages[-1].plan.loop
        loops = sorted({*self.loops, trained.iterations if trained else 1})
        most = max((count for count in self.shots if count <= 5), default=max(self.shots))
        return [
            [*shared, "--shots", ",".join(map(str, self.shots))],
            [*shared, "--shots", str(most), "--loops", ",".join(map(str, loops))],
        ]


@dataclass(frozen=True)
class Plan:
    """What a bench's directory holds; resuming it with another is refused.

    Attributes:
        config: the full-depth configuration, as resolved.
        vocab_size: rows of the embedding.
        lr_sweep: rates and steps of the sweep of learning rates; None: there is none.
    """

    config: dict[str, Any]
    vocab_size: int
    lr_sweep: dict[str, Any] | None = None

    @staticmethod
    def is_kept(directory: Path) -> bool:
        """Whether a directory holds a bench: until then nothing has been trained there."""
        return (directory / _PLAN).exists()

    def keep(self, directory: Path) -> None:
        """Write it down, or check it against what was written.

        Raises:
            MegaloopError: the directory holds a bench of another configuration.
        """
        file, values = directory / _PLAN, asdict(self)
        if self.lr_sweep is None:  # as benches without a sweep have always been written down
            del values["lr_sweep"]
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            directory.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(values, indent=1).encode())
            return
        except (OSError, ValueError):
            raise MegaloopError(f"bench savings: {file} cannot be read; choose another --out") from None
        if found != values:
            different = _first_difference(found, values)
            raise MegaloopError(
                f"bench savings: {directory} holds contenders of another configuration ({different}); "
                "choose another --out, or go on with the same"
            )


def _first_difference(found: Any, wanted: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in [*found, *(key for key in wanted if key not in found)]:
            if found.get(key) != wanted.get(key):
                return _first_difference(found.get(key), wanted.get(key), f"{where}.{key}" if where else key)
    return f"{where.removeprefix('config.')} was {found}, is {wanted}"


@dataclass
class Job:
    """One run, trained and then evaluated.

    Attributes:
        name: of contender and seed.
        steps: of the whole run.
        seed, flops: of the whole run; dear runs begin first, so that none is left to run alone at the end.
        may_diverge: that it diverges is an answer too, and not the end of the bench.
        done: steps done.
        state: what is going on.
        seconds: spent so far by processes of this command.
    """

    name: str
    config: Path
    run: Path
    steps: int
    seed: int
    flops: int
    evaluations: list[list[str]]
    may_diverge: bool = False
    state: State = "waiting"
    done: int = 0
    seconds: float = 0.0
    began: float = field(default=0.0, repr=False)

    def trained(self) -> bool:
        """The run has a checkpoint of its last step."""
        complete = list_checkpoints(self.run / "checkpoints")
        return bool(complete) and step_of(complete[-1]) == self.steps

    @property
    def is_over(self) -> bool:
        """Nothing is left to do."""
        return self.state in ("done", "diverged")

    def has_diverged(self) -> bool:
        """It ended where it was to roll back once more than ``faults.max_rollbacks`` allows; any other error is recorded as one."""
        events = [event for event in read_records(self.run / EVENTS) if event.get("event") in ("start", "stop")]
        return bool(events) and events[-1].get("reason") == "rollback"

    def look(self) -> None:
        """How far the run is."""
        records = last_records(self.run, 1) if (self.run / "metrics.jsonl").is_file() else []
        self.done = int(records[-1]["step"]) if records else 0


def write_config(config: Config, directory: Path) -> Path:
    """The file of a run's configuration in a bench's directory, as ``megaloop train`` takes it."""
    folder = directory / "configs"
    folder.mkdir(exist_ok=True)
    file = folder / f"{config.name}.yaml"
    replace_file(file, config.to_yaml().encode())
    return file


def prepare_jobs(
    config: Config,
    vocab_size: int,
    directory: Path,
    *,
    contenders: Sequence[str],
    seeds: int,
    evaluation: Evaluation | LadderEvaluation,
    rates: Mapping[str, float] | None = None,
) -> list[Job]:
    """Write the configuration of each run, and say what is to be done; one seed of all contenders before the next.

    Args:
        rates: the peak learning rate of each contender; default: the configuration's for all.

    Raises:
        MegaloopError: as :func:`megaloop.bench.contenders.contender`.
    """
    jobs = []
    for seed in range(config.seed, config.seed + seeds):
        for name in dict.fromkeys(contenders):
            run, lr = directory / "runs" / f"{name}-seed{seed}", None if rates is None else rates[name]
            made = contender(config, name, vocab_size, seed=seed, lr=lr, directory=run)
            file, flops = write_config(made, directory), total_flops(made, vocab_size)
            jobs.append(Job(made.name, file, run, made.train.steps, seed, flops, evaluation.commands(made)))
    return jobs


class Runner:
    """Works off jobs, several at a time.

    Args:
        jobs: what to do.
        at_once: processes at a time.
        directory: output of the processes goes to its ``logs``.
        limit: seconds after which runs are asked to save and end; None: none.
        environment: of the processes, beside this one's.
        on_change: called now and then, and whenever a job's state changes.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        at_once: int,
        directory: Path,
        *,
        limit: float | None = None,
        environment: Mapping[str, str] | None = None,
        on_change: Callable[[Sequence[Job]], None] | None = None,
    ):
        self.jobs, self._at_once, self._directory = jobs, at_once, directory
        self._deadline = None if limit is None else time.monotonic() + limit
        self._on_change = on_change or (lambda _: None)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._looked = 0.0
        self._left: dict[str, list[list[str]]] = {}
        threads = max((os.cpu_count() or 1) // at_once, 1)
        self._environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **(environment or {})}

    def run(self) -> bool:
        """Do it all.

        Returns:
            Whether everything is done; False: the time was up, and what was under way has been saved.

        Raises:
            MegaloopError: a process failed; the others were ended, those that train after saving.
        """
        waiting = sorted(self.jobs, key=lambda job: (job.seed, -job.flops))
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._at_once:
                    self._begin(waiting.pop(0))
                self._on_change(self.jobs)
                time.sleep(0.2)
                self._collect()
                if self._deadline is not None and time.monotonic() > self._deadline:
                    self._end()
                    return False
        except BaseException:
            self._end()
            raise
        self._on_change(self.jobs)
        return True

    def _begin(self, job: Job) -> None:
        train = ["train", str(job.config), "--resume", "--ranks", "1"]
        todo = [] if job.trained() else [train]
        self._left[job.name] = todo + [["eval", str(job.run), *arguments] for arguments in job.evaluations]
        job.began = time.monotonic()
        if self._left[job.name]:
            self._next(job)
        else:
            job.look()
            job.state = "done"

    def _next(self, job: Job) -> None:
        arguments = self._left[job.name].pop(0)
        job.state = "training" if arguments[0] == "train" else "evaluating"
        logs = self._directory / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"{job.name}.log").open("ab") as log:
            self._running[job.name] = subprocess.Popen(
                [sys.executable, "-m", "megaloop", *arguments],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches us; we ask them to save
            )

    def _collect(self) -> None:
        for job in self.jobs:
            process = self._running.get(job.name)
            if process is None:
                continue
            job.seconds = time.monotonic() - job.began
            if time.monotonic() - self._looked > _LOOK_EVERY:
                job.look()
            code = process.poll()
            if code is None:
                continue
            del self._running[job.name]
            job.look()
            if code == _REFUSED and job.may_diverge and job.has_diverged():
                job.state = "diverged"
            elif code != 0:
                job.state = "failed"
                log = self._directory / "logs" / f"{job.name}.log"
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                raise MegaloopError(f"bench savings: {job.name} failed with exit code {code}: {' '.join(last)} ({log})")
            elif self._left[job.name]:
                self._next(job)
            else:
                job.state = "done"
            self._on_change(self.jobs)
        if time.monotonic() - self._looked > _LOOK_EVERY:
            self._looked = time.monotonic()

    def _end(self) -> None:
        """Ask what runs to save and end, and wait for it."""
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)
        for name, process in self._running.items():
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.returncode in (0, CONTINUE):
                next(job for job in self.jobs if job.name == name).look()
        self._running.clear()
