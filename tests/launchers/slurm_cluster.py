"""A real Slurm cluster of nine nodes on this machine, without systemd or cgroups, for the tests.

Everything (munge's key and socket, Slurm's state, logs and configuration) lies in one temporary directory and ends with
the fixture; nothing collides with a munge or a Slurm that the machine runs already. There is no accounting database.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from tests.debian import install, skip

__all__ = ["CPUS_PER_NODE", "NODES", "SlurmCluster", "running_cluster", "wait_for"]

NODES = tuple(f"n{number}" for number in range(1, 10))
CPUS_PER_NODE = 4
"""What each node pretends to have, whatever the machine has."""
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
_SBIN = "/usr/sbin:/sbin"
_ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED", "SIGNALING"}

# Jobs run side by side, each on whole nodes. What bounds the tests is how often the schedulers look, and the half minute
# between two looks at time limits, which nothing sets. All timeouts are long, as the machine may be busy: none is waited
# for. A job's ports follow from its number, so two clusters on one machine count from different ones. cred_expire stays at
# its default of 120 s: what a requeued job would have to wait.
_CONFIGURATION = """\
ClusterName=megaloop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
FirstJobId={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
MailProg=/bin/true
ReturnToService=2
InactiveLimit=0
KillWait=20
BatchStartTimeout=120
UnkillableStepTimeout=180
MinJobAge=600
SlurmctldTimeout=120
SlurmdTimeout=120
MessageTimeout=60
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE OverSubscribe=EXCLUSIVE State=UP
"""
_NODE = "NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1024 State=UNKNOWN"

_T = TypeVar("_T")


def wait_for(what: str, condition: Callable[[], _T | None], timeout: float = 30.0) -> _T:
    """Ask until the answer is true; an AssertionError that names it after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(0.1)


class SlurmCluster:
    """Nine nodes, n1 to n9, of four pretended cores each.

    Attributes:
        environment: what Slurm's commands need to find the cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += os.pathsep + _SBIN
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start munge, the controller and the nodes; returns when all are idle."""
        host = socket.gethostname().partition(".")[0]
        controller_port, *ports = _free_ports(1 + len(NODES))
        (self.folder / "state").mkdir()
        nodes = []
        for node, port in zip(NODES, ports, strict=True):
            (self.folder / f"spool-{node}").mkdir()
            nodes.append(_NODE.format(node=node, host=host, port=port, cpus=CPUS_PER_NODE))
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=host, folder=self.folder, controller_port=controller_port, nodes="\n".join(nodes)
            )
        )
        self._start_munge()
        self._daemon("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        idle = f"idle {len(NODES)}"
        wait_for("all nodes idle", lambda: self.run("sinfo", "-h", "-o", "%T %D", check=False) == idle, 60)

    def _start_munge(self) -> None:
        folder = self.folder
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        home = folder / "munge"
        home.mkdir(mode=0o700)
        command = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
        command += [f"--{name}-file={home}/{name}" for name in ("pid", "log", "seed")]
        for path in (key, home):
            shutil.chown(path, "munge", "munge")
        folder.chmod(0o777)  # munged makes its socket here
        self._daemon("munged", command, user="munge")
        wait_for("munge's socket", (folder / "munge.socket").exists)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._daemon(node, ["slurmd", "-D", "-N", node])

    def lose_node(self, node: str) -> None:
        """Take a node away, as one that loses power; the controller is told what it would notice after SlurmdTimeout."""
        self._kill_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def _kill_node(self, node: str) -> None:
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for process in self._processes(node):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _processes(self, node: str) -> Iterator[int]:
        """What Slurm has started on a node: tasks know it from their environment, a slurmstepd logs into slurmd's file."""
        marks = {f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode()}
        log = str(self.folder / f"slurmd-{node}.log")
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended
                task = marks <= set((entry / "environ").read_bytes().split(b"\0"))
                stepd = (entry / "cmdline").read_bytes().startswith(b"slurmstepd: [")
                if task or (stepd and log in _open_files(entry)):
                    yield int(entry.name)

    def run(self, *command: str, check: bool = True) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def job(self, job: int) -> dict[str, str]:
        """What the controller knows of a job."""
        return dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", self.run("scontrol", "show", "job", "-o", str(job))))

    def ended(self, job: int, timeout: float = 60.0) -> dict[str, str]:
        """Wait until a job has ended for good; what is known of it then."""

        def over() -> dict[str, str] | None:
            known = self.job(job)
            return known if known["JobState"] not in _ALIVE else None

        return wait_for(f"job {job} to end ({self.job(job)['JobState']})", over, timeout)

    def stop(self) -> None:
        """End all jobs and daemons."""
        for node in NODES:
            if node in self._daemons:
                self._kill_node(node)
        for name in ("slurmctld", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def _daemon(self, name: str, command: list[str], user: str | None = None) -> None:
        program = shutil.which(command[0], path=self.environment["PATH"])
        assert program is not None, f"{command[0]} is not installed"
        with (self.folder / f"{name}.output").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [program, *command[1:]],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                user=user,
                group=user,
                extra_groups=() if user else None,
                process_group=0,
            )


@contextmanager
def running_cluster() -> Iterator[SlurmCluster]:
    """A cluster for as long as the context; skips the tests (CI: fails) where there can be none."""
    reason = _install()
    if reason is not None:
        skip(f"no Slurm cluster: {reason}")
    # a short path: the name of a socket has 107 characters at most
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = SlurmCluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def _install() -> str | None:
    """Install what is missing of Slurm and munge, where that is possible; otherwise why not."""
    if os.geteuid() != 0:
        return "starting one takes root"
    return install(_PROGRAMS, ("slurm-wlm", "munge"), os.environ["PATH"] + os.pathsep + _SBIN)


def _open_files(process: Path) -> list[str]:
    files = []
    for descriptor in (process / "fd").iterdir():
        with suppress(OSError):
            files.append(os.readlink(descriptor))
    return files


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()
