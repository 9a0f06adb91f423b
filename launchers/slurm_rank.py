"""What a rank that Slurm started knows of the others, and how it tells the job script why it ended.

Only the standard library is imported here: a rank calls this before anything slow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from contextlib import suppress

__all__ = ["EXIT_FILE", "SLURM", "join_slurm", "record_exit", "slurm_rank_environment"]

SLURM = "MEGALOOP_SLURM"
"""Environment: the job script exports it as 1."""
EXIT_FILE = "MEGALOOP_EXIT_FILE"
"""Environment: where the first rank that ends in order leaves its exit code."""
_ORDERLY = (0, 2, 75)


def join_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """In a task of the job script's ``srun``, set what torch.distributed reads; elsewhere, nothing."""
    if environment.get(SLURM) == "1" and "SLURM_STEP_ID" in environment:
        environment.update(slurm_rank_environment(environment))


def slurm_rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (and OMP_NUM_THREADS, where it is not set) of one Slurm task.

    MASTER_ADDR and MASTER_PORT come from the job script.
    """
    per_node = _tasks_per_node(slurm["SLURM_STEP_TASKS_PER_NODE"])
    return {
        "OMP_NUM_THREADS": slurm.get("OMP_NUM_THREADS", slurm.get("SLURM_CPUS_PER_TASK", "1")),
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(per_node[int(slurm["SLURM_NODEID"])]),
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
    """Slurm's ``2(x3),1`` as [2, 2, 2, 1]."""
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(nodes or 1)
    return counts
