"""What training needs of the library that owns gradients, replicas and the optimizer: a handful of calls, with types.

:mod:`megaloop.parallel.deepspeed` implements it on DeepSpeed, and is the only file that imports DeepSpeed. This one imports
nothing but torch, so that whatever only plans or reads a run stays free of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn

from megaloop.model import Labels

__all__ = ["Batch", "Fragment", "ScheduleEngine", "StepEngine"]

Batch = tuple[Tensor | tuple[Tensor, Tensor], Labels]
"""(tokens [b, S], or (tokens, document indices)) and targets [b, S] (or they and the factors of their losses)."""


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter whose optimizer state a rank holds.

    Attributes:
        start, stop: [start, stop) of the parameter's elements as this rank holds it, flat.
        master: their fp32 masters, a view.
        moments: their optimizer state by Adam's names (``exp_avg``, ``exp_avg_sq``), views.
    """

    start: int
    stop: int
    master: Tensor
    moments: dict[str, Tensor]


class StepEngine(Protocol):
    """Gradients, their reduction and the optimizer of one rank, for a module that it was opened with."""

    @property
    def data_parallel_group(self) -> dist.ProcessGroup:
        """This rank and its replicas."""
        ...

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        """The stages of this rank's pipeline."""
        ...

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Differentiate the roots and add what comes out to the step's gradients.

        Args:
            roots: outputs of the module, or a loss divided by the number of micro-batches.
            gradients: one for each root; None for a loss.
        """
        ...

    def finish_step(self) -> None:
        """Reduce gradients over tied copies, then over replicas; clip them, step the optimizer and clear them."""
        ...

    def set_lr(self, lr: float) -> None:
        """The learning rate of the steps to come, for all parameters."""
        ...

    @property
    def grad_norm(self) -> float:
        """L2 norm of the whole model's gradient in the last step, before clipping; each parameter counts once."""
        ...

    @property
    def step_applied(self) -> bool:
        """False where the last step's gradient was not finite: then nothing has changed, Adam's count of steps included."""
        ...

    def begin_optimizer(self, step: int) -> None:
        """Make the optimizer's state, zeros, as it is after ``step`` steps; before it, fragments have no moments."""
        ...

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Of which elements of a parameter this rank holds the optimizer's state; None: of none."""
        ...

    def is_copy(self, parameter: nn.Parameter) -> bool:
        """An earlier pipeline stage holds the same parameter, and counts and saves it."""
        ...

    def close(self, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        """Let go of hooks, buffers and gradients, and destroy process groups; what fragments gave stays valid."""
        ...


class ScheduleEngine(StepEngine, Protocol):
    """A step engine that has a schedule of its own, for benchmarks to compare with."""

    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        """One optimizer step in the engine's own schedule; the mean loss, on every rank."""
        ...
