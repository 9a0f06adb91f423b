"""What ranks run in the tests of growth and resharding in flight."""

from __future__ import annotations

import weakref
from itertools import accumulate
from math import prod
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megaloop.config import Config
from megaloop.depth import DepthPlan, Operator, grow
from megaloop.layout.pieces import Box
from megaloop.layout.sources import InitialValues
from megaloop.layout.topology import Topology
from megaloop.layout.transfers import Moments
from megaloop.model import grown_from, initial_values
from megaloop.parallel.engine import TrainingEngine, join_ranks
from megaloop.parallel.live import Resharded, reshard
from tests.parallel.layouts import LR, VOCAB, inner_engine, micro_batches

Layout = tuple[int, int, int]


def morph(
    values: dict[str, Any],
    path: list[tuple[int, Layout, int]],
    operator: Operator = "lidas",
    moments: Moments = "copy",
) -> dict[str, Any]:
    """Train through stages of (layers, (pp, tp, dp), steps), growing in flight between them.

    Returns:
        losses, replicas that differ after each growth, and what each growth moved.
    """
    config = Config.model_validate(values)
    join_ranks()
    plan = DepthPlan.plain(path[0][0])
    engine = TrainingEngine(
        config, plan, Topology(*path[0][1]), VOCAB, InitialValues(config.model, config.seed, plan, VOCAB)
    )
    losses: list[float] = []
    differing: list[str] = []
    reports: list[dict[str, Any]] = []
    step = 0
    for layers, layout, steps in path:
        if step:
            growth = grow(engine.plan, operator, layers, 2)
            resharded = reshard(engine, growth, Topology(*layout), step, moments=moments)
            engine = resharded.engine
            differing += engine.differing_replicas()
            reports.append(_report(resharded))
        batches = micro_batches(config, engine.coordinate.dp, engine.topology.dp, step)
        losses += [engine.train_step(batches, LR).loss for _ in range(steps)]
        step += steps
    differing += engine.differing_replicas()
    groups = len(dist.distributed_c10d._world.pg_map)
    engine.close()
    return {
        "losses": losses,
        "differing": differing,
        "reports": reports,
        "groups": (groups, len(dist.distributed_c10d._world.pg_map)),
    }


def _report(resharded: Resharded) -> dict[str, Any]:
    return {
        "moved": resharded.plan.received(),
        "in_place": resharded.plan.in_place,
        "buffer": resharded.buffer_bytes,
        "largest_transfer": max((transfer.bytes for transfer in resharded.plan.transfers), default=0),
        "largest_tensor": max(4 * prod(spec.shape) for spec in resharded.engine.specs.values()),
        "state": sum(piece.data.numel() * piece.data.element_size() for piece in resharded.engine.pieces()),
        "seconds": (resharded.seconds, resharded.build_seconds, resharded.exchange_seconds),
    }


def compare_bits(
    values: dict[str, Any], before: Layout, after: Layout, operator: Operator = "lidas", moments: Moments = "copy"
) -> tuple[dict[str, int], list[str]]:
    """Train 4 layers, grow to 6 in flight, and hold every piece of this rank against what it should be, bit by bit.

    That is the parent's values; of a layer without a parent, its initial values and no moments.

    Returns:
        How many pieces were compared ("parent", "copy", "fresh"), and which of them differ.
    """
    engine = _trained(values, before, 3)
    whole = _gather(engine)
    assert all(bool(tensor.any()) for tensor in whole.values()), "state of zeros cannot show that it was kept"
    growth = grow(engine.plan, operator, 6, 2)
    engine = reshard(engine, growth, Topology(*after), 3, moments=moments).engine
    counts, differing = {"parent": 0, "copy": 0, "fresh": 0}, []
    for item in engine.pieces():
        piece = item.piece
        parent = grown_from(piece.name, growth)
        counts["fresh" if parent is None else "parent" if parent == piece.name else "copy"] += 1
        zeros = item.state_name in ("exp_avg", "exp_avg_sq") and (
            parent is None or (moments == "zero" and parent != piece.name)
        )
        if zeros:
            expected = torch.zeros(piece.numel, dtype=item.data.dtype)
        else:
            tensor = _initial(engine, piece.name) if parent is None else whole[item.state_name, parent]
            expected = tensor[piece.box.within(Box.whole(piece.shape))].reshape(-1)
            expected = expected[slice(*(piece.flat or (None, None)))].to(item.data.dtype)
        if _bits(item.data) != _bits(expected):
            differing.append(f"{item.state_name} of {piece.name}")
    engine.close()
    return counts, differing


