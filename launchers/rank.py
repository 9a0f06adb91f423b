"""What a rank of the local launcher knows about its launcher.

Nothing slow is imported here: a rank calls :func:`follow_launcher` before anything else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megaloop.errors import MegaloopError
from megaloop.text import message_line, parse_whole, quoted

__all__ = [
    "ERROR_FILE",
    "GO_ON",
    "LAUNCHER",
    "RESTARTS",
    "STORE_FD",
    "environment_number",
    "follow_launcher",
    "launched",
    "open_store",
    "report_error",
    "restarts",
    "started_by_launcher",
]

ERROR_FILE = "MEGALOOP_ERROR_FILE"
"""Environment: where this rank leaves the line of an error that the user can fix."""
GO_ON = "MEGALOOP_GO_ON"
"""Environment: the command that goes on with the run."""
LAUNCHER = "MEGALOOP_LAUNCHER"
"""Environment: process id of the local launcher."""
RESTARTS = "MEGALOOP_RESTARTS"
"""Environment: how often the launcher has started the run again."""
STORE_FD = "MEGALOOP_STORE_FD"
"""Environment, rank 0: a listening socket for the store through which ranks find each other."""

_PR_SET_PDEATHSIG = 1


def started_by_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """True where some launcher (ours, torchrun, Slurm's) has already started this process as one of several ranks.

    Raises:
        MegaloopError: what it says of the ranks is no set of numbers that torch.distributed could use.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return False
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if name in environment:
            environment_number(name, environment)
        elif name == "MASTER_PORT":
            raise MegaloopError(
                "RANK and WORLD_SIZE are set, but MASTER_PORT is not; start ranks with a launcher that sets it (torchrun), "
                "or unset RANK and WORLD_SIZE"
            )
    if environment_number("RANK", environment) >= environment_number("WORLD_SIZE", environment):
        raise MegaloopError(
            f"RANK is {environment['RANK']} and WORLD_SIZE {environment['WORLD_SIZE']}; ranks count from 0 and are fewer"
        )
    return True


def environment_number(name: str, environment: Mapping[str, str] = os.environ, default: int | None = None) -> int:
    """A whole number from the environment.

    Raises:
        MegaloopError: it is something else, or it is not there and there is no default.
    """
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or (number := parse_whole(text.strip())) is None:
        found = "it is not set" if text is None else f"found {quoted(text)}"
        raise MegaloopError(f"environment variable {name}: expected a whole number, {found}; set or unset it")
    return number


def restarts() -> int:
    """How often the launcher has started the run again."""
    return environment_number(RESTARTS, default=0)


def follow_launcher() -> None:
    """Die with the launcher, even where it is killed outright, and end when it passes on Ctrl-C."""
    launcher = parse_whole(os.environ.pop(LAUNCHER, ""))
    if launcher is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:  # it died before this call
            os._exit(1)
    # a rank is started in a process group of its own, with Ctrl-C blocked, and only the launcher signals it; an exception
    # instead would be a traceback for each rank, and imports of others' modules do not survive it
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def open_store() -> Any:
    """On rank 0, open the store on the launcher's socket; the caller keeps it for as long as ranks talk.

    The launcher holds the port from the moment it chooses it, so no other process can take it in between.
    """
    descriptor = os.environ.pop(STORE_FD, None)
    if descriptor is None:
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(
        os.environ["MASTER_ADDR"],
        environment_number("MASTER_PORT"),
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=_listening(descriptor),
    )


def _listening(descriptor: str) -> int:
    """The launcher's socket; a variable that somebody else has left names none."""
    number = parse_whole(descriptor)
    try:
        if number is not None and stat.S_ISSOCK(os.fstat(number).st_mode):
            return number
    except OSError:
        pass
    raise MegaloopError(f"environment variable {STORE_FD}: {quoted(descriptor)} is no socket of a launcher; unset it")


def launched() -> bool:
    """True in a rank of the local launcher."""
    return ERROR_FILE in os.environ


def report_error(message: str) -> bool:
    """Leave an error for the launcher, which shows it once. False where there is no launcher to do so."""
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return False
    try:
        Path(path).write_text(message_line(message), encoding="utf-8")
    except OSError:  # the launcher is gone; or somebody else has left the variable
        return False
    return True
