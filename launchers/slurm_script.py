"""The job script: options, a site's settings and a template make one. Everything that is no shell is quoted."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError
from jinja2.meta import find_undeclared_variables
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from megaloop.config.yaml_text import read_yaml
from megaloop.errors import MegaloopError
from megaloop.text import quoted

__all__ = ["TEMPLATE", "JobOptions", "Site", "job_script", "load_site", "read_environment_file"]

TEMPLATE = Path(__file__).parent / "templates/train.sbatch.j2"
_SITES = Path(__file__).parent / "sites"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_BLANK = " \t\r"
_TIME = re.compile(r"(?:(?P<days>[0-9]{1,6})-)?(?P<parts>[0-9]{1,9}(?::[0-9]{1,9}){0,2})")


class Site(BaseModel):
    """What is particular to a cluster; see ``launchers/sites/example.yaml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    modules: list[str] = Field(default_factory=list)
    environment: dict[str, str] = Field(default_factory=dict)
    setup: list[str] = Field(default_factory=list)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    cpus_per_task: PositiveInt | None = None
    sbatch_options: list[str] = Field(default_factory=list)
    srun_options: list[str] = Field(default_factory=list)
    python: str | None = None
    container_command: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class JobOptions:
    """What the user asks of Slurm for one job.

    Attributes:
        tasks_per_node: ranks per node.
        time: limit, as Slurm takes it (minutes, H:MM:SS, D-HH:MM:SS); None: the partition's.
        signal_before: seconds before the limit at which the ranks are told to save.
        max_restarts: failures, and likewise rounds through the queue, without a new checkpoint before it gives up.
        env_file: variables for the ranks, besides the site's. The script reads it when it runs, as it may hold secrets: it
            must lie where the nodes can read it, and not change while the job waits.
    """

    nodes: int
    tasks_per_node: int
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    container: str | None = None
    exclusive: bool = False
    dependency: str | None = None
    signal_before: int = 120
    max_restarts: int = 3
    env_file: Path | None = None

    @property
    def ranks(self) -> int:
        """Tasks of the job."""
        return self.nodes * self.tasks_per_node

    def check(self) -> None:
        """Raise MegaloopError where the time limit is none, or leaves no time before the signal."""
        if self.time is None:
            return
        seconds = _seconds(self.time)
        if seconds is None:
            raise MegaloopError(f"--time {self.time!r}: expected minutes, H:MM:SS or D-HH:MM:SS, for example 4:00:00")
        if 0 < seconds <= self.signal_before:
            raise MegaloopError(
                f"--time {self.time} is {seconds} s, not more than --signal-before {self.signal_before}: the ranks would "
                "stop as soon as they start; ask for more time, or signal later"
            )


class _Shell(str):
    """Text that goes into the script as it stands."""


def load_site(name: str) -> Site:
    """A site of ``launchers/sites`` by its name, or a file.

    Raises:
        MegaloopError: there is none, it is not YAML, or it has a key that is not known.
    """
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else _SITES / f"{name}.yaml"
    try:
        values = read_yaml(path)
    except FileNotFoundError:
        known = ", ".join(sorted(item.stem for item in _SITES.glob("*.yaml")))
        raise MegaloopError(f"--site {name}: no such site; use one of {known}, or the path of a YAML file") from None
    except MegaloopError as error:
        raise MegaloopError(f"--site {name}: {error}") from None
    try:
        site = Site.model_validate(values or {})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        known = f"; known keys: {', '.join(Site.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise MegaloopError(f"--site {name}: {where}: {first['msg']} (found {quoted(first['input'])}){known}") from None
    _check_names(f"--site {name}", site.environment)
    return site


def read_environment_file(path: Path) -> dict[str, str]:
    """``NAME=VALUE`` lines; empty ones and those that begin with # are skipped, and nothing is expanded.

    The job script reads the file again when it runs, in the same way (``export_file`` of the template).

    Raises:
        MegaloopError: it cannot be read, is no regular file, or a line is something else. Values are not shown: they may be
            secrets.
    """
    try:
        lines = path.read_bytes().decode().split("\n") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise MegaloopError(f"--env-file {path}: cannot be read ({reason})") from None
    if lines is None:
        raise MegaloopError(f"--env-file {path}: expected a file; the job reads it when it runs")
    values: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip(_BLANK)
        if not line or line.startswith("#"):
            continue
        name, separator, value = line.removeprefix("export ").partition("=")
        name = name.strip(_BLANK)
        if not separator or not _NAME.fullmatch(name):
            raise MegaloopError(f"--env-file {path}, line {number}: expected NAME=VALUE, with the name of a variable")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        values[name] = value
    _check_names(f"--env-file {path}", values)
    return values