def _trained(values: dict[str, Any], layout: Layout, steps: int) -> TrainingEngine:
    """An engine of 4 layers that has some steps behind it."""
    config = Config.model_validate(values)
    join_ranks()
    plan = DepthPlan.plain(4)
    source = InitialValues(config.model, config.seed, plan, VOCAB)
    engine = TrainingEngine(config, plan, Topology(*layout), VOCAB, source)
    batches = micro_batches(config, engine.coordinate.dp, engine.topology.dp)
    for _ in range(steps):
        engine.train_step(batches, LR)
    return engine


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def _initial(engine: TrainingEngine, name: str) -> Tensor:
    spec = engine.specs[name]
    return initial_values(name, spec, engine.config.seed, (0,) * len(spec.shape), spec.shape)


def _gather(engine: TrainingEngine) -> dict[tuple[str, str], Tensor]:
    """Every tensor of every kind, whole, put together from all ranks' pieces."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(
        everyone, [(item.state_name, item.piece, item.data.cpu().clone()) for item in engine.pieces()]
    )
    whole: dict[tuple[str, str], Tensor] = {}
    for state_name, piece, data in (item for pieces in everyone for item in pieces):
        tensor = whole.setdefault((state_name, piece.name), torch.full(piece.shape, torch.nan, dtype=data.dtype))
        region = tensor[piece.box.within(Box.whole(piece.shape))]
        flat = region.reshape(-1).clone()
        flat[slice(*(piece.flat or (None, None)))] = data.reshape(-1)
        region.copy_(flat.view(region.shape))
    return whole


def measure_memory(values: dict[str, Any], before: Layout, after: Layout) -> dict[str, int]:
    """Train 4 layers and grow to 6 in flight; what this rank allocates for it and what it lets go of, in bytes.

    Returns:
        old_state: what the old engine's pieces took.
        old_gradients: what its gradients took; ``kept_gradients``: of these, what is there when the new engine is built.
        kept_engines: old engines that are there then.
        kept_state: of the old state, what is there in the end.
        new_engine: what the new engine's state and gradients take.
        peak: the most that was allocated and not yet freed at a time, over what there was before.
    """
    engine = _trained(values, before, 2)
    deepspeed_engine = weakref.ref(inner_engine(engine))
    largest = max(4 * prod(spec.shape) for spec in engine.specs.values())
    state = _watched([piece.data for piece in engine.pieces()])
    gradients = _watched(_gradients(engine))
    found: dict[str, int] = {"largest_tensor": largest, "old_state": _left(state), "old_gradients": _left(gradients)}

    def build(*arguments: Any) -> TrainingEngine:
        found["kept_engines"] = int(deepspeed_engine() is not None)
        found["kept_gradients"] = _left(gradients)
        return TrainingEngine(*arguments)

    growth = grow(engine.plan, "lidas", 6, 2)
    with (
        mock.patch("megaloop.parallel.live.TrainingEngine", build),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        engine = reshard(engine, growth, Topology(*after), 2).engine
    events: Any = profile.profiler.kineto_results.events()
    found["peak"] = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    found["kept_state"] = _left(state)
    found["new_engine"] = _left(_watched([*(piece.data for piece in engine.pieces()), *_gradients(engine)]))
    engine.close()
    return found


def _gradients(engine: TrainingEngine) -> list[Tensor]:
    """In the training dtype, and of a bf16 run their sums."""
    sums = getattr(inner_engine(engine).optimizer, "fp32_groups_gradients_flat", [])
    return [*sums, *(local.parameter.grad for local in engine.parameters if local.parameter.grad is not None)]


def _watched(tensors: list[Tensor]) -> dict[StorageWeakRef, int]:
    """The tensors' memory, each once, without keeping it."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return {StorageWeakRef(storage): storage.nbytes() for storage in storages.values()}


def _left(watched: dict[StorageWeakRef, int]) -> int:
    """Bytes that are still there."""
    return sum(size for storage, size in watched.items() if not storage.expired())
