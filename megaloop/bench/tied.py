"""A looped model as stock DeepSpeed runs it: ``TiedLayerSpec``, a copy of a layer on every stage that uses it.

The baseline of ``megaloop bench rounds``. Each use of a layer is an item of DeepSpeed's own ``PipelineModule``; its engine
runs one round of 1F1B and all-reduces the gradients of copies before the optimizer's step. Layers, loss, optimizer and
initial values are ours, so that nothing but the pipeline differs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megaloop.config import Config, ModelConfig
from megaloop.data import MicroBatch
from megaloop.depth import DepthPlan, LoopStyle
from megaloop.errors import MegaloopError
from megaloop.layout.partition import estimated_costs, partition
from megaloop.layout.pieces import Box, Piece
from megaloop.layout.sources import StateSource
from megaloop.layout.topology import Topology
from megaloop.model import Kernels, TensorParallel, build_adamw, choose_kernels, parameter_specs
from megaloop.model.layers import AttentionContext, DecoderLayer, RMSNorm, rotary_tables
from megaloop.model.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding, vocab_parallel_cross_entropy
from megaloop.parallel.deepspeed import Item, ItemModule, open_engine
from megaloop.parallel.engine import StepResult, quietly
from megaloop.parallel.step_engine import ScheduleEngine
from megaloop.runtime.device import local_device
from megaloop.runtime.dtype import training_dtype

__all__ = ["TiedEngine"]


class TiedEngine:
    """A plan on pp x dp ranks, by stock DeepSpeed; takes the calls of :class:`megaloop.parallel.engine.TrainingEngine`.

    Args:
        config, plan, topology, vocab_size: as there; one tensor-parallel rank, no documents, loops of plain composition.
        source: where the weights come from.

    Attributes:
        module: DeepSpeed's module; its parameters are what the rank holds.

    Raises:
        MegaloopError: what this baseline does not do.
    """

    def __init__(self, config: Config, plan: DepthPlan, topology: Topology, vocab_size: int, source: StateSource):
        recomputes = config.train.recompute != "none" or config.train.compile
        of_layers = config.model.document_masking or config.model.norm_scaling
        if topology.tp > 1 or of_layers or plan.style != LoopStyle() or recomputes:
            raise MegaloopError(
                "the baseline of tied layers has no tensor parallelism, documents, LN-scaling, recomputation, compilation or "
                "options of loops"
            )
        self.topology = topology
        self.micro_batches = config.train.micro_batches(topology.dp)
        device = local_device()
        dtype = training_dtype(config.train.precision)
        kernels = choose_kernels(device, dtype)
        specs = parameter_specs(config.model, plan, vocab_size)
        with quietly():
            self.module = _TiedDecoder(config, plan, topology, vocab_size, kernels, dtype)
            named = dict(self.module.canonical_parameters())
            with torch.no_grad():
                for name, parameter in named.items():
                    values = source.read_piece("master", Piece(name, specs[name].shape, Box.whole(specs[name].shape)))
                    assert values is not None, name
                    parameter.copy_(values)
            options = config.optimizer
            groups = [
                {"params": [p for name, p in named.items() if specs[name].decay], "weight_decay": options.weight_decay},
                {"params": [p for name, p in named.items() if not specs[name].decay], "weight_decay": 0.0},
            ]
            adam = build_adamw(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)
            self._engine: ScheduleEngine = open_engine(self.module, adam, config, self.micro_batches)

    def train_step(self, batches: Iterator[MicroBatch], lr: float) -> StepResult:
        """One optimizer step over ``micro_batches`` items of ``batches``."""
        self._engine.set_lr(lr)
        loss = self._engine.train_batch(batch.for_model(False) for batch in batches)
        return StepResult(float(loss), self._engine.grad_norm, self._engine.step_applied)

    def layer_parameters(self, ids: set[int]) -> Iterator[nn.Parameter]:
        """The parameters that this rank holds of some layers."""
        for name, parameter in self.module.canonical_parameters():
            section, layer_id, *_ = name.split(".")
            if section == "layers" and int(layer_id) in ids:
                yield parameter

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        with quietly():
            self._engine.close()


class _TiedDecoder(ItemModule):
    """The decoder as a list of items: embedding, each use of a layer, norm, head."""

    def __init__(
        self, config: Config, plan: DepthPlan, topology: Topology, vocab_size: int, kernels: Kernels, dtype: torch.dtype
    ):
        model, tp = config.model, TensorParallel()
        # as many executed layers on each stage as balances them; the embedding goes to the first, norm and head to the last
        costs = estimated_costs(model, vocab_size, config.data.sequence_length)
        cuts = [0, *(stop + 1 for _, stop in partition(DepthPlan.plain(plan.depth), topology.pp, costs))]
        cuts[-1] += 2
        layer = (model, tp, kernels, config.data.sequence_length, dtype)
        weights = tuple(name for name, _ in DecoderLayer(_smallest(model), tp, kernels).named_parameters())
        table = (vocab_size, model.hidden_size, tp)
        tie = "embedding" if model.tied_embeddings else None
        items = [Item(VocabParallelEmbedding, table, tie)]
        for layer_id in plan.order:
            items.append(Item(_Layer, layer, f"layer{layer_id}" if plan.order.count(layer_id) > 1 else None, weights))
        items.append(Item(RMSNorm, (model.hidden_size, model.norm_eps, tp, kernels)))
        if model.tied_embeddings:
            items.append(Item(VocabParallelEmbedding, table, tie, forward=VocabParallelEmbedding.logits))
        else:
            items.append(Item(ColumnParallelLinear, (model.hidden_size, vocab_size, tp)))
        super().__init__(
            items, cuts, topology, lambda logits, targets: vocab_parallel_cross_entropy(logits, targets, tp)
        )
        self._prefixes = ["embedding", *(f"layers.{layer_id}" for layer_id in plan.order), "norm"]
        self._prefixes.append("embedding" if model.tied_embeddings else "head")

    def canonical_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by the names that they have elsewhere, each once."""
        seen: set[int] = set()
        for number, module in self.own():
            for name, parameter in module.named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{self._prefixes[number]}.{name}", parameter


class _Layer(DecoderLayer):
    """A layer that makes its own attention context: DeepSpeed's items take one tensor and give one."""

    def __init__(self, config: ModelConfig, tp: TensorParallel, kernels: Kernels, length: int, dtype: torch.dtype):
        super().__init__(config, tp, kernels)
        tables = rotary_tables(config, length, local_device())
        cos_Sh, sin_Sh = (table.to(dtype) for table in tables)
        self._context = AttentionContext(cos_Sh, sin_Sh)

    def forward(self, x_BSD: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x_BSD, self._context)


def _smallest(model: ModelConfig) -> ModelConfig:
    """A model whose layers have parameters of the same names, and hardly any values."""
    return ModelConfig(hidden_size=2, num_heads=1, num_kv_heads=1, ffn_size=1, norm_eps=model.norm_eps)
