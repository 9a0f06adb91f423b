"""A plan on a topology, ready to train: the stage of this rank, its schedule and its state, behind the few calls that training needs."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megaloop.config import Config
from megaloop.data import MicroBatch
from megaloop.depth import DepthPlan
from megaloop.layout.partition import split_rounds
from megaloop.layout.pieces import StatePiece
from megaloop.layout.placement import Placement
from megaloop.layout.sources import StateSource
from megaloop.layout.topology import Coordinate, Topology
from megaloop.model import Kernels, build_adamw, choose_kernels, parameter_specs
from megaloop.model.parameters import LOOP_GATE
from megaloop.parallel.replicas import differing_replicas
from megaloop.parallel.rounds_engine import RoundsEngine
from megaloop.parallel.state import LocalParameter, local_parameters, state_pieces, write_state
from megaloop.parallel.step_engine import StepEngine
from megaloop.parallel.stopwatch import Stopwatch
from megaloop.runtime.device import local_device
from megaloop.runtime.dtype import training_dtype

if TYPE_CHECKING:
    from megaloop.parallel.pipeline import PipelinedDecoder

__all__ = [
    "StepResult",
    "TrainingEngine",
    "join_ranks",
    "quietly",
]


def join_ranks() -> int:
    """Initialise torch.distributed and DeepSpeed's layer over it, from the launcher's environment.

    Returns:
        The world size.
    """
    # DeepSpeed sends activations by broadcast between two ranks, on purpose outside autograd
    warnings.filterwarnings("ignore", message="c10d::broadcast_: an autograd kernel was not registered")
    # and calls collectives by names that torch 2.13 has renamed
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    with quietly():
        from megaloop.parallel.deepspeed import init_distributed

        device = local_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        init_distributed("nccl" if device.type == "cuda" else "gloo", timedelta(minutes=30))
    # the objects of imported modules, a million, stay for good: a garbage collection that passes them over takes
    # milliseconds instead of a fifth of a second, and DeepSpeed asks for six when it builds an engine in bf16
    gc.freeze()
    return dist.get_world_size()


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step reports, equal on all ranks.

    Attributes:
        loss: mean cross-entropy of the global batch, nats per token.
        grad_norm: L2 norm of the whole model's gradient, before clipping; each parameter counts once.
        applied: False where the gradient was not finite: then nothing has changed, Adam's count of steps included.
    """

    loss: float
    grad_norm: float
    applied: bool = True


