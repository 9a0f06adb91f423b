"""The checker of ``spmd_types`` proves that every gradient is reduced exactly once.

It runs the forward pass on a fake process group of 8 ranks (dp 2 x tp 4), with every parameter and input
typed, and refuses any operation after which a gradient would miss a sum or get it twice.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import pytest
import spmd_types as spmd
import torch
import torch.distributed as dist
from spmd_types.checker import typecheck
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, LoopStyle
from megaloop.model import DecoderStage, TensorParallel, vocab_parallel_cross_entropy
from megaloop.model.tensor_parallel import RowParallelLinear

MODEL: dict[str, Any] = {"hidden_size": 64, "num_heads": 8, "num_kv_heads": 4, "ffn_size": 96}
LAYOUTS = [pytest.param(False, id="tensor-parallel"), pytest.param(True, id="sequence-parallel")]


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=8)
    try:
        yield init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
    finally:
        dist.destroy_process_group()


def _check(
    mesh: DeviceMesh,
    sequence_parallel: bool,
    *,
    tied: bool = True,
    documents: bool = False,
    looped: bool = False,
    scaled: bool = False,
) -> torch.Tensor:
    """Type-check a decoder's forward pass and loss; returns the loss."""
    dp, tp = mesh.get_group("dp"), mesh.get_group("tp")
    config = ModelConfig(**MODEL, tied_embeddings=tied, norm_scaling=scaled)
    parallel = TensorParallel.over(tp, sequence_parallel)
    plan = DepthPlan((0, 0), style=LoopStyle("concat", "1/k", norm=True)) if looped else DepthPlan.plain(1 + scaled)
    stage = DecoderStage(config, 128, plan, tp=parallel)
    tokens_BS = torch.randint(0, 128, (2, 16))
    documents_BS = (torch.arange(16) // 5).expand(2, 16) if documents else None
    with spmd.set_current_mesh(mesh), typecheck(local=True):
        for parameter in stage.parameters():
            sharded = hasattr(parameter, "shard_dim")
            # DeepSpeed sums over dp once per step (R: pending); over tp nothing sums later (V or I)
            spmd.assert_type(parameter, {dp: spmd.R, tp: spmd.V if sharded else spmd.I})
        for data in filter(lambda x: x is not None, (tokens_BS, documents_BS)):
            spmd.assert_type(data, {dp: spmd.V, tp: spmd.R})
        logits = stage(tokens_BS, documents_BS)
        assert spmd.get_axis_local_type(logits, tp) is spmd.V
        loss = vocab_parallel_cross_entropy(logits, tokens_BS, parallel)
        assert spmd.get_axis_local_type(loss, tp) is spmd.I  # the same on every rank, and its gradient is not summed
        assert spmd.get_axis_local_type(loss, dp) is spmd.V
    return loss


@pytest.mark.parametrize("sequence_parallel", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_gradient_is_reduced_exactly_once(mesh: DeviceMesh, sequence_parallel: bool, tied: bool) -> None:
    _check(mesh, sequence_parallel, tied=tied)


@pytest.mark.parametrize("sequence_parallel", LAYOUTS)
def test_document_masking_keeps_gradients_right(mesh: DeviceMesh, sequence_parallel: bool) -> None:
    _check(mesh, sequence_parallel, documents=True)


@pytest.mark.parametrize("sequence_parallel", LAYOUTS)
def test_a_loops_adapter_and_norm_are_reduced_like_the_rest(mesh: DeviceMesh, sequence_parallel: bool) -> None:
    _check(mesh, sequence_parallel, looped=True)


@pytest.mark.parametrize("sequence_parallel", LAYOUTS)
def test_scaled_norms_are_reduced_like_the_rest(mesh: DeviceMesh, sequence_parallel: bool) -> None:
    _check(mesh, sequence_parallel, scaled=True)


def test_the_checker_refuses_a_block_that_forgets_to_enter(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting the conversion at a column-parallel linear changes no forward value, only gradients."""
    monkeypatch.setattr(TensorParallel, "enter", lambda self, x: x)
    with pytest.raises(spmd.SpmdTypeError):
        _check(mesh, sequence_parallel=False)


def test_the_checker_refuses_a_block_that_forgets_to_sum(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowParallelLinear, "forward", lambda self, x: x @ self.weight.T)
    with pytest.raises(spmd.SpmdTypeError):
        _check(mesh, sequence_parallel=False)


def test_the_checker_refuses_norms_whose_gradient_is_not_summed(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under sequence parallelism each rank sees other tokens: a norm's gradient must be summed over ranks."""
    monkeypatch.setattr(TensorParallel, "replicated", lambda self, weight: weight)
    with pytest.raises(spmd.SpmdTypeError):
        _check(mesh, sequence_parallel=True)


def test_all_that_the_library_takes_of_torchs_functional_collectives_is_there() -> None:
    """It is replaced for gloo (see ``tensor_parallel``): a version that takes more of it must not find it missing."""
    import spmd_types._collectives as collectives

    used = set(re.findall(r"funcol\.(\w+)", inspect.getsource(collectives)))
    assert {"all_gather_tensor", "reduce_scatter_tensor"} <= used <= set(vars(collectives.funcol))
