"""What a run writes while it trains: ``metrics.jsonl``, ``events.jsonl`` and TensorBoard. See docs/RUNS.md."""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from megaloop.errors import MegaloopError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = [
    "EVENTS",
    "METRICS",
    "RANKS",
    "TENSORBOARD",
    "EventKind",
    "JsonLines",
    "MetricsWriter",
    "StepRecord",
    "is_at",
    "require_tensorboard",
    "timestamp",
    "write_event",
]

METRICS = "metrics.jsonl"
RANKS = "ranks.jsonl"
EVENTS = "events.jsonl"
TENSORBOARD = "tensorboard"

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}

EventKind = Literal[
    "start",
    "resume",
    "grow",
    "loop",
    "reshard",
    "save",
    "save_failed",
    "skip",
    "spike",
    "signal",
    "rollback",
    "stop",
    "changed",
    "schedule",
]


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as ``metrics.jsonl`` records it; None where a value is not known.

    Attributes:
        step: optimizer steps done, this one included: the first is 1.
        tokens: tokens predicted so far in the run, all ranks together.
        loss: mean training loss of the step's global batch, nats per token.
        lr: learning rate of the step.
        grad_norm: norm of the whole gradient before clipping.
        layers: unique layers.
        depth: layers executed per forward pass.
        flops: model FLOPs so far in the run (forward and backward, without recomputation).
        tokens_per_second: of this step, all ranks together.
        tflops: model TFLOP/s per rank in this step.
        mfu: ``tflops`` as a fraction of the device's peak.
        pp, tp, dp: the topology.
        seconds: wall-clock time of the step.
        memory_bytes: rank 0's peak on its GPU, or its resident set on a CPU.
        val_loss: validation loss after this step, nats per token.
        val_bits_per_byte: the same loss per byte of text, in bits.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float | None
    layers: int
    depth: int
    flops: int
    tokens_per_second: float | None
    tflops: float | None
    mfu: float | None
    pp: int
    tp: int
    dp: int
    seconds: float | None = None
    memory_bytes: int | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A value that JSON can hold: numbers that are not finite become null and are named under ``nonfinite``."""
        values = asdict(self)
        nonfinite = {key: str(value) for key, value in values.items() if not _is_finite(value)}
        values |= dict.fromkeys(nonfinite)
        return values | ({"nonfinite": nonfinite} if nonfinite else {})


class JsonLines:
    """A file of one JSON object per line, appended to line by line; every line is whole and written at once.

    Lines that find no room on the disk wait in memory, and are written, in order, before the next that finds some.

    Raises:
        MegaloopError: the file cannot be written; what it held is left as it was.
    """

    def __init__(self, path: Path):
        self.path = path
        self._waiting: deque[bytes] = deque()
        try:
            self._file = path.open("ab", buffering=0)
            _drop_torn_line(path)
        except OSError as error:
            raise _cannot_write(path, error) from None

    @property
    def waiting(self) -> int:
        """How many lines wait for room on the disk."""
        return len(self._waiting)

    @property
    def lost(self) -> bool:
        """Whether the file was deleted, moved or replaced: what is appended would never be seen again."""
        return not is_at(self.path, self._file.fileno())

    def append(self, value: dict[str, Any]) -> None:
        self._waiting.append(json.dumps(value, allow_nan=False).encode() + b"\n")
        try:
            self._write_waiting()
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise _cannot_write(self.path, error) from None

    def _write_waiting(self) -> None:
        while self._waiting:
            line, size, written = self._waiting[0], os.fstat(self._file.fileno()).st_size, 0
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                os.ftruncate(self._file.fileno(), size)
                raise
            self._waiting.popleft()

    def close(self) -> None:
        """Write what waits, and close the file."""
        try:
            self._write_waiting()
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        finally:
            self._file.close()


class MetricsWriter:
    """Writes the metrics and events of a run; on rank 0 only.

    Args:
        run_dir: the run's directory, which exists.
        tensorboard: write TensorBoard files too.
        start_step: optimizer steps already done; TensorBoard hides what a killed run wrote after it.

    Raises:
        MegaloopError: TensorBoard is wanted but not installed; a file cannot be written.
    """

    def __init__(self, run_dir: Path, tensorboard: bool, *, start_step: int = 0):
        self._metrics = JsonLines(run_dir / METRICS)
        self._events = JsonLines(run_dir / EVENTS)
        self._ranks = JsonLines(run_dir / RANKS)
        self._tensorboard = _open_tensorboard(run_dir / TENSORBOARD, start_step) if tensorboard else None

    def step(self, record: StepRecord) -> None:
        """Record a step: one line of ``metrics.jsonl``, and TensorBoard's scalars."""
        self._metrics.append(record.to_json())
        with self._tensorboard_may_fail():
            if self._tensorboard is not None:
                _write_scalars(self._tensorboard, record)

    def event(
        self, kind: EventKind, step: int, *, seconds: float | None = None, bytes: int | None = None, **fields: Any
    ) -> None:
        """Record something that happened after ``step`` steps.

        Args:
            seconds: how long it took.
            bytes: how much was written or moved.
            fields: what else there is to say of it; values that JSON can hold.
        """
        self._events.append(_event(kind, step, seconds, bytes, fields))
        with self._tensorboard_may_fail():
            if self._tensorboard is not None:
                self._tensorboard.flush()

    def ranks(self, values: dict[str, Any]) -> None:
        """Record what each rank did in a step: one line of ``ranks.jsonl``."""
        self._ranks.append(values)

    @property
    def waiting(self) -> int:
        """How many lines wait for room on the disk."""
        return self._metrics.waiting + self._events.waiting

    @property
    def lost(self) -> bool:
        """Whether one of the files was deleted, moved or replaced."""
        return self._metrics.lost or self._events.lost or self._ranks.lost

    def close(self) -> None:
        with ExitStack() as stack:  # each is closed, whatever happens to the others
            stack.callback(self._ranks.close)
            stack.callback(self._events.close)
            stack.callback(self._metrics.close)
            with self._tensorboard_may_fail():
                if self._tensorboard is not None:
                    self._tensorboard.close()

    @contextmanager
    def _tensorboard_may_fail(self) -> Iterator[None]:
        """Its writer does not survive a full disk; the run does, and has the same values in ``metrics.jsonl``."""
        try:
            yield
        except OSError:
            self._tensorboard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_event(
    run_dir: Path, kind: EventKind, step: int, *, seconds: float | None = None, bytes: int | None = None, **fields: Any
) -> None:
    """Append one event without a writer at hand; see :meth:`MetricsWriter.event`."""
    lines = JsonLines(run_dir / EVENTS)
    try:
        lines.append(_event(kind, step, seconds, bytes, fields))
    finally:
        lines.close()