class TrainingEngine:
    """A plan on a topology, ready to train.

    Args:
        config: the run's configuration.
        plan: the layers to build.
        topology: as many ranks as torch.distributed has.
        vocab_size: rows of the embedding.
        source: where weights, masters and moments come from; None: whoever builds the engine fills them in.
        step: optimizer steps that the state has behind it, those that were skipped not counted.

    Attributes:
        slices: which pipeline rank runs which positions of the plan in which round.
        placement: which rank holds what.
        kernels: the kernels in use.
        coordinate: this rank's place.
        stopwatch: the time of this rank's forward and backward passes in the last training step.
    """

    def __init__(
        self,
        config: Config,
        plan: DepthPlan,
        topology: Topology,
        vocab_size: int,
        source: StateSource | None,
        step: int = 0,
    ):
        self.config, self.plan, self.topology, self.vocab_size = config, plan, topology, vocab_size
        self.coordinate: Coordinate = topology.coordinate(dist.get_rank())
        self.device = local_device()
        self.stopwatch = Stopwatch(self.device)
        dtype = training_dtype(config.train.precision)
        self.kernels: Kernels = choose_kernels(self.device, dtype, config.train.compile)
        self.specs = parameter_specs(config.model, plan, vocab_size)
        self.slices = split_rounds(config, plan, topology, vocab_size)
        self.placement = Placement.of(self.specs, plan, topology, self.slices)
        groups_before = set(_process_groups())
        with quietly():
            self._module = self._build()
            self._engine = self._open(self._module)
        self._rounds = self._open_rounds()
        self._groups = [group for group in _process_groups() if group not in groups_before]
        self._engine.begin_optimizer(step)
        self.parameters: list[LocalParameter] = list(
            local_parameters(self._engine, self._module.stage, self.specs, topology, self.coordinate)
        )
        self._check_placement()
        if source is not None:
            write_state(self.parameters, source, self._engine.data_parallel_group)
        if self._freezes_model:
            self._forget_moments()

    @property
    def _freezes_model(self) -> bool:
        """Only the loop's gate learns; everything else gets no gradient, no weight decay and no moments, so that no step moves it."""
        return self._module.gate is not None and self._module.gate.train == "frozen"

    def _forget_moments(self) -> None:
        """Those of all but the gate, as a run that trained the model left them: they would move it for a while."""
        for local in self.parameters:
            if local.name not in LOOP_GATE:
                for values in local.moments.values():
                    values.zero_()

    def _check_placement(self) -> None:
        """What the engine holds is what the planner thinks: otherwise resharding would mix up values."""
        found = {(state_piece.state_name, state_piece.piece) for state_piece in self.pieces()}
        planned = set(self.placement.held_by(dist.get_rank()))
        if found != planned:
            differing = sorted({f"{state_name} of {piece.name}" for state_name, piece in found ^ planned})
            raise RuntimeError(f"DeepSpeed holds {differing[0]} and {len(differing) - 1} more otherwise than planned")

    def _build(self) -> PipelinedDecoder:
        from megaloop.parallel.pipeline import PipelinedDecoder

        module = PipelinedDecoder(
            self.config.model,
            self.vocab_size,
            self.plan,
            self.topology,
            self.slices,
            sequence_parallel=self.config.parallel.sequence_parallel,
            kernels=self.kernels,
            recompute=self.config.train.recompute,
        )
        module.stage.backprop = self.config.loop.backprop
        module.gate = self.config.loop.gate if self.plan.style.gate else None
        if self.config.train.compile:
            module.stage.compile_layers()
        return module

    def _open(self, module: PipelinedDecoder) -> StepEngine:
        from megaloop.parallel.deepspeed import open_engine

        named, options = list(module.stage.named_parameters()), self.config.optimizer
        decayed = [p for name, p in named if self.specs[name].decay]
        others = [p for name, p in named if not self.specs[name].decay]
        decay = 0.0 if self._freezes_model else options.weight_decay
        groups = [
            {"params": decayed, "weight_decay": decay},
            {"params": others, "weight_decay": 0.0},
        ]
        adam = build_adamw(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)
        return open_engine(module, adam, self.config, self.micro_batches)

    def _open_rounds(self) -> RoundsEngine:
        train, length = self.config.train, self.config.data.sequence_length
        local = length // self.topology.tp if self.config.parallel.sequence_parallel else length
        return RoundsEngine(
            self._engine,
            self._module,
            self.plan,
            self.slices,
            self.topology,
            self.coordinate,
            (train.micro_batch, local, self.config.model.hidden_size),
            (train.micro_batch, length) if self.config.model.document_masking else None,
            self.stopwatch,
        )

    @property
    def micro_batches(self) -> int:
        """Micro-batches per optimizer step and data-parallel rank."""
        return self.config.train.micro_batches(self.topology.dp)

    @property
    def needs_data(self) -> bool:
        """This rank reads micro-batches: it holds an end of the pipeline."""
        return self.coordinate.pp in (0, self.topology.pp - 1)

    def train_step(self, batches: Iterator[MicroBatch], lr: float, iterations: int | None = None) -> StepResult:
        """One optimizer step over ``micro_batches`` items of ``batches`` (ignored where ``needs_data`` is False).

        Args:
            iterations: how often the loop runs, the same on every rank; None: as often as the plan says.
        """
        self.stopwatch.reset()
        self._engine.set_lr(lr)
        loss = self._rounds.train(batches, self.micro_batches, iterations)
        return StepResult(float(loss), self._engine.grad_norm, self._engine.step_applied)

    def evaluate(self, batches: Iterable[MicroBatch], count: int) -> float:
        """Mean loss in nats per token over ``count`` micro-batches per data-parallel rank, at the plan's depth; no gradients."""
        return float(self._rounds.evaluate(iter(batches), count))

    def pieces(self) -> list[StatePiece]:
        """This rank's state, for checkpoints and checks; views, not copies."""
        return state_pieces(self.parameters, self.specs, self.topology, self.coordinate)

    def differing_replicas(self) -> list[str]:
        """Names of tensors that ranks hold with different bits (collective; empty is good)."""
        return differing_replicas(self.pieces())

    def close(self) -> None:
        """Release the step engine's hooks and buffers, and destroy the process groups of this topology.

        What :meth:`pieces` gave before stays valid for as long as it is held.
        """
        del self._rounds
        with quietly():
            self._engine.close(self._groups)
        del self._engine, self._module
        self._groups, self.parameters = [], []
        gc.collect()  # DeepSpeed's engine and its optimizer refer to each other


def _process_groups() -> list[dist.ProcessGroup]:
    """All process groups of torch.distributed, in the order in which they were made."""
    return list(dist.distributed_c10d._world.pg_map)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence the engine's start-up chatter (prints, log lines, deprecation warnings); errors pass."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
