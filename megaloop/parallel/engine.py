"""DeepSpeed's pipeline engine, built for a plan on a topology, behind the few calls that training needs."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaloop.config import Config
from megaloop.depth import DepthPlan
from megaloop.layout.partition import split_rounds
from megaloop.layout.pieces import StatePiece
from megaloop.layout.placement import SHARE_UNIT, Placement
from megaloop.layout.sources import StateSource
from megaloop.layout.topology import Coordinate, Topology
from megaloop.model import Kernels, Labels, build_adamw, choose_kernels, parameter_specs
from megaloop.parallel.replicas import differing_replicas
from megaloop.parallel.rounds_engine import RoundsEngine
from megaloop.parallel.state import LocalParameter, local_parameters, prime_moments, state_pieces, write_state
from megaloop.parallel.stopwatch import Stopwatch
from megaloop.runtime.device import local_device
from megaloop.runtime.dtype import training_dtype

__all__ = [
    "Batch",
    "StepResult",
    "TrainingEngine",
    "align_shares",
    "deepspeed_config",
    "join_ranks",
    "quietly",
]

Batch = tuple[Tensor | tuple[Tensor, Tensor], Labels]
"""(tokens [b, S], or (tokens, document indices)) and targets [b, S] (or they and the factors of their losses)."""


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
        import deepspeed

        device = local_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # asked for nothing but an op for inference on CPUs, which DeepSpeed would compile here for half a minute the first time
        deepspeed.ops.__compatible_ops__ = {}
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=30),
        )
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
        self._engine = self._build()
        self._rounds = self._open_rounds() if len(self.slices) > 1 else None
        self._groups = [group for group in _process_groups() if group not in groups_before]
        prime_moments(self._engine.optimizer, step)
        self.parameters: list[LocalParameter] = list(
            local_parameters(self._engine.module.stage, self.specs, topology, self.coordinate)
        )
        self._check_placement()
        if source is not None:
            write_state(self.parameters, source, self._engine.grid.get_data_parallel_group())

    def _check_placement(self) -> None:
        """What the engine holds is what the planner thinks: otherwise resharding would mix up values."""
        found = {(each.kind, each.piece) for each in self.pieces()}
        planned = set(self.placement.held_by(dist.get_rank()))
        if found != planned:
            differing = sorted({f"{kind} of {piece.name}" for kind, piece in found ^ planned})
            raise RuntimeError(f"DeepSpeed holds {differing[0]} and {len(differing) - 1} more otherwise than planned")

    def _build(self) -> Any:
        with quietly():
            import deepspeed
            from deepspeed.runtime.pipe.schedule import BackwardPass, ForwardPass

            from megaloop.parallel.pipeline import PipelinedDecoder

            config = self.config
            align_shares()
            module = PipelinedDecoder(
                config.model,
                self.vocab_size,
                self.plan,
                self.topology,
                self.slices,
                sequence_parallel=config.parallel.sequence_parallel,
                kernels=self.kernels,
                recompute=config.train.recompute,
            )
            if config.train.compile:
                module.stage.compile_layers()
            decayed = [p for name, p in module.stage.named_parameters() if self.specs[name].decay]
            others = [p for name, p in module.stage.named_parameters() if not self.specs[name].decay]
            options = config.optimizer
            groups = [
                {"params": decayed, "weight_decay": options.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ]
            optimizer = build_adamw(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=deepspeed_config(config, self.micro_batches)
            )
            instructions = engine._INSTRUCTION_MAP
            timed = {each: self.stopwatch.timing(instructions[each]) for each in (ForwardPass, BackwardPass)}
            engine._INSTRUCTION_MAP = {**instructions, **timed}
        return engine

    def _open_rounds(self) -> RoundsEngine:
        train, length = self.config.train, self.config.data.sequence_length
        local = length // self.topology.tp if self.config.parallel.sequence_parallel else length
        return RoundsEngine(
            self._engine,
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

    def train_step(self, batches: Iterator[Batch], lr: float, times: int | None = None) -> StepResult:
        """One optimizer step over ``micro_batches`` items of ``batches`` (ignored where ``needs_data`` is False).

        Args:
            times: how often the loop runs, the same on every rank; None: as often as the plan says.
        """
        stage = self._engine.module.stage
        stage.times, stage.backprop = times, self.config.loop.backprop
        self.stopwatch.reset()
        for group in self._engine.optimizer.optimizer.param_groups:
            group["lr"] = lr
        if self._rounds is not None:
            loss = self._rounds.train(batches, self.micro_batches)
        else:
            loss = self._engine.train_batch(data_iter=batches)
        return StepResult(float(loss), float(self._engine.get_global_grad_norm()), self._engine.was_step_applied())

    def evaluate(self, batches: Iterable[Batch], count: int) -> float:
        """Mean loss in nats per token over ``count`` micro-batches per data-parallel rank, at the plan's depth; no gradients."""
        self._engine.module.stage.times = None
        if self._rounds is not None:
            return float(self._rounds.evaluate(iter(batches), count))
        loss = self._engine.eval_batch(iter(batches), num_micro_batches=count)
        return float(loss)

    def pieces(self) -> list[StatePiece]:
        """This rank's state, for checkpoints and checks; views, not copies."""
        return state_pieces(self.parameters, self.specs, self.topology, self.coordinate)

    def differing_replicas(self) -> list[str]:
        """Names of tensors that ranks hold with different bits (collective; empty is good)."""
        return differing_replicas(self.pieces())

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers, and destroy the process groups of this topology.

        What :meth:`pieces` gave before stays valid for as long as it is held.
        """
        from deepspeed import comm

        # hooks on the last losses refer to the engine: a circle through autograd's graph, which no garbage collector sees
        self._rounds = None
        self._engine.loss = None
        self._engine.pipe_buffers = {key: [None] * len(slots) for key, slots in self._engine.pipe_buffers.items()}
        with quietly():
            self._engine.destroy()
            for group in self._groups:
                comm.destroy_process_group(group)
        del self._engine
        for local in self.parameters:
            # DeepSpeed hangs methods of a parameter on the parameter: a circle that the collector sees only once all else
            # is gone, too late for reshard, which freezes what is left; weights and bf16's sums of gradients stayed with it
            vars(local.parameter).clear()
        self._groups, self.parameters = [], []
        gc.collect()  # DeepSpeed's engine and its optimizer refer to each other


def deepspeed_config(config: Config, micro_batches: int) -> dict[str, Any]:
    """What DeepSpeed is told.

    Args:
        micro_batches: per optimizer step and data-parallel rank.
    """
    train = config.train
    return {
        "train_batch_size": train.global_batch,
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": config.optimizer.clip,
        # without contiguous buffers gradients are reduced from where they are, a copy less
        "zero_optimization": {"stage": 1, "contiguous_gradients": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": train.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        # left out, bf16 runs round their fp32 sums to bf16 here, with one replica too, and add replicas up in bf16
        "communication_data_type": "fp32",
        # activations of tensor-parallel ranks are whole (or split by sequence parallelism): send them as they are
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        "steps_per_print": 1 << 40,
    }


def align_shares() -> None:
    """Make ZeRO's shares whole vectors of the CPU: 16 elements, where DeepSpeed makes them multiples of 2.

    torch's fused Adam computes what is left over at the end of a share by other instructions, which may round otherwise.
    The two ends of a pipeline cut the tied embedding at different places: an ulp of difference, which then grows.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for optimizer in (BF16_Optimizer, DeepSpeedZeroOptimizer):
        # both set it to 2 in their constructors, which then use it: they keep this instead
        optimizer.nccl_start_alignment_factor = property(lambda self: SHARE_UNIT, lambda self, value: None)


def _process_groups() -> list[Any]:
    """All process groups of torch.distributed, in the order in which they were made."""
    return list(dist.distributed_c10d._world.pg_map)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silence the engine's start-up chatter (prints, log lines, deprecation warnings); errors pass."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
