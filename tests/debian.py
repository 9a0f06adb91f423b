"""Programs of other projects that tests need, from Debian's packages."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import pytest

__all__ = ["install", "skip"]


def install(programs: Sequence[str], packages: Sequence[str], path: str | None = None) -> str | None:
    """Install packages if one of the programs is missing.

    Args:
        path: where to look for programs; default: PATH.

    Returns:
        None where all programs are there; otherwise why one is not.
    """

    def missing() -> list[str]:
        return [name for name in programs if shutil.which(name, path=path) is None]

    if os.geteuid() != 0:
        return f"{missing()[0]} is not installed, and installing takes root" if missing() else None
    if not missing():
        return None
    if shutil.which("apt-get") is None:
        return f"{missing()[0]} is not installed, and there is no apt-get"
    with Path(tempfile.gettempdir(), "megaloop-apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        commands = (["update", "-q"], ["install", "-qy", "--no-install-recommends", *packages])
        for arguments in commands if missing() else ():
            try:
                done = subprocess.run(
                    ["apt-get", *arguments], env=environment, capture_output=True, text=True, timeout=300
                )
            except subprocess.TimeoutExpired:
                return f"apt-get {arguments[0]} took more than 300 s"
            if done.returncode:
                return f"apt-get {arguments[0]} failed: {' '.join(done.stderr.split())[-200:]}"
    return f"{missing()[0]} is not installed" if missing() else None


def skip(reason: str) -> NoReturn:
    """Skip a test; in CI, where a skipped test proves nothing, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
