"""Where a run's steps and events go: its files, TensorBoard, and whatever else is a :class:`Sink`. See docs/RUNS.md.

A tracker is a class more, with the methods that it has a use for, and a line where rank 0's sinks are opened
(:meth:`megaloop.train.report.RunReporter.__enter__`)::

    class WeightsAndBiases(Sink):
        def __init__(self, run: wandb.Run):
            self._run = run

        def step(self, record: StepRecord) -> None:
            self._run.log(record.to_json(), step=record.step)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megaloop.errors import MegaloopError
from megaloop.runs.events import DiskFull, Event
from megaloop.runs.metrics import EVENTS, METRICS, RANKS, RanksRecord, StepRecord
from megaloop.runs.records import JsonLines

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TENSORBOARD", "Hub", "RunFiles", "Sink", "TensorBoard", "append_event", "require_tensorboard"]

TENSORBOARD = "tensorboard"


class Sink:
    """Takes what a run tells, on rank 0; this one does nothing with it."""

    @property
    def waiting(self) -> int:
        """How many records it could not write yet, as the disk is full."""
        return 0

    @property
    def lost(self) -> bool:
        """What it wrote was deleted, moved or replaced: nobody would see what it writes from now on."""
        return False

    def step(self, record: StepRecord) -> None:
        """An optimizer step was done."""

    def ranks(self, record: RanksRecord) -> None:
        """What each rank did in a step; every ``logging.ranks_every`` steps."""

    def event(self, event: Event) -> None:
        """Something happened."""

    def close(self) -> None:
        """Nothing more will come."""


class Hub(Sink):
    """Sends what a run tells to all sinks, in the order in which they were added; ranks other than 0 have none."""

    def __init__(self) -> None:
        self._sinks: list[Sink] = []
        self._open = ExitStack()

    def add(self, sink: Sink) -> None:
        self._open.callback(sink.close)
        self._sinks.append(sink)

    @property
    def waiting(self) -> int:
        return sum(sink.waiting for sink in self._sinks)

    @property
    def lost(self) -> bool:
        return any(sink.lost for sink in self._sinks)

    def step(self, record: StepRecord) -> None:
        with self._telling_of_a_full_disk(record.step):
            for sink in self._sinks:
                sink.step(record)

    def ranks(self, record: RanksRecord) -> None:
        for sink in self._sinks:
            sink.ranks(record)

    def event(self, event: Event) -> None:
        with self._telling_of_a_full_disk(event.step):
            for sink in self._sinks:
                sink.event(event)

    @contextmanager
    def _telling_of_a_full_disk(self, step: int) -> Iterator[None]:
        """What finds no room is kept by its sink; that this begins is an event of its own, which no file records."""
        waited = self.waiting
        yield
        if self.waiting and not waited:
            for sink in self._sinks:
                sink.event(DiskFull(step))

    def close(self) -> None:
        """Close the sinks, the last one first, each whatever happens to the others."""
        self._open.close()


class RunFiles(Sink):
    """``metrics.jsonl``, ``events.jsonl`` and ``ranks.jsonl`` of a run's directory, which exists.

    Raises:
        MegaloopError: a file cannot be written.
    """

    def __init__(self, run_dir: Path):
        self._metrics = JsonLines(run_dir / METRICS)
        self._events = JsonLines(run_dir / EVENTS)
        self._ranks = JsonLines(run_dir / RANKS)

    def step(self, record: StepRecord) -> None:
        self._metrics.append(record.to_json())

    def ranks(self, record: RanksRecord) -> None:
        self._ranks.append(record.to_json())

    def event(self, event: Event) -> None:
        if event.kind is not None:
            self._events.append(event.to_json())

    @property
    def waiting(self) -> int:
        """Lines of metrics and events."""
        return self._metrics.waiting + self._events.waiting

    @property
    def lost(self) -> bool:
        return self._metrics.lost or self._events.lost or self._ranks.lost

    def close(self) -> None:
        with ExitStack() as stack:  # each is closed, whatever happens to the others
            stack.callback(self._ranks.close)
            stack.callback(self._events.close)
            stack.callback(self._metrics.close)


def append_event(run_dir: Path, event: Event) -> None:
    """Record one event without sinks at hand."""
    lines = JsonLines(run_dir / EVENTS)
    try:
        lines.append(event.to_json())
    finally:
        lines.close()


# --- TensorBoard ---


class TensorBoard(Sink):
    """The scalars of steps, in TensorBoard's own files.

    Its writer does not survive a full disk; the run does, and has the same values in ``metrics.jsonl``.

    Args:
        start_step: optimizer steps already done; TensorBoard hides what a killed run wrote after it.

    Raises:
        MegaloopError: it is not installed.
    """

    def __init__(self, path: Path, *, start_step: int = 0):
        self._writer: SummaryWriter | None = require_tensorboard()(str(path), purge_step=start_step + 1)

    def step(self, record: StepRecord) -> None:
        self._try(lambda writer: _write_scalars(writer, record))

    def event(self, event: Event) -> None:
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, work: Callable[[SummaryWriter], None]) -> None:
        if self._writer is None:
            return
        try:
            work(self._writer)
        except OSError:
            self._writer = None


def _write_scalars(writer: SummaryWriter, record: StepRecord) -> None:
    for key, tag in _SCALARS.items():
        value = getattr(record, key)
        if value is not None:
            writer.add_scalar(tag, value, record.step)
    if record.val_loss is not None:
        writer.flush()


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
