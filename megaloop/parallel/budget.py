"""What a stage of a run takes of each rank's memory, and how well its pipeline is filled: arithmetic, no ranks needed.

Weights, gradients and optimizer state are what DeepSpeed's ZeRO-1 allocates under this project's settings, to the byte
(``tests/parallel/test_budget.py`` measures a real engine); activations are those of :mod:`megaloop.model.activations`,
times the micro-batches that a pipeline stage has in flight. Not counted: buffers of collectives, of the reduction of
gradients and of the optimizer's step, which come when the activations have gone; the allocator's fragmentation; and
what CUDA and NCCL take for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megaloop.config import Config
from megaloop.depth import DepthPlan
from megaloop.model.activations import (
    element_bytes,
    head_activations,
    layer_activations,
    logits_bytes,
    mask_bytes,
    stream_bytes,
)
from megaloop.model.parameters import ParameterSpec
from megaloop.parallel.reshard import local_box, stage_parameters, zero_share
from megaloop.parallel.topology import Topology

__all__ = ["RankBudget", "in_flight", "rank_budgets"]


@dataclass(frozen=True)
class RankBudget:
    """What each rank of a pipeline stage holds; all its ranks hold equally much.

    Attributes:
        layers: ids of the stage's layers, in the order in which they run.
        parameters: of the rank (its tensor-parallel share; norms and a tied embedding on every rank that uses them).
        weights: bytes of the parameters in the training dtype.
        gradients: bytes. fp32: 4 per parameter. bf16: 6, the last micro-batch's in bf16 and their sum in fp32.
        optimizer: bytes of fp32 masters and Adam's two moments, 12 per parameter of the rank's 1/dp share.
        activations: bytes at their most.
        micro_batches: how many of them the stage holds activations of at a time.
    """

    layers: tuple[int, ...]
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    micro_batches: int

    @property
    def total(self) -> int:
        """Bytes at their most."""
        return self.weights + self.gradients + self.optimizer + self.activations


def rank_budgets(
    config: Config,
    specs: Mapping[str, ParameterSpec],
    plan: DepthPlan,
    topology: Topology,
    stages: tuple[tuple[int, int], ...],
) -> tuple[RankBudget, ...]:
    """What a rank of each pipeline stage holds during training.

    Args:
        specs: every parameter of the plan, as :func:`megaloop.model.parameter_specs` lists them.
        stages: [start, stop) positions of the plan per pipeline stage.
    """
    return tuple(_rank_budget(config, specs, plan, topology, stages, pp) for pp in range(topology.pp))


def in_flight(pp: int, pipeline_stages: int, micro_batches: int) -> int:
    """Micro-batches that pipeline stage ``pp`` has run forward and not yet backward, at most.

    Under 1F1B (arXiv 1806.03377), as DeepSpeed's TrainSchedule runs it, the first stage has the most.
    """
    return min(pipeline_stages - pp, micro_batches)


def _rank_budget(
    config: Config,
    specs: Mapping[str, ParameterSpec],
    plan: DepthPlan,
    topology: Topology,
    stages: tuple[tuple[int, int], ...],
    pp: int,
) -> RankBudget:
    sizes = {name: local_box(specs[name], 0, topology.tp).numel for name in stage_parameters(specs, plan, stages, pp)}
    share = sum(
        zero_share(sum(size for name, size in sizes.items() if specs[name].decay == decay), topology.dp)
        for decay in (True, False)
    )
    parameters, padded = sum(sizes.values()), share * topology.dp
    micro_batches = config.train.global_batch // (config.train.micro_batch * topology.dp)
    return RankBudget(
        layers=plan.order[slice(*stages[pp])],
        parameters=parameters,
        weights=element_bytes(config) * padded,
        # the fp32 sums of bf16 gradients are a flat buffer, padded like the weights; otherwise each is its own tensor
        gradients=4 * padded + 2 * parameters if config.train.precision == "bf16" else 4 * parameters,
        optimizer=12 * share,
        activations=_activations(config, topology, stages, pp, specs["embedding.weight"].shape[0]),
        micro_batches=in_flight(pp, topology.pp, micro_batches),
    )


def _activations(
    config: Config, topology: Topology, stages: tuple[tuple[int, int], ...], pp: int, vocab_size: int
) -> int:
    """Bytes of activations at their most: all micro-batches in flight, and the backward pass of one at work."""
    first, last = pp == 0, pp == topology.pp - 1
    start, stop = stages[pp]
    length = config.data.sequence_length
    tokens = config.train.micro_batch * length
    micro_batches = config.train.global_batch // (config.train.micro_batch * topology.dp)
    layer, stream = layer_activations(config, topology.tp), stream_bytes(config, topology.tp)

    # DeepSpeed keeps a micro-batch's input (token ids: 8 bytes) and works on a copy of it
    kept = (stop - start) * layer.kept + (2 * 8 * tokens if first else stream)
    if config.train.recompute != "none" and mask_bytes(config):
        kept += tokens * length  # the boolean mask waits for the layers to run again
    working = layer.working
    fixed = length * config.model.head_size * element_bytes(config)  # rotary tables
    if not first:
        fixed += stream  # where activations are received
    if last:
        head = head_activations(config, topology.tp, vocab_size)
        kept += head.kept + 8 * tokens  # and the targets
        working = max(working, head.working)
        # DeepSpeed drops the logits of a micro-batch when those of the next but one take their place
        fixed += min(2, micro_batches) * logits_bytes(config, topology.tp, vocab_size)
    else:
        kept += stream  # the output
        fixed += stream  # where gradients are received
    return in_flight(pp, topology.pp, micro_batches) * kept + working + fixed
