"""Training and evaluating in rounds, one or several, on a step engine.

A rank has a slice of layers per round, and works in the order that
:class:`megaloop.layout.rounds.Rounds` gives; a looped layer is held once, by the rank that runs all its calls, and its
gradients add up there. Reducing gradients over replicas, the tied embedding's exchange and the optimizer's step remain
the step engine's, once per step.

Activations and gradients go over process groups of their own, one for each pair of neighbours and direction, so that they
arrive in the order in which they are sent, whatever else the two ranks have to say to each other. (In a ring of two, the
next rank and the one before are the same.) Receives are posted ahead of need.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megaloop.data import MicroBatch
from megaloop.depth import DepthPlan
from megaloop.layout.partition import StageMap
from megaloop.layout.rounds import Action
from megaloop.layout.topology import Coordinate, Topology
from megaloop.layout.work import RankSchedule
from megaloop.model import Labels
from megaloop.model.decoder import LoopInput
from megaloop.parallel.step_engine import StepEngine
from megaloop.parallel.stopwatch import Stopwatch

if TYPE_CHECKING:
    from megaloop.parallel.pipeline import PipelinedDecoder

__all__ = ["RoundsEngine"]

_AHEAD = 2
"""Receives that are posted before they are needed, per direction."""


@dataclass
class _Message:
    """Something on its way: the request, and the tensors, which must live until it is done."""

    request: dist.Work
    tensor: Tensor

    @classmethod
    def of(cls, request: dist.Work | None, tensor: Tensor) -> _Message:
        """One between this rank and another; torch gives no request to ranks outside the group."""
        assert request is not None
        return cls(request, tensor)


class RoundsEngine:
    """Runs the slices of a rank in the order of rounds.

    Args:
        engine: opened with ``module``.
        module: the stage of this rank.
        activation: shape of what goes from rank to rank.
        documents: shape of the document indices that go along, or None.
    """

    def __init__(
        self,
        engine: StepEngine,
        module: PipelinedDecoder,
        plan: DepthPlan,
        slices: StageMap,
        topology: Topology,
        at: Coordinate,
        activation: tuple[int, ...],
        documents: tuple[int, ...] | None,
        stopwatch: Stopwatch,
    ):
        self._stopwatch = stopwatch
        self._engine, self._module = engine, module
        self._plan, self._slices, self._rank = plan, slices, at.pp
        self._activation, self._documents = activation, documents
        self._ranks = topology.pp
        self._members = [topology.rank(Coordinate(pp, at.dp, at.tp)) for pp in range(topology.pp)]
        # a loop that runs more often in some steps may need more rounds there
        self._channels = _open_channels(topology, at, round_again=len(slices) > 1 or plan.loop is not None)
        weight = next(module.stage.parameters())
        self._dtype, self._device = weight.dtype, weight.device

    def train(self, batches: Iterator[MicroBatch], micro_batches: int, iterations: int | None = None) -> Tensor:
        """One optimizer step; the mean loss, on every rank.

        Args:
            iterations: how often the loop runs, the same on every rank; None: as often as the plan says.
        """
        self._module.train()
        loss = self._run(batches, micro_batches, iterations)
        self._engine.finish_step()
        return loss

    def evaluate(self, batches: Iterator[MicroBatch], micro_batches: int) -> Tensor:
        """The mean loss over micro-batches, on every rank; no gradients."""
        self._module.eval()
        with torch.no_grad():
            return self._run(batches, micro_batches, None)

    def _run(self, batches: Iterator[MicroBatch], micro_batches: int, iterations: int | None) -> Tensor:
        step = _Step(self, batches, micro_batches, iterations)
        step.run()
        loss = step.total / micro_batches
        if self._ranks > 1:
            dist.broadcast(loss, self._members[-1], group=self._engine.pipeline_group)
        replicas = self._engine.data_parallel_group
        if dist.get_world_size(replicas) > 1:
            dist.all_reduce(loss, group=replicas)
            loss /= dist.get_world_size(replicas)
        return loss


class _Step:
    """One step, while it runs: what this rank holds, awaits and has sent."""

    def __init__(self, engine: RoundsEngine, batches: Iterator[MicroBatch], micro_batches: int, iterations: int | None):
        self._engine, self._stage = engine, engine._module.stage
        self._micro_batches = micro_batches
        self._work = RankSchedule.of(
            engine._plan,
            engine._slices,
            engine._rank,
            micro_batches,
            iterations=iterations,
            backprop=self._stage.backprop,
            forward_only=not torch.is_grad_enabled(),
        )
        self.total = torch.zeros((), device=engine._device)
        self._source, self._taken = batches, 0
        self._batches: dict[int, MicroBatch] = {}
        self._inputs: dict[tuple[int, int], Tensor] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._documents: dict[int, Tensor] = {}
        # of each micro-batch, what entered the loop: as it came about, and as later rounds take it, on the rank that injects
        self._entered: dict[int, tuple[Tensor, Tensor]] = {}
        self._arriving: dict[tuple[Action, str], _Message] = {}
        self._sent: dict[tuple[str, bool], deque[_Message]] = defaultdict(deque)
        self._awaited = {
            backward: deque(
                work for work in self._work.passes() if work.backward == backward and self._work.receives(work)
            )
            for backward in (False, True)
        }
        for _ in range(_AHEAD):
            self._post(False)
            self._post(True)

    def run(self) -> None:
        """Do all of this rank's passes, and wait until everything that it sent has gone."""
        for work in self._work.passes():
            if work.backward:
                self._backward(work)
            else:
                self._forward(work)
        for queue in self._sent.values():
            while queue:
                queue.popleft().request.wait()

    # --- messages ---

    def _post(self, backward: bool) -> None:
        """Begin to receive the next message of a direction."""
        if not self._awaited[backward]:
            return
        engine, work = self._engine, self._awaited[backward].popleft()
        source = (engine._rank + (1 if backward else -1)) % engine._ranks
        channel = engine._channels[source, backward]
        values = torch.empty(engine._activation, dtype=engine._dtype, device=engine._device)
        self._arriving[work, "values"] = _Message.of(dist.irecv(values, engine._members[source], group=channel), values)
        if engine._documents is not None and not backward and work.round == 0:
            indices = torch.empty(engine._documents, dtype=torch.int32, device=engine._device)
            self._arriving[work, "documents"] = _Message.of(
                dist.irecv(indices, engine._members[source], group=channel), indices
            )

    def _receive(self, work: Action) -> Tensor:
        message = self._arriving.pop((work, "values"))
        message.request.wait()
        if (work, "documents") in self._arriving:
            documents = self._arriving.pop((work, "documents"))
            documents.request.wait()
            self._documents[work.micro_batch] = documents.tensor
        self._post(work.backward)
        return message.tensor

    def _send(self, values: Tensor, *, backward: bool, what: str = "values") -> None:
        """To the next rank, or with gradients to the one before; waits where too many are on their way."""
        engine = self._engine
        values = values.detach().contiguous()
        target = engine._members[(engine._rank + (-1 if backward else 1)) % engine._ranks]
        request = dist.isend(values, target, group=engine._channels[engine._rank, backward])
        queue = self._sent[what, backward]
        queue.append(_Message.of(request, values))
        # gloo's requests do not know that they are done until they are waited for
        while len(queue) > self._work.rounds.window:
            queue.popleft().request.wait()

    # --- work ---

    def _batch(self, number: int) -> MicroBatch:
        """A micro-batch, read when it is first needed; forgotten once this rank has its loss, if it is to have that."""
        while self._taken <= number:
            self._batches[self._taken] = next(self._source)
            self._taken += 1
        return self._batches[number] if self._engine._rank == self._engine._ranks - 1 else self._batches.pop(number)

    def _forward(self, work: Action) -> None:
        engine = self._engine
        if self._work.is_first(work):
            batch = self._batch(work.micro_batch)
            x = batch.inputs.to(engine._device)
            if engine._documents is not None:
                self._documents[work.micro_batch] = batch.documents.to(engine._device)
        else:
            x = self._receive(work)
        if self._work.is_passthrough(work):
            out = x
        else:
            with engine._stopwatch:
                learns_gate = engine._module.gate is not None and torch.is_grad_enabled()
                out = self._gate_loss(work, x) if learns_gate else self._compute(work, x)
        if not self._work.sends(work):
            return
        self._send(out, backward=False)
        if engine._documents is not None and work.round == 0 and engine._rank < engine._ranks - 1:
            self._send(self._documents[work.micro_batch], backward=False, what="documents")

    def _compute(self, work: Action, x: Tensor) -> Tensor:
        """Run the slice; its loss, if it ends with it."""
        engine, number, key = self._engine, work.micro_batch, (work.round, work.micro_batch)
        has_backward = torch.is_grad_enabled() and self._work.has_backward(work)
        is_first, is_last = self._work.is_first(work), self._work.is_last(work)
        if not is_first:
            x.requires_grad_(has_backward)
        entry = LoopInput(self._entered[number][1] if number in self._entered else None)
        with torch.set_grad_enabled(has_backward):
            calls = self._work.calls_of(work)
            out: Tensor = self._stage.run(
                x, calls, self._documents.get(number), first=is_first, last=is_last, entry=entry
            )
            if self._work.enters_loop(work):
                assert entry.state is not None
                self._entered[number] = entry.state, entry.state.detach().requires_grad_(torch.is_grad_enabled())
            if self._work.leaves_loop(work) and not has_backward:
                self._entered.pop(number, None)  # in validation there is no backward pass that would do it
            if is_last:
                labels = _moved(self._batch(number).labels, engine._device)
                del self._batches[number]
                out = engine._module.loss_fn(out, labels)
                self.total += out.detach().float()
        if has_backward:
            self._inputs[key], self._outputs[key] = x, out
        return out

    def _gate_loss(self, work: Action, tokens_BS: Tensor) -> Tensor:
        """Instead of :meth:`_compute` in steps that train a loop's gate: the slice is the whole model, read after each iteration."""
        number, key = work.micro_batch, (work.round, work.micro_batch)
        labels = _moved(self._batches.pop(number).labels, self._engine._device)
        loss = self._engine._module.gate_loss(tokens_BS, self._work.calls_of(work), labels, self._documents.get(number))
        self.total += loss.detach()
        self._inputs[key], self._outputs[key] = tokens_BS, loss
        return loss

    def _backward(self, work: Action) -> None:
        gradient = self._receive(work) if self._work.receives(work) else None
        if not self._work.is_passthrough(work):
            with self._engine._stopwatch:
                gradient = self._differentiate(work, gradient).grad
        if self._work.sends(work):
            assert gradient is not None
            self._send(gradient, backward=True)

    def _differentiate(self, work: Action, gradient: Tensor | None) -> Tensor:
        """Run the slice backward; its input, which has the gradient."""
        key = (work.round, work.micro_batch)
        x, out = self._inputs.pop(key), self._outputs.pop(key)
        roots: list[tuple[Tensor, Tensor | None]] = []
        if self._work.is_last(work):
            roots.append((out / self._micro_batches, None))
        elif gradient is not None:
            roots.append((out, gradient))
        if self._work.enters_loop(work) and work.micro_batch in self._entered:
            made, taken = self._entered.pop(work.micro_batch)
            if taken.grad is not None:
                roots.append((made, taken.grad))
        self._engine._engine.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        return x


def _open_channels(
    topology: Topology, at: Coordinate, *, round_again: bool
) -> dict[tuple[int, bool], dist.ProcessGroup]:
    """By (sending pipeline rank, gradients or not), a process group with who receives; collective over all ranks.

    Args:
        round_again: activations go from the last rank to the first as well, and gradients back.
    """
    channels: dict[tuple[int, bool], dist.ProcessGroup] = {}
    for dp in range(topology.dp):
        for tp in range(topology.tp):
            for source in range(topology.pp):
                for backward in (False, True):
                    from_end = source == (0 if backward else topology.pp - 1)
                    if topology.pp == 1 or (from_end and not round_again):
                        continue
                    target = (source + (-1 if backward else 1)) % topology.pp
                    group = dist.new_group(sorted(topology.rank(Coordinate(pp, dp, tp)) for pp in (source, target)))
                    if (dp, tp) == (at.dp, at.tp) and at.pp in (source, target):
                        channels[source, backward] = group
    return channels


def _moved(labels: Labels, device: torch.device) -> Labels:
    if isinstance(labels, tuple):
        targets_BS, weights_BS = labels
        return targets_BS.to(device), weights_BS.to(device)
    return labels.to(device)
