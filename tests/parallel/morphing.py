"""What ranks run in the tests of growth and resharding in flight."""

from __future__ import annotations

import re
import threading
import weakref
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaloop.config import Config
from megaloop.depth import DepthPlan, Operator, grow
from megaloop.model import grown_from, initial_values
from megaloop.parallel.engine import TrainingEngine, join_ranks
from megaloop.parallel.live import Resharded, reshard
from megaloop.parallel.placement import Box
from megaloop.parallel.reshard import Moments
from megaloop.parallel.state import InitialValues
from megaloop.parallel.topology import Topology
from tests.parallel.layouts import LR, VOCAB, micro_batches

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
        "largest_transfer": max((each.bytes for each in resharded.plan.transfers), default=0),
        "largest_tensor": max(4 * prod(spec.shape) for spec in resharded.engine.specs.values()),
        "state": sum(each.data.numel() * each.data.element_size() for each in resharded.engine.pieces()),
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
    for each in engine.pieces():
        piece = each.piece
        parent = grown_from(piece.name, growth)
        counts["fresh" if parent is None else "parent" if parent == piece.name else "copy"] += 1
        zeros = each.kind in ("exp_avg", "exp_avg_sq") and (
            parent is None or (moments == "zero" and parent != piece.name)
        )
        if zeros:
            expected = torch.zeros(piece.numel, dtype=each.data.dtype)
        else:
            tensor = _initial(engine, piece.name) if parent is None else whole[each.kind, parent]
            expected = tensor[piece.box.within(Box.whole(piece.shape))].reshape(-1)
            expected = expected[slice(*(piece.flat or (None, None)))].to(each.data.dtype)
        if _bits(each.data) != _bits(expected):
            differing.append(f"{each.kind} of {piece.name}")
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
    dist.all_gather_object(everyone, [(each.kind, each.piece, each.data.cpu().clone()) for each in engine.pieces()])
    whole: dict[tuple[str, str], Tensor] = {}
    for kind, piece, data in (each for pieces in everyone for each in pieces):
        tensor = whole.setdefault((kind, piece.name), torch.full(piece.shape, torch.nan, dtype=data.dtype))
        region = tensor[piece.box.within(Box.whole(piece.shape))]
        flat = region.reshape(-1).clone()
        flat[slice(*(piece.flat or (None, None)))] = data.reshape(-1)
        region.copy_(flat.view(region.shape))
    return whole


def measure_memory(values: dict[str, Any], before: Layout, after: Layout) -> dict[str, int | bool]:
    """Train 4 layers and grow to 6 in flight; bytes of this rank's private memory at its most, over what stays."""
    engine = _trained(values, before, 2)
    deepspeed_engine = weakref.ref(engine._engine)
    state = sum(each.data.numel() * each.data.element_size() for each in engine.pieces())
    largest = max(4 * prod(spec.shape) for spec in engine.specs.values())
    with _HighWater() as memory:
        engine = reshard(engine, grow(engine.plan, "lidas", 6, 2), Topology(*after), 2).engine
    gone = deepspeed_engine() is None
    over = memory.peak - _private_bytes()
    engine.close()
    return {"old_state": state, "largest_tensor": largest, "over": over, "gone": gone}


class _HighWater:
    """Watches this process's private memory from a thread of its own."""

    def __enter__(self) -> _HighWater:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.peak = max(self.peak, _private_bytes())


def _private_bytes() -> int:
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])
