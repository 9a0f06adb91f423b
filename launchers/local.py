"""Start the ranks of a run on this machine and stay with them until the last has ended.

Plain processes rather than torch elastic, for what the user sees: rank 0 keeps the terminal (its live progress
line works), an error that every rank hits is shown once, Ctrl-C lets all ranks save, and none outlives the
launcher. Elastic stops the other ranks at the first exit, whatever it was, and reports with a page of its own.
``torchrun -m megaloop train CONFIG`` works as well: where RANK and WORLD_SIZE are set, no ranks are started.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from launchers.rank import ERROR_FILE, LAUNCHER, STORE_FD
from megaloop.config import Config
from megaloop.errors import CONTINUE, MegaloopError
from megaloop.text import printable

__all__ = ["RankFailed", "gpu_count", "launch", "local_ranks", "rank_environment", "single_rank"]

_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
_TAIL = 30
"""Lines of a failed rank's log to show."""


class RankFailed(Exception):
    """A rank ended in a way that is no user's error: killed, or with a traceback. The message names it and its log.

    Attributes:
        signalled: the ranks had been told to end, by this signal; 0: they had not.
    """

    def __init__(self, message: str, signalled: int = 0) -> None:
        super().__init__(message)
        self.signalled = signalled


class _Signalled(BaseException):
    def __init__(self, number: int) -> None:
        self.number = number


