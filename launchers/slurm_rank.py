"""What a rank that Slurm started knows of the others, and how it tells the job script why it ended.

Nothing slow is imported here: a rank calls this before anything else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from contextlib import suppress

from launchers.rank import environment_number
from megaloop.errors import MegaloopError
from megaloop.text import quoted

__all__ = ["EXIT_FILE", "SLURM", "join_slurm", "record_exit", "slurm_rank_environment"]

SLURM = "MEGALOOP_SLURM"
"""Environment: the job script exports it as 1."""
EXIT_FILE = "MEGALOOP_EXIT_FILE"
"""Environment: where the first rank that ends in order leaves its exit code."""
_ORDERLY = (0, 2, 75)
_NODES = r"[0-9]{1,6}(?:\(x[0-9]{1,6}\))?"


def join_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """In a task of the job script's ``srun``, set what torch.distributed reads; elsewhere, nothing."""
    if environment.get(SLURM) == "1" and "SLURM_STEP_ID" in environment:
        environment.update(slurm_rank_environment(environment))


def slurm_rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (and OMP_NUM_THREADS, where it is not set) of one Slurm task.

    MASTER_ADDR and MASTER_PORT come from the job script.

    Raises:
        MegaloopError: a variable of Slurm's is not there, or says something else than Slurm would.
    """
    name = "SLURM_STEP_TASKS_PER_NODE"
    per_node, node = _tasks_per_node(slurm.get(name, "")), environment_number("SLURM_NODEID", slurm)
    if node >= len(per_node):
        raise MegaloopError(
            f"environment variable {name}: {quoted(slurm.get(name, ''))} has no node {node} (SLURM_NODEID); "
            "start ranks with srun, in the script that megaloop submit writes"
        )
    threads = slurm.get("OMP_NUM_THREADS")
    return {
        "OMP_NUM_THREADS": threads or str(environment_number("SLURM_CPUS_PER_TASK", slurm, 1)),
        "RANK": str(environment_number("SLURM_PROCID", slurm)),
        "WORLD_SIZE": str(environment_number("SLURM_STEP_NUM_TASKS", slurm)),
        "LOCAL_RANK": str(environment_number("SLURM_LOCALID", slurm)),
        "LOCAL_WORLD_SIZE": str(per_node[node]),
    }


def record_exit(code: int, environment: Mapping[str, str] = os.environ) -> None:
    """Leave an orderly exit code (0, 2, 75) for the job script, which cannot rely on ``srun``'s.

    ``srun`` reports the highest of all ranks', and the first rank that ends takes the others down with SIGKILL: 137. Where a
    node has died, it may report 0. The first to write wins: all ranks leave for the same reason.
    """
    path = environment.get(EXIT_FILE)
    if path is None or code not in _ORDERLY:
        return
    with suppress(OSError):  # there already, or the disk is full: the job script has srun's code
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(descriptor, f"{code}\n".encode())
        os.close(descriptor)


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's ``2(x3),1`` as [2, 2, 2, 1]; nothing, where it is something else."""
    if not re.fullmatch(rf"{_NODES}(?:,{_NODES})*", text):
        return []
    counts: list[int] = []
    for tasks, nodes in re.findall(r"([0-9]+)(?:\(x([0-9]+)\))?", text):
        counts += [int(tasks)] * int(nodes or 1)
    return counts