def job_script(
    options: JobOptions,
    site: Site,
    *,
    name: str,
    run: Path,
    directory: Path,
    arguments: Sequence[str],
    template: Path = TEMPLATE,
) -> str:
    """The script of one job.

    Args:
        name: of the run; what Slurm's tools may trip over becomes an underscore.
        run: the run directory, absolute.
        directory: where the ranks start.
        arguments: what follows ``python -m``.

    Raises:
        MegaloopError: a value that no ``#SBATCH`` line can hold, or a template that does not work.
    """
    command, srun_options = _command(options, site, arguments)
    values: dict[str, Any] = {
        "job_name": re.sub(r"[^A-Za-z0-9._+-]", "_", name)[:64],
        "nodes": options.nodes,
        "tasks_per_node": options.tasks_per_node,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task or site.cpus_per_task,
        "time": options.time,
        "partition": options.partition or site.partition,
        "account": options.account or site.account,
        "qos": options.qos or site.qos,
        "constraint": options.constraint or site.constraint,
        "exclusive": options.exclusive,
        "dependency": options.dependency,
        "directory": str(directory),
        "output": str(run).replace("%", "%%") + "/slurm/job-%j.log",  # Slurm expands its own % in this one
        "sbatch_options": site.sbatch_options,
        "run": str(run),
        "max_restarts": options.max_restarts,
        "signal_before": options.signal_before,
        "modules": site.modules,
        "environment": site.environment,
        "env_file": None if options.env_file is None else str(options.env_file.absolute()),
        "setup": site.setup,
        "srun_options": srun_options,
        "command": command,
    }
    for key, value in values.items():
        _check_line(key, value)
    try:
        text = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MegaloopError(f"--template {template}: cannot be read ({error})") from None
    jinja = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_quoted
    )
    jinja.filters["raw"] = _Shell
    try:
        if options.env_file is not None and "env_file" not in find_undeclared_variables(jinja.parse(text)):
            raise MegaloopError(
                f"--template {template}: does not read --env-file; take the lines of env_file from {TEMPLATE}"
            )
        return jinja.from_string(text).render(values)
    except TemplateError as error:
        raise MegaloopError(f"--template {template}: {error}") from None


def _command(options: JobOptions, site: Site, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what a task runs, options of srun)."""
    srun_options, before = list(site.srun_options), []
    python = site.python or sys.executable
    if options.container is not None:
        python = site.python or "python3"  # the one that submits is not in there
        before = [part.replace("{image}", options.container) for part in site.container_command]
        if not before:
            srun_options.append(f"--container-image={options.container}")
    return [*before, python, "-m", *arguments], srun_options


def _quoted(value: Any) -> str:
    return str(value) if isinstance(value, _Shell) else shlex.quote(str(value))


def _check_line(key: str, value: Any) -> None:
    """Refuse what would begin another line; setup lines and variables may have several."""
    if key in ("setup", "environment"):
        return
    for item in value if isinstance(value, list | tuple) else [value]:
        if any(ord(character) < 32 or ord(character) == 127 for character in str(item)):
            raise MegaloopError(
                f"job script: {key.replace('_', '-')} {str(item)!r} has a newline or another control character; take it out"
            )


_READ_ONLY = {"BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"}
"""Variables of bash's own, which it lets nobody set."""


def _check_names(where: str, values: Mapping[str, str]) -> None:
    script = TEMPLATE.read_text(encoding="utf-8")
    local = {name for names in re.findall(r"\blocal ([a-z_ ]+)", script) for name in names.split()} - {"state"}
    taken = _READ_ONLY | set(re.findall(r"(?<![\w$-])([a-z_]+)(?==)", script)) - local
    for name, value in values.items():
        if name in taken:
            raise MegaloopError(
                f"{where}: {name} is a variable of the job script or of bash itself; choose another name"
            )
        if not _NAME.fullmatch(name):
            raise MegaloopError(f"{where}: {name!r} is no name of an environment variable")
        if "\0" in value:
            raise MegaloopError(f"{where}: the value of {name} holds a zero byte")


def _seconds(time: str) -> int | None:
    """Slurm's time formats in seconds; None for something else."""
    match = _TIME.fullmatch(time)
    if match is None:
        return None
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:  # D-H, D-H:M, D-H:M:S
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(parts) == 3:
        return parts[0] * 3600 + parts[1] * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)  # M, M:S