def gpu_count() -> int:
    """GPUs that torch can use here; torch is imported only where a GPU's device file exists."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/dxg").exists() and not Path("/dev/kfd").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def local_ranks(config: Config, requested: int | None = None) -> int:
    """How many ranks to start on this machine: as asked, or what the topology needs, or one per GPU where dp is open.

    Raises:
        MegaloopError: the number does not fit the topology, or there are fewer GPUs.
    """
    gpus = gpu_count()
    needed = config.smallest_world
    ranks = requested or (max(gpus, needed) if config.parallel.dp is None else needed)
    config.check_world(ranks)
    pp, tp, dp = config.topology(ranks)
    if gpus and ranks > gpus:
        raise MegaloopError(
            f"parallel: pp {pp} x tp {tp} x dp {dp} needs {ranks} ranks, but this machine has {gpus} GPUs; "
            "choose a smaller topology, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return ranks


@contextmanager
def single_rank() -> Iterator[None]:
    """Make this process the only rank: no launcher, no second process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        before = dict(os.environ)
        os.environ.update(rank_environment(0, 1, listener.getsockname()[1]))
        os.environ[STORE_FD] = str(os.dup(listener.fileno()))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torch.distributed's ``env://`` and DeepSpeed read, for one rank on this machine.

    Where OMP_NUM_THREADS is not set, the ranks share the cores evenly.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(cores // ranks, 1))),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # rank 0 opens the store itself, on the socket that it is given, before torch.distributed looks for it
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def launch(command: Sequence[str], ranks: int, log_dir: Path, *, grace: float = 10.0) -> None:
    """Run ``command`` as ``ranks`` ranks until all have ended.

    Rank 0 writes to this process's stdout and stderr; rank N appends both to ``log_dir/rank-N.log``.

    Args:
        command: a Python program that calls :func:`launchers.rank.follow_launcher` first and :func:`open_store`
            before it joins the ranks.
        grace: seconds that ranks get to end by themselves after a second signal or a user's error.

    A first SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C is passed on, and the ranks have as long as they need to save and leave. When
    one has died or failed with a traceback, the others are killed at once: they would wait for it in a collective. After
    an error that the user can fix or a signal, empty logs and directories that were made for these ranks are removed.

    Raises:
        MegaloopError: a rank left an error that the user can fix (exit code 2).
        RankFailed: a rank was killed, or failed with a traceback.
        SystemExit: a signal was passed on and the ranks have ended: with CONTINUE where they say so (and it was not
            Ctrl-C), otherwise with 128 + the signal's number.
    """
    with _log_directory(log_dir), tempfile.TemporaryDirectory(prefix="megaloop-") as errors:
        team = _Team(command, ranks, log_dir, Path(errors))
        try:
            with _passing_on_signals(team):
                team.start()
                failed = team.wait()
                if failed is not None:
                    if failed[1] == 2:
                        team.stop(signal.SIGTERM, grace)
                    raise team.failure(*failed)
                if team.to_be_continued:
                    raise SystemExit(128 + signal.SIGINT if team.signalled == signal.SIGINT else CONTINUE)
        except _Signalled as ended:
            team.stop(ended.number, grace)
            raise SystemExit(128 + ended.number) from None
        finally:
            team.kill()


@contextmanager
def _log_directory(path: Path) -> Iterator[None]:
    """Make the directory of the logs; what is empty goes again where the ranks were refused, or ended before they began."""
    made: list[Path] = []
    try:
        for item in (path, path.parent):
            if not item.exists():
                made.append(item)
        before = set() if path in made else set(path.iterdir())
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MegaloopError(
            f"run directory {path.parent}: cannot make {path.name}/ in it ({error.strerror}); choose another run_dir"
        ) from None
    try:
        yield
    except (MegaloopError, SystemExit):
        with suppress(OSError):
            for log in set(path.iterdir()) - before:
                if log.is_file() and log.stat().st_size == 0:
                    log.unlink()
            for item in made:
                item.rmdir()
        raise


class _Team:
    """The ranks, as processes."""

    def __init__(self, command: Sequence[str], ranks: int, log_dir: Path, errors: Path) -> None:
        self.command = command
        self.errors = errors
        self.logs = [log_dir / f"rank-{rank}.log" for rank in range(ranks)]
        self.log_starts = [log.stat().st_size if log.exists() else 0 for log in self.logs]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
        self.started = False
        self.signalled = 0
        self.to_be_continued = False

    def start(self) -> None:
        """Start the ranks, and a thread each that waits for its end."""
        # a rank inherits this: Ctrl-C waits until the interpreter is there to take it (follow_launcher)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                for rank in range(len(self.logs)):
                    self.processes.append(self._start(rank, listener))
        except OSError as error:
            raise MegaloopError(f"cannot start {len(self.logs)} ranks: {error}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for rank, process in enumerate(self.processes):
            threading.Thread(target=self._follow, args=(rank, process), daemon=True).start()
        self.started = True

    def _start(self, rank: int, listener: socket.socket) -> subprocess.Popen[bytes]:
        environment = os.environ | rank_environment(rank, len(self.logs), listener.getsockname()[1])
        environment |= {LAUNCHER: str(os.getpid()), ERROR_FILE: str(self.errors / f"rank-{rank}")}
        output: IO[bytes] | None = None
        descriptors: tuple[int, ...] = ()
        if rank == 0:
            environment[STORE_FD] = str(listener.fileno())
            descriptors = (listener.fileno(),)
        else:
            output = self.logs[rank].open("ab")
        try:
            # a process group of its own: Ctrl-C in the terminal reaches the launcher alone, which passes it on once
            return subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                pass_fds=descriptors,
                process_group=0,
            )
        finally:
            if output is not None:
                output.close()

    def _follow(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.ended.put((rank, process.wait()))

    def wait(self) -> tuple[int, int] | None:
        """Wait until all ranks have succeeded, or for the first that did not: (rank, exit code)."""
        for _ in self.processes:
            rank, code = self.ended.get()
            if self.signalled and code in (-self.signalled, 128 + self.signalled):  # it has no use for the signal
                raise _Signalled(self.signalled)
            if code == CONTINUE:
                self.to_be_continued = True
            elif code != 0:
                return rank, code
        return None

    def pass_on(self, number: int) -> None:
        """Signal the ranks that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def stop(self, number: int, grace: float) -> None:
        """Pass a signal to the ranks that still run, and kill those that have not ended in time."""
        self.pass_on(number)
        deadline = time.monotonic() + grace
        try:
            for process in self.processes:
                process.wait(max(deadline - time.monotonic(), 0))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C: no more patience
            pass
        self.kill()

    def kill(self) -> None:
        """End every rank and whatever it has started."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        _show_cursor()

    def failure(self, rank: int, code: int) -> Exception:
        """The one error to show when ``rank`` was the first to fail."""
        for path in sorted(self.errors.iterdir()):
            return MegaloopError(path.read_text(encoding="utf-8"))
        if rank:
            self._show_tail(rank)
        log = f"log: {self.logs[rank]}" if rank else "its output is above"
        if code < 0:
            name = signal.Signals(-code).name
            hint = {
                "SIGKILL": " (out of memory?)",
                "SIGALRM": " (it hung for longer than faults.step_limit; where, is in the run's stacks/)",
            }.get(name, "")
            return RankFailed(f"rank {rank} died with {name}{hint}; {log}", self.signalled)
        return RankFailed(f"rank {rank} failed with exit code {code}; {log}", self.signalled)

    def _show_tail(self, rank: int) -> None:
        with self.logs[rank].open("rb") as log:
            log.seek(self.log_starts[rank])
            text = log.read().decode(errors="replace")
        sys.stderr.writelines(f"[rank {rank}] {printable(line, 1000)}\n" for line in text.splitlines()[-_TAIL:])
        sys.stderr.flush()


@contextmanager
def _passing_on_signals(team: _Team) -> Iterator[None]:
    """Pass the first signal on to the ranks; raise for a second, or before they have started, so that they are ended."""

    def handle(number: int, frame: FrameType | None) -> None:
        if team.signalled or not team.started:
            raise _Signalled(number)
        team.signalled = number
        team.pass_on(number)

    heard = [number for number in _PASSED_ON if signal.getsignal(number) != signal.SIG_IGN]  # nohup's stays ignored
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show_cursor() -> None:
    """A rank that died under a live progress line has left the cursor hidden."""
    for stream in (sys.stdout, sys.stderr):
        if stream.isatty():
            stream.write("\x1b[?25h")
            stream.flush()
            return
