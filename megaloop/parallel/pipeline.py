"""The decoder as a pipeline module: each rank builds its stage of the plan.

The process grid, the groups of the tied embedding and the protocol that DeepSpeed's engine expects come from
:class:`megaloop.parallel.deepspeed.StageModule`; which layers a stage holds and how they run from
:class:`megaloop.model.DecoderStage`. Importing this module imports DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megaloop.config import GateConfig, ModelConfig
from megaloop.depth import DepthPlan, LayerCall
from megaloop.layout.partition import StageMap, owned_layers
from megaloop.layout.topology import Topology
from megaloop.model import DecoderStage, Kernels, Labels, TensorParallel, gate_loss, vocab_parallel_cross_entropy
from megaloop.model.decoder import Recompute
from megaloop.parallel.deepspeed import StageModule

__all__ = ["PipelinedDecoder"]


class PipelinedDecoder(StageModule):
    """One pipeline stage of the decoder, on this rank.

    Args:
        config, vocab_size, plan: the model.
        topology: ranks of the run; torch.distributed must be initialised with as many.
        slices: which rank runs what in which round.
        sequence_parallel, kernels, recompute: see :class:`megaloop.model.DecoderStage`.

    Attributes:
        stage: the layers of this rank, with canonical parameter names.
        tp: this rank's tensor-parallel group.
        gate: how its loop's gate is trained; None: the loss is that of the last logits.
    """

    gate: GateConfig | None = None

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        plan: DepthPlan,
        topology: Topology,
        slices: StageMap,
        *,
        sequence_parallel: bool = False,
        kernels: Kernels | None = None,
        recompute: Recompute = "none",
    ):
        owned = [owned_layers(plan, slices, rank) for rank in range(topology.pp)]

        def build(number: int, group: dist.ProcessGroup) -> tuple[nn.Module, nn.Module | None]:
            first, last = number == 0, number == topology.pp - 1
            self.tp = TensorParallel.over(group, sequence_parallel)
            self.stage: DecoderStage = DecoderStage(
                config, vocab_size, plan, owned=owned[number],
                first=first, last=last, tp=self.tp, kernels=kernels, recompute=recompute,
            )  # fmt: skip
            return self.stage, self.stage.embedding if config.tied_embeddings and (first or last) else None

        layers = [len(of_rank) for of_rank in owned]
        super().__init__(topology, layers, build, self._finite_loss, tied=config.tied_embeddings)

    def gate_loss(
        self, tokens_BS: Tensor, calls: Sequence[LayerCall], labels: Labels, documents_BS: Tensor | None
    ) -> Tensor:
        """The loss of a micro-batch in training where a gate learns (:func:`megaloop.model.gate_loss`); the stage is the whole model."""
        assert self.gate is not None
        return _nan_unless_finite(gate_loss(self.stage, tokens_BS, calls, labels, self.gate, documents_BS))

    def _finite_loss(self, logits_BSV: Tensor, labels: Labels) -> Tensor:
        return _nan_unless_finite(self._loss(logits_BSV, labels))

    def _loss(self, logits_BSV: Tensor, labels: Labels) -> Tensor:
        targets_BS, weights_BS = labels if isinstance(labels, tuple) else (labels, None)
        return vocab_parallel_cross_entropy(logits_BSV, targets_BS, self.tp, weights_BS)


def _nan_unless_finite(loss: Tensor) -> Tensor:
    # an infinite loss may have finite gradients; times nan they are none, and the optimizer skips the step
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
