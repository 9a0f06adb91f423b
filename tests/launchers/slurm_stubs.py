"""Slurm's programs as files of shell, to see what the job script does where a cluster is hard to bring there."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from launchers.slurm_script import JobOptions, Site, job_script

__all__ = ["JOB", "Stubs"]

JOB = 7
_STUBS = {
    "squeue": 'case $* in *%T) echo "${STATE-RUNNING}" ;; *) echo N/A ;; esac',
    "scontrol": 'case $1$2 in showhostnames) echo "$3" ;; shownode) ;; *) echo "scontrol $*" >> "$CALLS" ;; esac',
    "scancel": 'echo "scancel $*" >> "$CALLS"',
    "sleep": 'echo "sleep $*" >> "$CALLS"',
}


@dataclass
class Stubs:
    """A folder of stubs, and a run whose job script meets them.

    Attributes:
        run: the run directory; ``slurm`` is in it, as after ``megaloop submit``.
        calls: what the script asked of Slurm, one line each; of srun, ``srun``.
    """

    folder: Path
    run: Path
    env_file: Path | None = None
    calls: list[str] = field(default_factory=list)

    def write(self, name: str, body: str) -> None:
        """Make a stub of bash."""
        folder = self.folder / "bin"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
        (folder / name).chmod(0o755)

    def script(self, max_restarts: int = 3) -> str:
        """The job script of the run."""
        return job_script(
            JobOptions(1, 2, max_restarts=max_restarts, env_file=self.env_file),
            Site(),
            name="run",
            run=self.run,
            directory=self.folder,
            arguments=["megaloop", "train", str(self.run / "submitted.yaml")],
        )

    def start(self, ranks: str, *, max_restarts: int = 3, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the job script to its end.

        Args:
            ranks: what ``srun`` does, in bash; ``$RUN`` is the run directory, ``$SCRIPT`` the script's process.
        """
        for name, body in _STUBS.items():
            if not (self.folder / "bin" / name).exists():
                self.write(name, body)
        self.write("srun", f'echo srun >> "$CALLS"\nSCRIPT=$PPID\n{ranks}')
        script, calls = self.folder / "job.sh", self.folder / "calls"
        script.write_text(self.script(max_restarts))
        calls.unlink(missing_ok=True)
        slurm = {"SLURM_JOB_ID": str(JOB), "SLURM_JOB_NODELIST": "n1", "CALLS": str(calls), "RUN": str(self.run)}
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(script)],
            env={"PATH": path} | slurm | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=30,
        )
        self.calls = calls.read_text().splitlines() if calls.exists() else []
        return done