def _event(kind: str, step: int, seconds: float | None, size: int | None, fields: dict[str, Any]) -> dict[str, Any]:
    own = {"event": kind, "step": step, "time": timestamp(), "seconds": seconds, "bytes": size}
    if clash := own.keys() & fields.keys():
        raise ValueError(f"an event's own keys cannot be given again: {sorted(clash)}")
    return own | {key: value if _is_finite(value) else None for key, value in fields.items()}


def timestamp() -> str:
    """Now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file; where the file system fails to answer, nothing speaks against it."""
    try:
        there, own = path.stat(), os.fstat(descriptor)
    except OSError as error:
        return error.errno not in _NOT_THERE
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _drop_torn_line(path: Path) -> None:
    """Cut off a last line without an end: the process that wrote it was killed in between."""
    with path.open("r+b") as file:
        position = file.seek(0, os.SEEK_END)
        tail = b""
        while position > 0 and b"\n" not in tail:
            start = max(0, position - 65536)
            file.seek(start)
            tail = file.read(position - start)
            position = start
        file.truncate(position + tail.rfind(b"\n") + 1)


def require_tensorboard() -> type[SummaryWriter]:
    """TensorBoard's writer.

    Raises:
        MegaloopError: it is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MegaloopError(
            "logging.tensorboard is true, but the tensorboard package is not installed: "
            "pip install tensorboard, or set logging.tensorboard=false"
        ) from None
    return SummaryWriter


def _open_tensorboard(path: Path, start_step: int) -> SummaryWriter:
    return require_tensorboard()(str(path), purge_step=start_step + 1)


_SCALARS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "val_loss": "validation/loss",
    "val_bits_per_byte": "validation/bits_per_byte",
    "tokens_per_second": "speed/tokens_per_second",
    "tflops": "speed/tflops",
    "mfu": "speed/mfu",
    "memory_bytes": "speed/memory_bytes",
    "tokens": "progress/tokens",
    "flops": "progress/flops",
    "layers": "depth/layers",
    "depth": "depth/depth",
}


def _write_scalars(tensorboard: SummaryWriter, record: StepRecord) -> None:
    for key, tag in _SCALARS.items():
        value = getattr(record, key)
        if value is not None:
            tensorboard.add_scalar(tag, value, record.step)
    if record.val_loss is not None:
        tensorboard.flush()


def _cannot_write(path: Path, error: OSError) -> MegaloopError:
    return MegaloopError(
        f"{path}: cannot be written ({error.strerror or error}); "
        "make room or mend the permissions, then go on with --resume"
    )
