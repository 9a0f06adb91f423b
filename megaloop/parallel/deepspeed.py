"""The seam to DeepSpeed: the only file that imports it, and the only one that knows its private names.

docs/DEEPSPEED.md says what is taken and why; ``tests/parallel/test_deepspeed.py`` asserts each private name and signature,
so that a version of DeepSpeed that changed one fails there first, by name. Importing this module imports DeepSpeed (two
seconds), which is why others import it where they need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed import comm
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe import p2p
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from megaloop.config import Config
from megaloop.layout.placement import SHARE_UNIT
from megaloop.layout.topology import Topology
from megaloop.parallel.state import prime_moments
from megaloop.parallel.step_engine import Batch, Fragment

__all__ = [
    "DeepSpeedEngine",
    "Item",
    "ItemModule",
    "StageModule",
    "init_distributed",
    "open_engine",
    "watch_messages",
]


def init_distributed(backend: str, timeout: timedelta) -> None:
    """Initialise torch.distributed, where nobody has yet, and DeepSpeed's layer over it, from the launcher's environment."""
    # asked for nothing but an op for inference on CPUs, which DeepSpeed would compile here for half a minute the first time
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


# --- modules ---


class _CutModule(PipelineModule):
    """A ``PipelineModule`` whose items are cut into stages where it is told.

    Args:
        items: DeepSpeed's specifications of layers.
        cuts: the stages' bounds among the items, one more than there are stages.
    """

    def __init__(
        self, items: Sequence[LayerSpec], cuts: Sequence[int], topology: Topology, loss: Callable[..., Tensor]
    ):
        # PipelineModule's constructor calls back into _partition_layers and _build, before nn.Module's own attribute
        # handling is of use: plain values are set aside for them here
        object.__setattr__(self, "_cuts", list(cuts))
        super().__init__(
            layers=list(items),
            topology=PipeModelDataParallelTopology(num_pp=topology.pp, num_mp=topology.tp, num_dp=topology.dp),
            loss_fn=loss,
        )

    @property
    def _stage_number(self) -> int:
        stage: int = self._topo.get_coord(self.global_rank).pipe
        return stage

    def _partition_layers(self, method: str = "uniform") -> None:
        """Where the cuts are, instead of DeepSpeed's methods."""
        self.parts = self._cuts
        self._set_bounds(start=self.parts[self._stage_number], stop=self.parts[self._stage_number + 1])


class StageModule(_CutModule):
    """One pipeline stage, built by a function; DeepSpeed brings the process grid and the groups of what is tied.

    Args:
        topology: ranks of the run; torch.distributed must be initialised with as many.
        layers: how many layers each pipeline rank holds.
        build: makes a stage, of this number and with this tensor-parallel group, and says which module of it (with a
            ``weight``) the first and the last stage hold alike; called once, when ``self`` takes modules as attributes.
        loss: of what the last stage makes of a micro-batch, and its labels.
        tied: the two ends hold a module alike.
    """

    _make: Callable[[int, dist.ProcessGroup], tuple[nn.Module, nn.Module | None]] | None

    def __init__(
        self,
        topology: Topology,
        layers: Sequence[int],
        build: Callable[[int, dist.ProcessGroup], tuple[nn.Module, nn.Module | None]],
        loss: Callable[..., Tensor],
        *,
        tied: bool,
    ):
        end: Any = TiedLayerSpec if tied else LayerSpec
        key = ("embedding",) if tied else ()
        # stand-ins that tell PipelineModule what is tied to what
        items = [end(*key, nn.Module), *(LayerSpec(nn.Module) for _ in range(sum(layers))), end(*key, nn.Module)]
        # embedding is item 0, head the last; where a rank's layers do not follow one another the numbers say only who has the ends
        cuts = [0, *(1 + sum(layers[: rank + 1]) for rank in range(len(layers)))]
        cuts[-1] += 1
        object.__setattr__(self, "_make", build)
        super().__init__(items, cuts, topology, loss)

    def _build(self) -> None:
        assert self._make is not None
        stage, end = self._make(self._stage_number, self._grid.get_slice_parallel_group())
        self._make = None  # what it was made of is not needed any more
        self.forward_funcs.append(stage)
        if end is not None:
            self.tied_modules["embedding"] = end
            self.tied_weight_attrs["embedding"] = ["weight"]
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False  # _index_tied_modules marks the copy on the last stage


@dataclass(frozen=True)
class Item:
    """An item of a stock ``PipelineModule``.

    Attributes:
        module, arguments: what to build.
        tie: items with the same are one module; stages with such an item hold copies. None: tied to nothing.
        weights: names of the weights of a tied module.
        forward: what the item runs of its module, if not its forward.
    """

    module: type[nn.Module]
    arguments: tuple[Any, ...]
    tie: str | None = None
    weights: tuple[str, ...] = ("weight",)
    forward: Callable[..., Tensor] | None = None


class ItemModule(_CutModule):
    """A stock list of items, as DeepSpeed builds and runs it; cut where it is told.

    Args:
        items: the whole model.
        cuts: the stages' bounds among them.
        loss: of the last item's output and the labels.
    """

    def __init__(self, items: Sequence[Item], cuts: Sequence[int], topology: Topology, loss: Callable[..., Tensor]):
        super().__init__([_specification(layer) for layer in items], cuts, topology, loss)

    def own(self) -> Iterator[tuple[int, nn.Module]]:
        """This rank's items by number, and their modules; a module that is tied may come twice."""
        for number, layer in zip(range(self._local_start, self._local_stop), self.forward_funcs, strict=True):
            yield number, layer if isinstance(layer, nn.Module) else layer.args[0]  # with a forward it is a partial


