"""What a stage of a run takes of each rank's memory, and how well its pipeline is filled: arithmetic, no ranks needed.

Weights, gradients and optimizer state are what DeepSpeed's ZeRO-1 allocates under this project's settings, to the byte
(``tests/plan/test_memory.py`` measures a real engine); activations are those of :mod:`megaloop.plan.activations`,
times the micro-batches that a pipeline stage has in flight. Not counted: buffers of collectives, of the reduction of
gradients and of the optimizer's step, which come when the activations have gone; the allocator's fragmentation; and
what CUDA and NCCL take for themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megaloop.config import Config
from megaloop.depth import DepthPlan, LayerCall
from megaloop.layout.partition import StageMap, owned_layers, slices_for
from megaloop.layout.placement import local_box, stage_parameters, zero_share
from megaloop.layout.rounds import Rounds
from megaloop.layout.topology import Topology
from megaloop.model.parameters import ParameterSpec
from megaloop.plan.activations import (
    element_bytes,
    head_activations,
    layer_activations,
    logits_bytes,
    mask_bytes,
    stream_bytes,
)

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
    slices: StageMap,
) -> tuple[RankBudget, ...]:
    """What a rank of each pipeline stage holds during training.

    Args:
        specs: every parameter of the plan, as :func:`megaloop.model.parameter_specs` lists them.
        slices: which pipeline rank runs what in which round.
    """
    return tuple(_rank_budget(config, specs, plan, topology, slices, pp) for pp in range(topology.pp))


def in_flight(rounds: Rounds, pp: int) -> int:
    """Slices, of whatever micro-batch and round, whose activations a pipeline rank holds at a time, at most."""
    held = most = 0
    for work in rounds.beginning().passes(pp):  # as many as later
        held += -1 if work.backward else 1
        most = max(most, held)
    return most


def _rank_budget(
    config: Config,
    specs: Mapping[str, ParameterSpec],
    plan: DepthPlan,
    topology: Topology,
    slices: StageMap,
    pp: int,
) -> RankBudget:
    sizes = {name: local_box(specs[name], 0, topology.tp).numel for name in stage_parameters(specs, plan, slices, pp)}
    share = sum(
        zero_share(sum(size for name, size in sizes.items() if specs[name].decay == decay), topology.dp)
        for decay in (True, False)
    )
    parameters, padded = sum(sizes.values()), share * topology.dp
    micro_batches = config.train.micro_batches(topology.dp)
    return RankBudget(
        layers=owned_layers(plan, slices, pp),
        parameters=parameters,
        weights=element_bytes(config) * padded,
        # the fp32 sums of bf16 gradients are a flat buffer, padded like the weights; otherwise each is its own tensor
        gradients=4 * padded + 2 * parameters if config.train.precision == "bf16" else 4 * parameters,
        optimizer=12 * share,
        activations=_activations(config, plan, topology, slices, pp, specs["embedding.weight"].shape[0]),
        micro_batches=in_flight(Rounds(topology.pp, micro_batches, len(slices)), pp),
    )


def _activations(
    config: Config, plan: DepthPlan, topology: Topology, slices: StageMap, pp: int, vocab_size: int
) -> int:
    """Bytes of activations at their most: all slices in flight, and the backward pass of one at work.

    A loop that runs differently often is counted at its most.
    """
    iterations = None if plan.loop is None else config.loop_counts.of(plan.loop.iterations).largest
    if iterations is not None:
        slices = slices_for(plan, slices, iterations)
    calls = plan.calls(iterations)
    if plan.style.gate:
        return _gate_activations(config, calls, vocab_size)
    length = config.data.sequence_length
    tokens = config.train.micro_batch * length
    micro_batches = config.train.micro_batches(topology.dp)
    rounds = Rounds(topology.pp, micro_batches, len(slices))
    layer, stream = layer_activations(config, topology.tp), stream_bytes(config, topology.tp)
    head = head_activations(config, topology.tp, vocab_size)
    last = pp == topology.pp - 1

    def kept(number: int) -> int:
        """Of one micro-batch, from its forward pass through the rank's slice of a round to its backward pass."""
        is_first, is_last = pp == 0 and number == 0, last and number == len(slices) - 1
        live = [call for call in calls[slice(*slices[number][pp])] if not call.is_frozen(config.loop.backprop)]
        size = len(live) * layer.kept + (8 * tokens if is_first else stream)  # token ids are 8 bytes
        for call in live:  # a loop's adapter keeps both of its inputs, its norm keeps one
            size += 2 * stream * (call.is_first and plan.style.injection == "concat")
            size += stream * (call.is_last and plan.style.norm)
        if config.train.recompute != "none" and mask_bytes(config):
            size += tokens * length  # the boolean mask waits for the layers to run again
        return size + (head.kept + 8 * tokens if is_last else stream)  # and the targets; or the output

    held = most = 0
    sizes = [kept(number) for number in range(len(slices))]
    for work in rounds.beginning().passes(pp):
        held += -sizes[work.round] if work.backward else sizes[work.round]
        most = max(most, held)
    # the logits are there until their loss is known; the gradient of bf16 ones, which comes later, is as large and counted
    logits = logits_bytes(config, topology.tp, vocab_size) if config.train.precision != "bf16" else 0
    working = max(layer.working, head.working + logits) if last else layer.working
    fixed = length * config.model.head_size * element_bytes(config)  # rotary tables
    if topology.pp > 1:
        # of each neighbour that sends, two messages ahead; and one on its way out to it
        fixed += 3 * stream * (2 if len(slices) > 1 else (pp > 0) + (not last))
    return most + working + fixed


def _gate_activations(config: Config, calls: Sequence[LayerCall], vocab_size: int) -> int:
    """Bytes of activations at their most where a gate is trained: one rank, one micro-batch, read out after each iteration.

    With the model frozen a layer keeps nothing; only the states that the gate sees stay.
    """
    layer, stream, head = layer_activations(config, 1), stream_bytes(config, 1), head_activations(config, 1, vocab_size)
    tokens = config.train.micro_batch * config.data.sequence_length
    logits = logits_bytes(config, 1, vocab_size)
    iterations = sum(call.is_last for call in calls)
    fixed = config.data.sequence_length * config.model.head_size * element_bytes(config) + 24 * tokens
    if config.loop.gate_training == "frozen":
        # at most three tensors of the MLP's width at a time, beside the stream, its norm and what attention made of it
        mlp = 3 * tokens * config.model.ffn_size * element_bytes(config)
        return fixed + (iterations + 5) * stream + max(mlp, logits + head.working)
    # the gate works in fp32, and keeps its input
    states = (iterations - 1) * (4 * tokens * config.model.hidden_size if config.train.precision == "bf16" else 0)
    looped = [call for call in calls if call.iteration is not None]
    coda = len(calls) - 1 - max(index for index, call in enumerate(calls) if call.iteration is not None)
    before = len(calls) - coda - len(looped)
    kept = (before + len(looped) + iterations * coda) * layer.kept + iterations * (head.kept + head.working)
    kept += sum(2 * stream * (call.is_first and config.loop.injection == "concat") for call in looped)
    kept += iterations * stream * config.loop.norm
    return fixed + states + kept + max(layer.working, logits)
