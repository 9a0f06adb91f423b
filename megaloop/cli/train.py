"""``megaloop train`` and ``megaloop plan``."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launchers.rank import GO_ON, RESTARTS, restarts, started_by_launcher
from megaloop.cli.options import Json, Overrides
from megaloop.cli.output import show_result
from megaloop.cli.ranks import leave, print_rank_error, rank_store
from megaloop.errors import CONTINUE, MegaloopError
from megaloop.runs.allow import Allow, AllowOption, allow_arguments
from megaloop.terminal import SafeConsole

if TYPE_CHECKING:
    from megaloop.config import Config

__all__ = ["configuration_of", "plan", "train"]


def train(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG|RUN", help="YAML file, for example configs/demo.yaml; or a run's directory."),
    ],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Local ranks to start; default: what the topology needs, or all GPUs.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's latest checkpoint.")] = False,
    stop_at: Annotated[
        int | None,
        typer.Option(metavar="STEP", min=1, help="Save and end after this step; --resume goes on from there."),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(metavar="CKPT", help="Begin with this checkpoint's weights (or a run's newest): as init=CKPT."),
    ] = None,
    allow: AllowOption = None,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="Start the ranks again, resuming, at most this often when one of them dies.")
    ] = 0,
) -> None:
    """Train a model; starts its own local ranks unless a launcher (torchrun, Slurm) already did.

    SIGUSR1, SIGTERM and SIGHUP end the step, save, and leave with exit code 75, Ctrl-C with 130; a second one leaves at once.
    """
    values = [*(overrides or []), *([f"init={init}"] if init is not None else [])]
    configuration = configuration_of(config, values)
    if allow and not (resume or max_restarts):
        raise MegaloopError("--allow says what --resume may find changed; add --resume")
    if started_by_launcher():
        _train_here(configuration, resume, stop_at, allow or [])
        return
    from launchers import local

    count = local.local_ranks(configuration, ranks)
    options = {"--ranks": ranks, "--max-restarts": max_restarts or None}
    go_on = ["megaloop", "train", str(configuration.directory), "--resume"]
    go_on += [word for name, value in options.items() if value is not None for word in (name, str(value))]
    os.environ[GO_ON] = shlex.join(go_on)
    if count == 1 and not max_restarts:
        with local.single_rank():
            _train_here(configuration, resume, stop_at, allow or [], alone=True)
        return
    command = [sys.executable, "-m", "megaloop", "train", str(config), *values]
    command += ["--stop-at", str(stop_at)] if stop_at is not None else []
    command += allow_arguments(allow)
    for attempt in range(max_restarts + 1):
        os.environ[RESTARTS] = str(attempt)
        again = ["--resume"] if resume or attempt else []
        try:
            local.launch([*command, *again], count, configuration.directory / "logs")
            return
        except local.RankFailed as error:
            print_rank_error(str(error))
            if attempt == max_restarts or error.signalled:  # who told it to end does not want it back
                raise typer.Exit(1) from None
            SafeConsole(stderr=True).print(f"starting the ranks again, restart {attempt + 1} of {max_restarts}")


def configuration_of(path: Path, overrides: list[str]) -> Config:
    """The configuration of a file, or of a run's directory: what it trained with last, wherever the directory is now."""
    from megaloop.config import load_config
    from megaloop.runs.directory import CONFIG

    if not os.path.isdir(path):  # which takes any name, however long
        return load_config(path, overrides)
    if not (path / CONFIG).is_file():
        raise MegaloopError(
            f"{path}: a directory without {CONFIG}, so no run has begun in it; expected a YAML file or a run's directory"
        )
    configuration = load_config(path / CONFIG, overrides)
    if any(override.partition("=")[0].strip() == "run_dir" for override in overrides) or (
        configuration.directory.resolve() == path.resolve()
    ):
        return configuration
    return configuration.model_copy(update={"run_dir": path})


def _train_here(
    configuration: Config, resume: bool, stop_at: int | None, allowed: list[Allow], *, alone: bool = False
) -> None:
    """Be one rank of the run; ``alone``: in the process that the user started."""
    from megaloop.train.signals import StopSignals

    go_on = os.environ.get(GO_ON)
    with StopSignals() as signals, rank_store():
        from megaloop.train.loop import run

        ending = run(
            configuration,
            resume=resume,
            stop_at=stop_at,
            signals=signals,
            go_on=go_on,
            allowed=allowed,
            restarts=restarts(),
        )
    if ending in ("signalled", "interrupted"):
        leave(130 if ending == "interrupted" and alone else CONTINUE)


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration of the run.")],
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks to plan for; default: the fewest that the topology needs.")
    ] = None,
    timeline: Annotated[bool, typer.Option("--timeline", help="Draw a step of each stage: rank by time.")] = False,
    timeline_png: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write that picture as PNG, all of the step.")
    ] = None,
    json: Json = False,
) -> None:
    """Show what a run will do, take and move, stage by stage, without starting it."""
    from megaloop.config import load_config
    from megaloop.plan.preview import pictures, preview, show, show_timeline

    run = preview(load_config(config, overrides or []), ranks)
    if timeline_png is not None:
        from megaloop.plan.timeline import draw_png

        if not (drawn := pictures(run)):
            raise MegaloopError("plan: no stage has a pipeline (pp 1), there is no timeline to draw")
        draw_png(drawn, timeline_png)
    if json:
        show_result(run.to_json(), json)
        return
    console = SafeConsole()
    show(run, console)
    if timeline:
        show_timeline(run, console)