def _specification(item: Item) -> LayerSpec:
    if item.tie is None:
        return LayerSpec(item.module, *item.arguments)
    return TiedLayerSpec(
        item.tie, item.module, *item.arguments, forward_fn=item.forward, tied_weight_attr=list(item.weights)
    )


# --- the engine ---


def open_engine(
    module: StageModule | ItemModule,
    optimizer: torch.optim.AdamW,
    config: Config,
    micro_batches: int,
) -> DeepSpeedEngine:
    """DeepSpeed's pipeline engine with ZeRO-1 around a module; collective over all ranks.

    Args:
        micro_batches: per optimizer step and data-parallel rank.
    """
    _align_shares()
    for parameter in module.parameters():
        if getattr(parameter, "shard_dim", None) is not None:
            parameter.tensor_model_parallel = (
                True  # unmarked, the gradient norm counts it on one model-parallel rank only
            )
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=_options(config, micro_batches))
    return DeepSpeedEngine(engine)


def _align_shares() -> None:
    """Make ZeRO's shares whole vectors of the CPU: 16 elements, where DeepSpeed makes them multiples of 2.

    torch's fused Adam computes what is left over at the end of a share by other instructions, which may round otherwise.
    The two ends of a pipeline cut the tied embedding at different places: an ulp of difference, which then grows.
    """
    for optimizer in (BF16_Optimizer, DeepSpeedZeroOptimizer):
        # both set it to 2 in their constructors, which then use it: they keep this instead
        optimizer.nccl_start_alignment_factor = property(lambda self: SHARE_UNIT, lambda self, value: None)


def _options(config: Config, micro_batches: int) -> dict[str, Any]:
    """What DeepSpeed is told."""
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


class DeepSpeedEngine:
    """:class:`megaloop.parallel.step_engine.ScheduleEngine` on DeepSpeed's pipeline engine.

    Attributes:
        inner: DeepSpeed's engine.
    """

    def __init__(self, inner: PipelineEngine):
        self.inner = inner

    @property
    def data_parallel_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self.inner.grid.get_data_parallel_group()
        return group

    @property
    def pipeline_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup = self.inner.grid.get_pipe_parallel_group()
        return group

    def train_batch(self, batches: Iterator[Batch]) -> Tensor:
        loss: Tensor = self.inner.train_batch(data_iter=batches)
        return loss

    def backward(self, roots: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        engine = self.inner
        bf16: bool = engine.using_bf16_optimizer
        if bf16:
            engine.optimizer.clear_lp_grads()
        engine._running_engine_backward = True  # DeepSpeed's hooks then know that this is its own doing
        try:
            torch.autograd.backward(list(roots), list(gradients))
        finally:
            engine._running_engine_backward = False
        if bf16:
            engine.optimizer.update_hp_grads(clear_lp_grads=False)

    def finish_step(self) -> None:
        self.inner._exec_reduce_tied_grads()
        self.inner._exec_reduce_grads()
        self.inner._exec_optimizer_step()

    def set_lr(self, lr: float) -> None:
        for group in self.inner.optimizer.optimizer.param_groups:
            group["lr"] = lr

    @property
    def grad_norm(self) -> float:
        return float(self.inner.get_global_grad_norm())

    @property
    def step_applied(self) -> bool:
        applied: bool = self.inner.was_step_applied()
        return applied

    def begin_optimizer(self, step: int) -> None:
        zero = self.inner.optimizer
        prime_moments(zero.optimizer, step)
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        # DeepSpeed keeps fragments as views into one flat buffer per parameter group
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            return None
        place = mapping.lp_fragment_address
        master, moments = mapping.get_hp_fragment().data, dict(mapping.optim_fragment or {})
        return Fragment(place.start, place.start + place.numel, master, moments)

    def is_copy(self, parameter: nn.Parameter) -> bool:
        return bool(getattr(parameter, "ds_pipe_replicated", False))

    def close(self, groups: Sequence[dist.ProcessGroup] = ()) -> None:
        engine, parameters = self.inner, list(self.inner.module.parameters())
        # hooks on the last losses refer to the engine: a circle through autograd's graph, which no garbage collector sees
        engine.loss = None
        engine.pipe_buffers = {key: [None] * len(slots) for key, slots in engine.pipe_buffers.items()}
        engine.destroy()
        for group in groups:
            comm.destroy_process_group(group)
        del self.inner
        for parameter in parameters:
            # DeepSpeed hangs methods of a parameter on the parameter: a circle that the collector sees only once all else
            # is gone, too late for reshard, which freezes what is left; weights and bf16's sums of gradients stayed with it
            vars(parameter).clear()


@contextmanager
def watch_messages(sent: Callable[[Tensor], None], tied: Callable[[Tensor, dist.ProcessGroup], None]) -> Iterator[None]:
    """Report what DeepSpeed's schedule sends point to point, and the tied weights whose gradients it reduces in each step."""
    send, tied_weights = p2p.send, PipelineModule.get_tied_weights_and_groups

    def watched_send(tensor: Tensor, *arguments: Any, **options: Any) -> None:
        sent(tensor)
        send(tensor, *arguments, **options)

    # of the module, whom every engine asks once per step: how it gets to its own reduction differs from engine to engine
    def watched_weights(module: PipelineModule) -> list[tuple[Tensor, dist.ProcessGroup]]:
        found: list[tuple[Tensor, dist.ProcessGroup]] = tied_weights(module)
        for weight, group in found:
            tied(weight, group)
        return found

    p2p.send, PipelineModule.get_tied_weights_and_groups = watched_send, watched_weights
    try:
        yield
    finally:
        p2p.send, PipelineModule.get_tied_weights_and_groups = send, tied_weights
