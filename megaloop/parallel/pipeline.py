"""The decoder as a DeepSpeed pipeline module: each rank builds its stage of the plan.

DeepSpeed's ``PipelineModule`` brings the process grid, the tied embedding's groups and the protocol that its
engine expects; which layers a stage holds and how they run is ours (:class:`megaloop.model.DecoderStage`).
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.layout.partition import Slices, owned_layers
from megaloop.layout.topology import Topology
from megaloop.model import DecoderStage, Kernels, Labels, TensorParallel, vocab_parallel_cross_entropy
from megaloop.model.decoder import Recompute

__all__ = ["PipelinedDecoder"]

_TIE = "embedding"


class PipelinedDecoder(PipelineModule):
    """One pipeline stage of the decoder, on this rank.

    Args:
        config, vocab_size, plan: the model.
        topology: ranks of the run; torch.distributed must be initialised with as many.
        slices: which rank runs what in which round.
        sequence_parallel, kernels, recompute: see :class:`megaloop.model.DecoderStage`.

    Attributes:
        stage: the layers of this rank, with canonical parameter names.
        tp: this rank's tensor-parallel group.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        plan: DepthPlan,
        topology: Topology,
        slices: Slices,
        *,
        sequence_parallel: bool = False,
        kernels: Kernels | None = None,
        recompute: Recompute = "none",
    ):
        # PipelineModule's constructor calls back into _partition_layers and _build, before nn.Module's own
        # attribute handling is of use: plain values are set aside for them here
        object.__setattr__(self, "_slices", slices)
        object.__setattr__(self, "_plan", plan)
        object.__setattr__(
            self, "_build_arguments", (config, vocab_size, plan, sequence_parallel, kernels or Kernels(), recompute)
        )
        end: Any = TiedLayerSpec if config.tied_embeddings else LayerSpec
        key = (_TIE,) if config.tied_embeddings else ()
        # stand-ins that tell PipelineModule what is tied to what; _build makes the real thing
        specs = [end(*key, nn.Module), *(LayerSpec(nn.Module) for _ in plan.ids), end(*key, nn.Module)]
        super().__init__(
            layers=specs,
            topology=PipeModelDataParallelTopology(num_pp=topology.pp, num_mp=topology.tp, num_dp=topology.dp),
            loss_fn=self._finite_loss,
        )

    def _partition_layers(self, method: str = "uniform") -> None:
        """Our partition, in PipelineModule's numbering (embedding is item 0, head the last)."""
        # with several rounds a rank's layers do not follow one another; the numbers then only say who has the ends
        owned = [len(owned_layers(self._plan, self._slices, rank)) for rank in range(self.num_stages)]
        cuts = [0, *(1 + layers for layers in accumulate(owned))]
        cuts[-1] += 1
        self.parts = cuts
        stage_id = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=cuts[stage_id], stop=cuts[stage_id + 1])

    def _build(self) -> None:
        config, vocab_size, plan, sequence_parallel, kernels, recompute = self._build_arguments
        stage_id = self._topo.get_coord(self.global_rank).pipe
        first, last = stage_id == 0, stage_id == self.num_stages - 1
        self.tp = TensorParallel.over(self._grid.get_slice_parallel_group(), sequence_parallel)
        self.stage = DecoderStage(
            config, vocab_size, plan, owned=owned_layers(plan, self._slices, stage_id),
            first=first, last=last, tp=self.tp, kernels=kernels, recompute=recompute,
        )  # fmt: skip
        self.forward_funcs.append(self.stage)
        if config.tied_embeddings and (first or last):
            self.tied_modules[_TIE] = self.stage.embedding
            self.tied_weight_attrs[_TIE] = ["weight"]
        for parameter in self.parameters():
            parameter.ds_pipe_replicated = False  # _index_tied_modules marks the copy on the last stage

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens or activations in; activations or logits out. Document indices travel along for masking."""
        if isinstance(inputs, tuple):
            x, documents_BS = inputs
            out = self.stage(x, documents_BS)
            return out if self.stage.last else (out, documents_BS)
        result: Tensor = self.stage(inputs)
        return result

    def _finite_loss(self, logits_BSV: Tensor, labels: Labels) -> Tensor:
        loss = self._loss(logits_BSV, labels)
        # an infinite loss may have finite gradients; times nan they are none, and the optimizer skips the step
        return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)

    def _loss(self, logits_BSV: Tensor, labels: Labels) -> Tensor:
        targets_BS, weights_BS = labels if isinstance(labels, tuple) else (labels, None)
        return vocab_parallel_cross_entropy(logits_BSV, targets_BS, self.tp, weights_BS)
