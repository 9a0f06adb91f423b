"""Tensor parallelism in Megatron's way (arXiv 1909.08053; sequence parallel: 2205.05198).

Every differentiable collective is one of ``spmd_types``', whose checker proves that each gradient is reduced
exactly once (``tests/model/test_spmd.py``). Its words, over the tensor-parallel axis:

    I  invariant  the same value on every rank, and so is its gradient
    R  replicate  the same value on every rank, each with its own part of the gradient (pending a sum)
    V  varying    every rank has its own
    S  shard      varying, and the ranks' values concatenate to the whole along a dimension

A block's input is I (or S along the sequence, under sequence parallelism); ``enter`` takes it to R, a
column-parallel product to V, a row-parallel product to a pending sum, and ``leave`` back to I (or S).

Shape suffixes: B batch, S sequence, D model, F any feature, V vocabulary. They name logical dimensions;
a shard of one keeps its letter.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import spmd_types as spmd
import spmd_types._collectives
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from spmd_types import rules
from torch import Tensor, nn

from megaloop.errors import MegaloopError

__all__ = [
    "SEQUENCE_DIM",
    "ColumnParallelLinear",
    "Labels",
    "RowParallelLinear",
    "TensorParallel",
    "VocabParallelEmbedding",
    "token_losses",
    "vocab_parallel_cross_entropy",
    "weighted_mean",
]

SEQUENCE_DIM = 1

# spmd_types 0.3 calls two of torch's collectives by names that torch 2.13 has renamed; it would say so at every use
warnings.filterwarnings("ignore", message=r"`torch\.distributed\._functional_collectives", category=FutureWarning)


class _GlooCollectives:
    """What ``spmd_types`` takes from torch's functional collectives, but over gloo by the plain ones.

    gloo has no reduce-scatter: torch makes one of an all-reduce and work that is done when somebody waits, and gathers
    through a coalesced all-gather. In runs with sequence parallelism, the only ones that need these two, a thread of gloo's
    died now and then in the C library's allocator (torch 2.13 on CPUs, twice in about a hundred runs; never at will). The
    plain collectives take other ways to the same values. Other backends, and compiled code, use the functional ones.
    """

    AsyncCollectiveTensor = funcol.AsyncCollectiveTensor
    all_reduce = staticmethod(funcol.all_reduce)

    @staticmethod
    def all_gather_tensor(x: Tensor, gather_dim: int, group: dist.ProcessGroup) -> Tensor:
        """The ranks' tensors, one after another along ``gather_dim``."""
        if not _is_gloo(group):
            gathered: Tensor = funcol.all_gather_tensor(x, gather_dim, group)
            return gathered
        size = dist.get_world_size(group)
        out = x.new_empty((size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out if gather_dim == 0 else torch.cat(out.chunk(size), dim=gather_dim)

    @staticmethod
    def reduce_scatter_tensor(x: Tensor, operation: str, scatter_dim: int, group: dist.ProcessGroup) -> Tensor:
        """The ranks' tensors added up, and this rank's part of the sum along ``scatter_dim``."""
        if operation != "sum" or not _is_gloo(group):
            scattered: Tensor = funcol.reduce_scatter_tensor(x, operation, scatter_dim, group)
            return scattered
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.chunk(dist.get_world_size(group), dim=scatter_dim)[dist.get_rank(group)].clone()


def _is_gloo(group: dist.ProcessGroup) -> bool:
    return not torch.compiler.is_compiling() and dist.get_backend(group) == "gloo"


spmd_types._collectives.funcol = _GlooCollectives


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel ranks that share a layer, and this rank's place among them.

    Attributes:
        group: their process group; None for a single rank.
        rank: this rank's index in the group.
        size: number of ranks.
        sequence_parallel: outside the blocks, activations are split along the sequence.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    sequence_parallel: bool = False

    @classmethod
    def over(cls, group: dist.ProcessGroup, sequence_parallel: bool = False) -> TensorParallel:
        size = dist.get_world_size(group)
        if size == 1:
            return cls()
        return cls(group, dist.get_rank(group), size, sequence_parallel)

    def enter(self, x_BSD: Tensor) -> Tensor:
        """Into a block: I (or S along the sequence) to R, so that ranks may do different work with it."""
        if self.group is None:
            return x_BSD
        if self.sequence_parallel:
            return spmd.all_gather(
                x_BSD, self.group, src=spmd.S(SEQUENCE_DIM), dst=spmd.R, backward_options=_reduce_in(x_BSD.dtype)
            )
        return spmd.convert(x_BSD, self.group, src=spmd.I, dst=spmd.R, backward_options=_reduce_in(x_BSD.dtype))

    def leave(self, x_BSD: Tensor) -> Tensor:
        """Out of a block: sum the ranks' parts, to I (or S along the sequence)."""
        if self.group is None:
            return x_BSD
        if self.sequence_parallel:
            return spmd.reduce_scatter(x_BSD, self.group, src=spmd.V, dst=spmd.S(SEQUENCE_DIM))
        return spmd.all_reduce(x_BSD, self.group, src=spmd.V, dst=spmd.I)

    def replicated(self, weight: Tensor) -> Tensor:
        """A weight that all ranks hold (a norm's), for use on activations as they are between blocks.

        Under sequence parallelism each rank sees other tokens, so the weight's gradient is summed over ranks.
        """
        if self.group is None or not self.sequence_parallel:
            return weight
        return spmd.convert(weight, self.group, src=spmd.I, dst=spmd.R, backward_options=_reduce_in(torch.float32))

    def split(self, size: int, what: str) -> int:
        """``size`` divided over the ranks."""
        if size % self.size:
            raise MegaloopError(f"tensor parallel size {self.size} does not divide {what} {size}; choose one that does")
        return size // self.size


def _reduce_in(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Sum gradients in ``dtype``; activations' stay in theirs, as Megatron's do, and weights' are summed in fp32."""
    return {"op_dtype": dtype}


def _sharded_weight(rows: int, columns: int, dim: int, tp: TensorParallel) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(rows, columns))
    if tp.size > 1:
        weight.shard_dim = dim  # type: ignore[attr-defined]
    return weight


class ColumnParallelLinear(nn.Module):
    """``y = x W^T`` with W's rows (output features) split over ranks. Input R, output V. No bias."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel):
        super().__init__()
        self.weight = _sharded_weight(tp.split(out_features, "output features"), in_features, 0, tp)

    def forward(self, x_BSF: Tensor) -> Tensor:
        return F.linear(x_BSF, self.weight)


class RowParallelLinear(nn.Module):
    """``y = x W^T`` with W's columns (input features) split over ranks. Input V, output summed: I or S. No bias."""

    def __init__(self, in_features: int, out_features: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        self.weight = _sharded_weight(out_features, tp.split(in_features, "input features"), 1, tp)

    def forward(self, x_BSF: Tensor) -> Tensor:
        return self.tp.leave(F.linear(x_BSF, self.weight))


class VocabParallelEmbedding(nn.Module):
    """An embedding whose rows (tokens of the vocabulary) are split over ranks; also the output head when tied."""

    def __init__(self, vocab_size: int, hidden_size: int, tp: TensorParallel):
        super().__init__()
        self.tp = tp
        rows = tp.split(vocab_size, "the vocabulary")
        self.first_token = tp.rank * rows
        self.weight = _sharded_weight(rows, hidden_size, 0, tp)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Token ids to vectors, I (or S along the sequence)."""
        if self.tp.group is None:
            return F.embedding(tokens_BS, self.weight)
        local_BS = tokens_BS - self.first_token
        elsewhere_BS = (local_BS < 0) | (local_BS >= self.weight.shape[0])
        x_BSD = F.embedding(local_BS.masked_fill(elsewhere_BS, 0), self.weight)
        # every token has its row on one rank: the others add zeros
        return self.tp.leave(x_BSD.masked_fill(elsewhere_BS.unsqueeze(-1), 0.0))

    def logits(self, x_BSD: Tensor) -> Tensor:
        """Scores of this rank's part of the vocabulary, V."""
        return F.linear(self.tp.enter(x_BSD), self.weight)


Labels = Tensor | tuple[Tensor, Tensor]
"""Targets [B, S]; or they, and the factors of their losses, where not all count alike."""


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Each token's cross-entropy in nats, over logits that are split along the vocabulary.

    Three numbers per token cross the ranks (maximum, sum of exponentials, the target's logit), never the logits.
    """

    @staticmethod
    def spmd_typecheck(*, logits_NV: Tensor, targets_N: Tensor, tp: TensorParallel) -> Any:
        # over the vocabulary: sums of varying parts, the same on every rank and with the same gradient
        rules.ignore(targets_N)
        return rules.all_reduce(rules.einsum("nv->n", logits_NV), tp.group, src=spmd.V, dst=spmd.I)

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, tp: TensorParallel) -> Tensor:
        max_N1 = logits_NV.amax(dim=-1, keepdim=True).float()
        if tp.group is not None:
            dist.all_reduce(max_N1, op=dist.ReduceOp.MAX, group=tp.group)
        # one new tensor of the logits' size, in which everything else happens in place
        shifted_NV = logits_NV - max_N1 if logits_NV.dtype == torch.float32 else logits_NV.float().sub_(max_N1)
        local_N1 = (targets_N - tp.rank * logits_NV.shape[-1]).unsqueeze(-1)
        elsewhere_N1 = (local_N1 < 0) | (local_N1 >= logits_NV.shape[-1])
        local_N1 = local_N1.masked_fill(elsewhere_N1, 0)
        target_N1 = shifted_NV.gather(-1, local_N1).masked_fill(elsewhere_N1, 0.0)
        exp_NV = shifted_NV.exp_()
        sums_N2 = torch.cat([exp_NV.sum(dim=-1, keepdim=True), target_N1], dim=-1)
        if tp.group is not None:
            dist.all_reduce(sums_N2, group=tp.group)
        sum_N1, target_N1 = sums_N2.split(1, dim=-1)
        ctx.dtype = logits_NV.dtype
        ctx.save_for_backward(exp_NV, sum_N1.clone(), local_N1, elsewhere_N1)
        return (sum_N1.log() - target_N1).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        exp_NV, sum_N1, local_N1, elsewhere_N1 = ctx.saved_tensors
        grad_N1 = grad_N.unsqueeze(-1)
        # softmax minus one at the target; the exponentials are ours, and of no further use
        grad_NV = exp_NV.mul_(grad_N1 / sum_N1)
        grad_NV.scatter_add_(-1, local_N1, torch.where(elsewhere_N1, 0.0, -grad_N1))
        return grad_NV.to(ctx.dtype), None, None


def vocab_parallel_cross_entropy(
    logits_BSV: Tensor, targets_BS: Tensor, tp: TensorParallel, weights_BS: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats per token, in fp32, the same on every tensor-parallel rank.

    Args:
        logits_BSV: this rank's part of the vocabulary (all of it without tensor parallelism).
        targets_BS: token ids over the whole vocabulary.
        tp: the ranks that hold the other parts.
        weights_BS: instead of the mean, the sum of tokens' losses times these.
    """
    return weighted_mean(token_losses(logits_BSV, targets_BS, tp), weights_BS)


def token_losses(logits_BSV: Tensor, targets_BS: Tensor, tp: TensorParallel) -> Tensor:
    """Cross-entropy of each token in nats, fp32 [B, S]; arguments as :func:`vocab_parallel_cross_entropy`."""
    losses_N: Tensor = _VocabParallelCrossEntropy.apply(logits_BSV.flatten(0, 1), targets_BS.flatten(), tp)
    return losses_N.view(targets_BS.shape)


def weighted_mean(values_BS: Tensor, weights_BS: Tensor | None) -> Tensor:
    """The mean over tokens; with weights their sum times these, which make a mean over the tokens that count of it."""
    return values_BS.mean() if weights_BS is None else (values_BS * weights_BS).sum()
