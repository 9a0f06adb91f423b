"""A real Slurm cluster of two nodes on this machine, without systemd or cgroups, for the tests.

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
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.debian import install, skip

__all__ = ["CPUS_PER_NODE", "SlurmCluster", "running_cluster", "wait_for"]

CPUS_PER_NODE = 4
"""What each node pretends to have, whatever the machine has."""
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
_SBIN = "/usr/sbin:/sbin"
_ALIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "STOPPED", "SIGNALING"}

# A killed slurmd is noticed after SlurmdTimeout. What bounds the tests otherwise: KillWait (SIGTERM to SIGKILL) and
# how often the schedulers look. cred_expire stays at its default of 120 s: what a requeued job would have to wait.
_CONFIGURATION = """\
ClusterName=megaloop
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
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
KillWait=5
MinJobAge=600
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs={cpus} RealMemory=1024 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs={cpus} RealMemory=1024 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
"""

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
    """Two nodes, n1 and n2, of four pretended cores each.

    Attributes:
        environment: what Slurm's commands need to find the cluster.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] += os.pathsep + _SBIN
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start munge, the controller and both nodes; returns when both are idle."""
        host = socket.gethostname().partition(".")[0]
        controller_port, port_1, port_2 = _free_ports(3)
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=host,
                folder=self.folder,
                cpus=CPUS_PER_NODE,
                controller_port=controller_port,
                port_1=port_1,
                port_2=port_2,
            )
        )
        self._start_munge()
        self._daemon("slurmctld", ["slurmctld", "-D"])
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_for("both nodes idle", lambda: self.run("sinfo", "-h", "-o", "%T %D", check=False) == "idle 2")

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

    def kill_node(self, node: str) -> None:
        """Kill a node's slurmd, and all that runs on the node, as a machine that loses power does."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                command = (entry / "cmdline").read_bytes()
                environment = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ours = f"SLURM_CONF={self.folder}/slurm.conf".encode() in environment
            stepd = command.startswith(b"slurmstepd: [") and ours
            task = ours and f"SLURMD_NODENAME={node}".encode() in environment
            if (task or stepd) and _stepd_node(entry, command, node):
                os.kill(int(entry.name), signal.SIGKILL)

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
        if "slurmctld" in self._daemons:
            self.run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
            self.run("scancel", "--user=root", check=False)
        for name in ("n1", "n2", "slurmctld", "munged"):
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


def _stepd_node(entry: Path, command: bytes, node: str) -> bool:
    return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
