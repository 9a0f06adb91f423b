"""The formulas of saved tensors against what autograd saves of the real decoder, on this CPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from megaloop.config import Config
from megaloop.model import Decoder, TensorParallel, vocab_parallel_cross_entropy
from megaloop.plan.activations import (
    element_bytes,
    head_activations,
    layer_activations,
    logits_bytes,
    mask_bytes,
    stream_bytes,
)
from tests.distributed import RankPool

VOCAB, LAYERS = 512, 3


def configuration(**changes: Any) -> Config:
    values: dict[str, Any] = {
        "depth": LAYERS,
        "model": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "ffn_size": 160},
        "data": {"sources": [{"path": "nowhere"}], "sequence_length": 128},
        "train": {"micro_batch": 2, "precision": "fp32"},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        values.setdefault(section, {})[field] = value
    return Config.model_validate(values)


def held(config: Config, device: str = "cpu", tp: TensorParallel | None = None) -> int:
    """Bytes that a forward pass leaves behind: saved tensors and what checkpointing caches, each storage once.

    Neither parameters and inputs count, nor the logits, nor the loss itself.
    """
    decoder = Decoder(config.model, VOCAB, config.plan, tp=tp, recompute=config.train.recompute)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    decoder.to(device, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    shape = (config.train.micro_batch, config.data.sequence_length)
    tokens_BS, targets_BS = (torch.randint(VOCAB, shape, device=device) for _ in range(2))
    documents_BS = (
        (torch.arange(shape[1], device=device) // 10).expand(shape) if config.model.document_masking else None
    )
    # held until the end: memory that is freed meanwhile (a thread of gloo's lets go late) would be taken for new tensors
    held_before = _tensors()
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits_BSV = decoder(tokens_BS, documents_BS)
        loss = vocab_parallel_cross_entropy(logits_BSV, targets_BS, decoder.tp)
    passing = set(_storages([*held_before, logits_BSV, loss]))
    storages = _storages([*saved, *_tensors()])
    return sum(size for address, size in storages.items() if address not in passing)


def _tensors() -> list[torch.Tensor]:
    found = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
    return [result for result in found if _has_memory(result)]


def _has_memory(tensor: torch.Tensor) -> bool:
    """False of the stand-ins that the compiler leaves behind."""
    if isinstance(tensor, FakeTensor):
        return False
    try:
        tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return False
    return True


def _storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def held_in_tensor_parallel(values: dict[str, Any]) -> int:
    """The same on one of the tensor-parallel ranks."""
    config = Config.model_validate(values)
    assert dist.group.WORLD is not None
    return held(config, tp=TensorParallel.over(dist.group.WORLD, config.parallel.sequence_parallel))


def predicted(config: Config, tp: int = 1) -> int:
    """The formulas' sum, on a GPU; the gradient of bf16 logits comes only with the backward pass."""
    head = head_activations(config, tp, VOCAB)
    gradient = logits_bytes(config, tp, VOCAB) if config.train.precision == "bf16" else 0
    tables = config.data.sequence_length * config.model.head_size * element_bytes(config)
    waiting = 0
    if config.train.recompute != "none" and mask_bytes(config):
        waiting = config.train.micro_batch * config.data.sequence_length**2
    return LAYERS * layer_activations(config, tp).kept + head.kept + head.working - gradient + tables + waiting


def more_on_a_cpu(config: Config, tp: int = 1) -> int:
    """What is kept on a CPU besides.

    A norm: the normalised input in fp32, and the input in fp32 too, where that is not what it comes in.
    Attention: keys and values repeated to all query heads.
    """
    shape, element = config.model, element_bytes(config)
    tokens = config.train.micro_batch * config.data.sequence_length
    plain = config.train.recompute == "none"
    norms = (2 * LAYERS if plain else 0) + 1
    split = tp if config.parallel.sequence_parallel else 1
    per_norm = tokens * shape.hidden_size * (4 if element == 4 else 4 + 4 - 2) // split
    repeated = 2 * tokens * (shape.num_heads - shape.num_kv_heads) * shape.head_size * element // tp
    return norms * per_norm + (LAYERS * repeated if plain else 0)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(4, None), (2, None), (2, 24)])
def test_the_formulas_are_what_the_decoder_saves(
    kv_heads: int, head_dim: int | None, precision: str, recompute: str
) -> None:
    config = configuration(
        model__num_kv_heads=kv_heads,
        model__head_dim=head_dim,
        train__precision=precision,
        train__recompute=recompute,
    )
    assert held(config) == predicted(config) + more_on_a_cpu(config)


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_document_masking_in_fp32_keeps_a_mask_per_layer(recompute: str) -> None:
    config = configuration(model__document_masking=True, train__recompute=recompute)
    assert held(config) == predicted(config) + more_on_a_cpu(config)
    without = configuration(train__recompute=recompute)
    per_sample = config.data.sequence_length**2 * config.train.micro_batch
    assert predicted(config) - predicted(without) == (LAYERS * 4 if recompute == "none" else 1) * per_sample


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
@pytest.mark.parametrize("split", [False, True])
def test_the_formulas_are_what_a_tensor_parallel_rank_saves(ranks_2: RankPool, split: bool, recompute: str) -> None:
    config = configuration(train__precision="bf16", train__recompute=recompute, parallel__sequence_parallel=split)
    expected = predicted(config, 2) + more_on_a_cpu(config, 2)
    # the embedding keeps which tokens are elsewhere; a thread of gloo's may not have let go of its last tensors yet
    copies = 2 * stream_bytes(config, 1)
    for found in ranks_2.run(held_in_tensor_parallel, config.model_dump(mode="json")):
        assert 0.98 * expected < found < 1.02 * expected + copies


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_the_formulas_are_what_the_decoder_saves_on_a_gpu(recompute: str) -> None:
    config = configuration(train__precision="bf16", train__recompute=recompute)
    assert held(config, "cuda") == pytest.approx(predicted(config), rel=0.02)


def test_a_layer_by_hand() -> None:
    config = configuration(train__precision="bf16")  # 256 tokens, D 64, F 160, 4 heads
    assert layer_activations(config, 1).kept == 256 * (2 * (8 * 64 + 4 * 160) + 4 * (4 + 2))
    assert layer_activations(config, 2).kept == 256 * (2 * (4 * 64 + 4 * 32 + 4 * 80) + 4 * (2 + 2))
    split = configuration(train__precision="bf16", parallel__sequence_parallel=True)
    assert stream_bytes(split, 2) == 256 * 2 * 32
    assert layer_activations(split, 2).kept == 256 * (2 * (2 * 32 + 2 * 64 + 4 * 32 + 4 * 80) + 4 * (2 + 1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_full_recomputation_drops_comes_back_one_layer_at_a_time(precision: str) -> None:
    plain = layer_activations(configuration(train__precision=precision), 1)
    full = layer_activations(configuration(train__precision=precision, train__recompute="full"), 1)
    selective = layer_activations(configuration(train__precision=precision, train__recompute="selective"), 1)
    assert full.kept + full.working == plain.kept + plain.working
    assert full.kept < selective.kept < plain.kept
    assert plain.working < selective.working < full.working
