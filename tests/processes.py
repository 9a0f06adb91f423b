"""Processes that cost nothing to start: forked from a server that has imported torch, DeepSpeed and megaloop.

A fresh interpreter that imports DeepSpeed takes 2 seconds of a core before it does anything; a fork of one that has takes
0.02. So ranks (:mod:`tests.distributed`) and commands (here) are forks of one server per test session:

* ``run("train", path)`` is ``subprocess.run([sys.executable, "-m", "megaloop", "train", path], capture_output=True, text=True)``,
* ``start("train", path)`` the ``Popen`` of it,

with the arguments, environment, working directory, exit code and output of a real command. Where the command starts Python
modules of its own (the local launcher its ranks, a bench its runs), these are forks of it. What really is executed as a
user's shell would is asked for by ``fresh=True``: a few tests, one of each kind, so that nothing rests on what the server
has imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import runpy
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Command", "children", "run", "server", "start"]

_PR_SET_PDEATHSIG = 1


def server() -> ForkServerContext:
    """The server that everything is forked from; started by the first fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def run(
    *arguments: object,
    module: str = "megaloop",
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300.0,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """A command from start to end, with what it printed.

    Args:
        fresh: a new interpreter, as a user's shell starts it.
    """
    if fresh:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)
    process = Command(*arguments, module=module, env=env, cwd=cwd, merged=False)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.arguments, process.wait(), out.decode(), err.decode())


def start(*arguments: object, env: Mapping[str, str] | None = None, **options: Any) -> Command:
    """A command that goes on beside the test; its standard error is in its output."""
    return Command(*arguments, env=env, **options)


def children(pid: int) -> list[int]:
    """The children of a process, in the order in which it started them."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Command:
    """A command that runs, with what tests use of :class:`subprocess.Popen`.

    Args:
        module: what ``python -m`` would run.
        merged: standard error goes where standard output goes.
        ignored: signals that it ignores from the start, as under ``nohup``.
        setup: called in its process first, with ``setup_arguments``; what it changes there, the ranks that the process
            starts have as well. Defined at the top of a module.
    """

    def __init__(
        self,
        *arguments: object,
        module: str = "megaloop",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        merged: bool = True,
        ignored: tuple[signal.Signals, ...] = (),
        setup: Callable[..., None] | None = None,
        setup_arguments: tuple[Any, ...] = (),
    ) -> None:
        self.arguments = [module, *map(str, arguments)]
        self._read: dict[int, bytearray] = {}
        self._pipes: list[int] = []
        ends = []
        for _ in range(1 if merged else 2):
            ours, theirs = os.pipe()
            self._pipes.append(ours)
            ends.append(theirs)
        environment = dict(os.environ if env is None else env)
        task = (self.arguments, environment, os.fspath(cwd or Path.cwd()), ignored, setup, setup_arguments)
        self._process: ForkServerProcess = server().Process(
            target=_become, args=(*task, *(_Inherited(end) for end in ends)), daemon=False
        )
        self._process.start()
        for end in ends:
            os.close(end)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code (-N where signal N ended it); :class:`subprocess.TimeoutExpired` where it goes on."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """All of its output and, where it is not merged, of its errors; then it has ended.

        A command that has not ended in time is killed, and :class:`subprocess.TimeoutExpired` raised with its output.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            for pipe in self._pipes:
                selector.register(pipe, selectors.EVENT_READ)
                self._read.setdefault(pipe, bytearray())
            while selector.get_map():
                left = None if deadline is None else deadline - time.monotonic()
                ready = selector.select(left) if left is None or left > 0 else []
                if not ready:
                    self.kill()
                    raise subprocess.TimeoutExpired(self.arguments, timeout or 0, bytes(self._read[self._pipes[0]]))
                for key, _ in ready:
                    if data := os.read(key.fd, 65536):
                        self._read[key.fd] += data
                    else:
                        selector.unregister(key.fd)
        self.wait(None if deadline is None else max(deadline - time.monotonic(), 1))
        out, *err = (bytes(self._read[pipe]) for pipe in self._pipes)
        return out, err[0] if err else b""

    def __del__(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                os.close(pipe)


class _Inherited:
    """A file descriptor that goes to the process that is started."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(self._descriptor),)


def _received(duplicate: Any) -> int:
    return int(duplicate.detach())


# --- in the processes ---


def _become(
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    ignored: tuple[int, ...],
    setup: Callable[..., None] | None,
    setup_arguments: tuple[Any, ...],
    *outputs: int,
) -> NoReturn:
    """Run a module as ``python -m`` would, in a process that the server has forked."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no command outlives the tests
    os.dup2(outputs[0], 1)
    os.dup2(outputs[-1], 2)
    for output in outputs:
        os.close(output)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    subprocess.Popen = _ForkingPopen  # type: ignore[misc]
    if setup is not None:
        setup(*setup_arguments)
    _run_module(arguments)


def _run_module(arguments: list[str]) -> NoReturn:
    """The rest of a process's life, and its exit code."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    gc.freeze()  # nothing that was imported before is ever collected, whatever descriptors it holds
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [sys.executable, *arguments[1:]]
    code: object = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
        if code is not None and not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BrokenPipeError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


class _ForkingPopen(subprocess.Popen):  # type: ignore[type-arg]
    """Starts Python modules as forks of this process, and everything else as usual."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int, errread: int, errwrite: int, *rest: Any) -> None:  # fmt: skip
        command = args if isinstance(args, list) else []
        if command[:2] != [sys.executable, "-m"]:
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *rest,
            )  # fmt: skip
            return
        process_group, new_session = rest[-1], rest[-2]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                if new_session:
                    os.setsid()
                elif process_group >= 0:
                    os.setpgid(0, process_group)
                for source, target in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2)):
                    if source >= 0:
                        os.dup2(source, target)
                for name in os.listdir("/proc/self/fd"):
                    if int(name) > 2 and int(name) not in pass_fds:
                        with contextlib.suppress(OSError):
                            os.close(int(name))
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGCHLD):
                    if signal.getsignal(number) != signal.SIG_IGN:
                        signal.signal(number, signal.SIG_DFL)
                if cwd is not None:
                    os.chdir(cwd)
                if env is not None:
                    os.environ.clear()
                    os.environ.update(env)
                _run_module(list(command[2:]))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
