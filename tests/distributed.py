"""Run functions on several real ranks: processes of their own that talk over gloo.

``run_ranks(2, function, *args)`` starts two ranks, calls the function in both and returns their results in
rank order. ``RankPool(2)`` keeps the ranks alive for many calls; fixtures ``ranks_2`` and ``ranks_4`` hold one pool
each for the whole test session. Ranks are forks of a server that has imported what they need (:mod:`tests.processes`).

A function is sent by name, so it must be defined at the top of a module; arguments and results travel by
value. While it runs, torch.distributed is initialised and RANK, WORLD_SIZE and LOCAL_RANK are set.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, Self

from tests.processes import server

__all__ = ["RankError", "RankPool", "run_ranks"]

_GRACE = 5.0
"""Seconds that the other ranks get to report after one has failed, before they count as stuck."""


class RankError(AssertionError):
    """A function failed on a rank: the traceback of the first that failed is the message.

    Attributes:
        rank: the rank that failed first, or -1 where none reported in time.
        error: its exception, where that can be pickled; otherwise None.
    """

    def __init__(self, message: str, rank: int, error: BaseException | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.error = error


class RankPool:
    """Ranks that stay alive and run many functions in turn.

    Started by the first call. A call that leaves a rank dead or stuck ends all of them; the next call starts
    new ones, and so it does where the function destroyed the process group: a second one in the same processes
    does not always get on with what DeepSpeed and gloo remember of the first. Otherwise they go on being used.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._ranks: list[tuple[BaseProcess, Connection]] = []
        self._store: Any = None
        self._left_group = False

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 400.0, init: bool = True, **kwargs: Any
    ) -> list[Any]:
        """Call ``function(*args, **kwargs)`` on every rank.

        Args:
            function: defined at the top of a module.
            timeout: seconds after which the ranks are killed.
            init: initialise torch.distributed first, where it is not.

        Returns:
            The results, in rank order.

        Raises:
            RankError: a rank raised, died, or did not finish in time.
        """
        if not self._ranks:
            self._start()
        task = pickle.dumps((function.__module__, function.__qualname__, args, kwargs, init))
        for process, connection in self._ranks:
            try:
                connection.send_bytes(task)
            except OSError:
                self.close()
                raise RankError(f"{process.name} had died before {function.__qualname__} began", -1) from None
        return self._collect(function.__qualname__, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
        for process, _ in self._ranks:
            process.join()
        self._ranks, self._store = [], None

    def _start(self) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # the store lives here and its port is chosen by the system: no race for a free port
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = server()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, self._store.port, theirs)
            process = context.Process(target=_serve, args=arguments, name=f"rank {rank}", daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _collect(self, name: str, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        self._left_group = False
        failure: RankError | None = None
        waiting = {connection: rank for rank, (_, connection) in enumerate(self._ranks)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                stuck = sorted(waiting.values())
                self.close()
                raise failure or RankError(f"{name}: ranks {stuck} did not finish within {timeout:g} s", -1)
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[call-overload]
                error = self._read(rank, connection, name, results)  # type: ignore[arg-type]
                if error is not None and failure is None:
                    failure = error
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if self._left_group or not all(process.is_alive() for process, _ in self._ranks):
            self.close()
        if failure is not None:
            raise failure
        return [results[rank] for rank in range(self.world_size)]

    def _read(self, rank: int, connection: Connection, name: str, results: dict[int, Any]) -> RankError | None:
        try:
            succeeded, value, left_group = pickle.loads(connection.recv_bytes())
            self._left_group = self._left_group or left_group
        except (EOFError, OSError):
            process = self._ranks[rank][0]
            process.join(_GRACE)
            code = process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            return RankError(f"{name}: rank {rank} died ({how})", rank)
        if succeeded:
            results[rank] = value
            return None
        text, error = value
        return RankError(f"{name}: rank {rank} of {self.world_size} failed:\n{text}", rank, error)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 400.0, **kwargs: Any
) -> list[Any]:
    """Call a function on ``world_size`` fresh ranks; see :meth:`RankPool.run`."""
    with RankPool(world_size) as pool:
        return pool.run(function, *args, timeout=timeout, **kwargs)


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    """The life of a rank: read a task, run it, report; until the pool closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the terminal's whole group; the pool ends its ranks
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        TORCHELASTIC_USE_AGENT_STORE="True",  # rank 0 connects to the pool's store instead of opening one
        TORCHELASTIC_RESTART_COUNT="0",
    )
    import torch

    torch.set_num_threads(1)
    number = 0
    while True:
        try:
            task = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        # part of the store's prefix: a group that was destroyed and is made again finds no old keys
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        number += 1
        answer = _answer(task)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(answer)


def _answer(task: bytes) -> bytes:
    """Run a task; the pickled (succeeded, result or (traceback, exception))."""
    init = False
    try:
        module, qualname, args, kwargs, init = pickle.loads(task)
        function: Any = importlib.import_module(module)
        for part in qualname.split("."):
            function = getattr(function, part)
        if init:
            _join()
        return pickle.dumps((True, function(*args, **kwargs), _left_group(init)))
    except BaseException as error:  # whatever it is, the test wants to see it
        text = traceback.format_exc()
        try:
            return _loadable((False, (text, error), _left_group(init)))
        except Exception:
            return pickle.dumps((False, (text, None), _left_group(init)))


def _left_group(joined: bool) -> bool:
    import torch.distributed as dist

    return joined and not dist.is_initialized()


def _loadable(value: Any) -> bytes:
    data = pickle.dumps(value)
    pickle.loads(data)  # an exception may pickle and yet not load
    return data


def _join() -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=300))
