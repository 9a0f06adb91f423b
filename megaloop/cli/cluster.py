"""Commands that put a run on a Slurm cluster, look at it there, and take it away. See docs/SLURM.md."""

from __future__ import annotations

import json as json_format
import os
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from megaloop.cli import runs as run_commands
from megaloop.cli.output import echo
from megaloop.errors import MegaloopError
from megaloop.runs.allow import AllowOption, allow_arguments
from megaloop.runs.records import number, read_records, text, whole_number
from megaloop.terminal import SafeConsole
from megaloop.text import printable

if TYPE_CHECKING:
    from megaloop.config import Config

__all__ = ["cancel", "status", "submit"]

SUBMITTED = "submitted.yaml"
_JOBS, _HISTORY = "slurm/jobs.jsonl", "slurm/history.jsonl"
_QUEUED = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "SIGNALING",
    "STOPPED",
}
_LARGEST_JOB, _MOST_JOBS = 2**31 - 1, 1000
_PANEL = "What Slurm is asked for"

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, for example runs/demo.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def _asked(help: str, metavar: str | None = None, **options: Any) -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel=_PANEL, **options)


def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override configuration values.")
    ] = None,
    nodes: Annotated[int | None, _asked("Nodes.", min=1)] = None,
    gpus_per_node: Annotated[int, _asked("GPUs of each node; one rank each.", min=0)] = 0,
    tasks_per_node: Annotated[int | None, _asked("Ranks per node, where it is not one per GPU.", min=1)] = None,
    cpus_per_task: Annotated[int | None, _asked("Cores of each rank.", min=1)] = None,
    time: Annotated[str | None, _asked("Time limit, as Slurm takes it: 4:00:00, 1-12.", "TIME")] = None,
    partition: Annotated[str | None, _asked("Partition.", "NAME")] = None,
    account: Annotated[str | None, _asked("Account.", "NAME")] = None,
    qos: Annotated[str | None, _asked("Quality of service.", "NAME")] = None,
    constraint: Annotated[str | None, _asked("Features that nodes must have.", "LIST")] = None,
    exclusive: Annotated[bool, _asked("Whole nodes.")] = False,
    dependency: Annotated[str | None, _asked("Wait for another job: afterok:123.", "LIST")] = None,
    container: Annotated[str | None, _asked("Image in which ranks run.", "IMAGE")] = None,
    env_file: Annotated[
        Path | None, _asked("NAME=VALUE lines, exported to the ranks; read when the job runs.", "FILE")
    ] = None,
    site: Annotated[str, typer.Option(help="Site: a name of launchers/sites, or a YAML file.")] = "default",
    template: Annotated[Path | None, typer.Option(metavar="FILE", help="Another template of the job script.")] = None,
    chain: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="A job per growth stage, with that number of nodes each, one after the other."
        ),
    ] = None,
    signal_before: Annotated[
        int,
        typer.Option(min=1, metavar="SECONDS", help="Save so long before the time limit, and go back into the queue."),
    ] = 120,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Failures without a new checkpoint in between until the job gives up.")
    ] = 3,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that the directory holds.")] = False,
    allow: AllowOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the job script; submit and write nothing.")] = False,
    json: Json = False,
) -> None:
    """Put a run on a Slurm cluster: it saves before its time limit, requeues itself and goes on, until it is done."""
    from launchers.slurm_script import TEMPLATE, JobOptions, job_script, load_site, read_environment_file
    from megaloop.config import load_config

    configuration = load_config(config, overrides or [])
    if (nodes is None) == (chain is None):
        raise MegaloopError("say --nodes N, or --chain N,N,... with the nodes of each growth stage")
    tasks = tasks_per_node or gpus_per_node
    if not tasks:
        raise MegaloopError("say --gpus-per-node G (one rank per GPU), or --tasks-per-node T to train on CPUs")
    stages = _stages(configuration, chain, nodes, tasks)
    run = configuration.directory.resolve()
    if env_file is not None:
        read_environment_file(env_file)  # what is wrong with it shows now, not when the job runs
    settings = load_site(site)
    scripts = []
    for index, stage in enumerate(stages):
        options = JobOptions(
            nodes=stage.nodes, tasks_per_node=tasks, gpus_per_node=gpus_per_node, cpus_per_task=cpus_per_task,
            time=time, partition=partition, account=account, qos=qos, constraint=constraint, container=container,
            exclusive=exclusive, dependency=_AFTER if index else dependency, signal_before=signal_before,
            max_restarts=max_restarts, env_file=env_file,
        )  # fmt: skip
        options.check()
        stop = ["--stop-at", str(stage.stop_at)] if stage.stop_at is not None else []
        arguments = ["megaloop", "train", str(run / SUBMITTED), "--resume", *stop, *allow_arguments(allow)]
        name = configuration.name if len(stages) == 1 else f"{configuration.name}-{index + 1}"
        scripts.append(
            job_script(
                options,
                settings,
                name=name,
                run=run,
                directory=Path.cwd(),
                arguments=arguments,
                template=template or TEMPLATE,
            )
        )
    if dry_run:
        typer.echo("\n".join(scripts), nl=False)  # as it is: it may be piped on
        return
    _check_free(run, resume)
    try:
        (run / "slurm").mkdir(parents=True, exist_ok=True)
        pinned = configuration.model_copy(update={"run_dir": run})
        (run / SUBMITTED).write_text(pinned.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise MegaloopError(f"run directory {run}: cannot be written ({error.strerror})") from None
    _submit_all(run, stages, scripts)
    if json:
        echo(json_format.dumps({"run": str(run), "jobs": [asdict(stage) for stage in stages]}, indent=2))
        return
    for stage in stages:
        until = f", until step {stage.stop_at}" if stage.stop_at is not None else ""
        echo(f"job {stage.job}: {stage.nodes} node{'s' if stage.nodes > 1 else ''}, {stage.ranks} ranks{until}")
    echo(f"log: {run}/slurm/job-{stages[0].job}.log   state: megaloop status {run}   end it: megaloop cancel {run}")


_AFTER = "afterok:@JOB@"


@dataclass
class _Stage:
    """One job of a run: its size, and the step at which it hands over (None: the run's end)."""

    nodes: int
    ranks: int
    stop_at: int | None = None
    job: int = 0


def _stages(config: Config, chain: str | None, nodes: int | None, tasks: int) -> list[_Stage]:
    if chain is None:
        assert nodes is not None
        config.check_world(nodes * tasks)
        return [_Stage(nodes, nodes * tasks)]
    if not re.fullmatch(r"[1-9][0-9]{0,5}(,[1-9][0-9]{0,5})*", chain):
        raise MegaloopError(
            f"--chain {printable(chain, 60)}: expected a number of nodes for each growth stage, for example 1,1,2"
        )
    counts = [int(number) for number in chain.split(",")]
    if len(counts) != len(config.stages):
        have = ", ".join(f"{stage.plan.layers} layers until step {stage.stop}" for stage in config.stages)
        raise MegaloopError(
            f"--chain {chain} has {len(counts)} jobs, but the run has {len(config.stages)} stages ({have}); give one number for each"
        )
    jobs = []
    for count, stage in zip(counts, config.stages, strict=True):
        config.check_world(count * tasks, stage.first_step, stage.stop)
        jobs.append(_Stage(count, count * tasks, None if stage is config.stages[-1] else stage.stop))
    return jobs


def _check_free(run: Path, resume: bool) -> None:
    """Refuse a directory that holds a run already, or whose job is still with Slurm."""
    from megaloop.runs.directory import RunDirectory

    waiting = [job for job, state in _states(list(_jobs(run))).items() if state["state"] in _QUEUED]
    if waiting:
        raise MegaloopError(
            f"run directory {run}: job {', '.join(map(str, waiting))} of this run is still with Slurm; "
            f"megaloop cancel {run}, or choose another run_dir"
        )
    if not resume and (step := RunDirectory(run, None).last_step()) is not None:
        raise MegaloopError(
            f"run directory {run} already holds a run at step {step}; add --resume or choose another run_dir"
        )


def _submit_all(run: Path, stages: list[_Stage], scripts: list[str]) -> None:
    """sbatch each script, each after the one before, and record the jobs; all or none."""
    try:
        for index, (stage, script) in enumerate(zip(stages, scripts, strict=True)):
            after = script.replace(_AFTER, f"afterok:{stages[index - 1].job}") if index else script
            path = run / f"slurm/stage-{index + 1}.sbatch"
            path.write_text(after, encoding="utf-8")
            stage.job = int(_slurm("sbatch", "--parsable", str(path)).split(";")[0])
        _record_jobs(run / _JOBS, stages)
    except BaseException as error:
        submitted = [str(stage.job) for stage in stages if stage.job]
        if submitted:
            _slurm("scancel", *submitted)
        if isinstance(error, OSError):
            raise MegaloopError(f"run directory {run}: cannot be written ({error.strerror})") from None
        raise


def _record_jobs(path: Path, stages: list[_Stage]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    lines = "".join(json_format.dumps({"time": now} | asdict(stage)) + "\n" for stage in stages)
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        incomplete = file.read(1) not in (b"", b"\n")  # a line that a full disk cut off must not swallow the next
        file.write((b"\n" if incomplete else b"") + lines.encode())


def _slurm(program: str, *arguments: str) -> str:
    """What one of Slurm's programs prints.

    Raises:
        MegaloopError: with Slurm's own words, where it refuses.
    """
    if shutil.which(program) is None:
        raise MegaloopError(
            f"{program}: not found; run this where Slurm's commands are, or train with megaloop train --ranks"
        )
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise _refused(program, done)
    return done.stdout.strip()


def _refused(program: str, done: subprocess.CompletedProcess[str]) -> MegaloopError:
    words = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return MegaloopError(f"{program} refused: {printable(words.removeprefix(f'{program}: '), 1000)}")


def _states(jobs: list[int]) -> dict[int, dict[str, str]]:
    """For each job: state, time left, reason and nodes, as the controller knows them; ``GONE`` if it has forgotten.

    Raises:
        MegaloopError: the controller does not answer.
    """
    states = {job: {"state": "GONE", "left": "", "reason": "", "on": ""} for job in jobs}
    if not jobs or shutil.which("squeue") is None:
        return states
    command = ["squeue", "-h", "-t", "all", "-j", ",".join(map(str, jobs)), "-o", "%A|%T|%L|%N|%r"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:  # what it says of a single job that it has forgotten
        raise _refused("squeue", done)
    for line in done.stdout.splitlines():
        job, state, left, hosts, reason = line.split("|", 4)
        if int(job) in states:
            states[int(job)] = {"state": state, "left": left, "reason": reason, "on": hosts}
    return states


def _jobs(run: Path) -> dict[int, dict[str, Any]]:
    """The newest jobs that were submitted for a run, by their number, oldest first.

    The file may be incomplete or edited, and a number of it reaches ``scancel``: what is no job's number is skipped.
    """
    jobs: dict[int, dict[str, Any]] = {}
    for record in read_records(run / _JOBS):
        job = whole_number(record, "job")
        if job is not None and 0 < job <= _LARGEST_JOB:
            jobs[job] = {
                "time": text(record, "time"),
                **{key: whole_number(record, key) for key in ("nodes", "ranks", "stop_at")},
                "job": job,
            }
    return dict(list(jobs.items())[-_MOST_JOBS:])


@dataclass
class _Status:
    """What ``megaloop status`` says."""

    run: str
    jobs: list[dict[str, Any]] = field(default_factory=list)
    step: int = 0
    steps: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    last_checkpoint: str | None = None
    restarts: int = 0


def status(run: Run, json: Json = False) -> None:
    """Show where a run is, here or on a cluster: state or jobs, step, loss, time left, last checkpoint, how to go on."""
    if not (run / _JOBS).exists():
        run_commands.show_local_status(run, json)
        return
    import statistics

    from megaloop.checkpoint import list_checkpoints
    from megaloop.config import load_config
    from megaloop.runs.directory import last_records

    jobs = _known_jobs(run)
    found = _Status(str(run))
    states, last = _states(list(jobs)), dict.fromkeys(jobs, "")
    for record in read_records(run / _HISTORY):
        job, event = whole_number(record, "job"), text(record, "event")
        found.restarts += event in ("requeue", "restart")
        if job in last and event is not None:
            last[job] = event
    found.jobs = [{**record, **states[job], "last": last[job]} for job, record in jobs.items()]
    found.steps = load_config(run / SUBMITTED).train.steps
    records = last_records(run, 50)
    if records:
        found.step, found.loss = whole_number(records[-1], "step") or 0, number(records[-1], "loss")
        times = [seconds for record in records if (seconds := number(record, "seconds")) is not None]
        found.seconds_left = statistics.median(times) * (found.steps - found.step) if times else None
    complete = list_checkpoints(run / "checkpoints")
    found.last_checkpoint = complete[-1].name if complete else None
    if json:
        echo(json_format.dumps(asdict(found), indent=2))
        return
    _show(found)


def _show(found: _Status) -> None:
    console = SafeConsole()
    loss = f", loss {found.loss:.4f}" if found.loss is not None else ""
    left = f", {found.seconds_left / 3600:.1f} h of training left" if found.seconds_left else ""
    line = f"{printable(found.run, 1000)}: step {found.step} of {found.steps}{loss}{left}"
    console.print(Text(line), soft_wrap=True, style="bold")
    console.print(f"last checkpoint {found.last_checkpoint or 'none'}, restarts {found.restarts}")
    table = Table(box=None, pad_edge=False)
    for header in ("job", "state", "nodes", "ranks", "until step", "time left", "on", "last word"):
        table.add_column(header, no_wrap=True)
    for job in found.jobs:
        until = job["stop_at"] or found.steps
        state = job["state"] if job["reason"] in ("None", "") else f"{job['state']} ({job['reason']})"
        cells = (job["job"], state, job["nodes"], job["ranks"], until, job["left"], job["on"], job["last"])
        table.add_row(*(Text(printable("" if cell is None else cell)) for cell in cells))
    console.print(table)


def cancel(run: Run, json: Json = False) -> None:
    """End a run's jobs: those that train save first, as far as Slurm gives them the time."""
    jobs = _known_jobs(run)
    waiting = [job for job, state in _states(list(jobs)).items() if state["state"] in _QUEUED]
    if waiting:
        _slurm("scancel", *map(str, waiting))
    if json:
        echo(json_format.dumps({"run": str(run), "cancelled": waiting}))
    elif waiting:
        echo(f"cancelled: job {', '.join(map(str, waiting))}")
    else:
        echo("nothing to cancel: no job of this run is with Slurm")


def _known_jobs(run: Path) -> dict[int, dict[str, Any]]:
    jobs = _jobs(run)
    if not jobs:
        raise MegaloopError(f"{run}: no run that megaloop submit has put on a cluster; expected {_JOBS} in it")
    return jobs
