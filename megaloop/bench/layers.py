"""``megaloop bench layers``: how long the embedding, one layer and the head take, for balancing pipeline stages."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megaloop.config import Config
from megaloop.data import embedding_rows, open_sources
from megaloop.depth import DepthPlan
from megaloop.model import DecoderStage, choose_kernels, vocab_parallel_cross_entropy
from megaloop.runtime.device import local_device
from megaloop.runtime.dtype import training_dtype
from megaloop.runtime.hardware import describe_machine

__all__ = ["LayerTimes", "bench_layers"]


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of forward and backward pass of one micro-batch, medians.

    Attributes:
        embedding, layer, head: what ``parallel.layer_costs`` takes; the head counts its norm and the loss.
    """

    machine: str
    embedding: float
    layer: float
    head: float


def bench_layers(config: Config, rounds: int = 10) -> LayerTimes:
    """Time the parts of ``config``'s decoder on this device, without tensor parallelism, each in turn.

    Args:
        config: its model, precision, micro-batch and sequence length are used.
        rounds: repetitions; the parts alternate.
    """
    device = local_device()
    dtype = training_dtype(config.train.precision)
    kernels = choose_kernels(device, dtype)
    vocab_size = config.model.vocab_size or embedding_rows(config, open_sources(config.data))
    shape = (config.train.micro_batch, config.data.sequence_length)
    tokens_BS = torch.randint(0, vocab_size, shape, device=device)
    x_BSD = torch.randn(*shape, config.model.hidden_size, device=device, dtype=dtype)

    def stage(owned: tuple[int, ...], first: bool, last: bool) -> DecoderStage:
        made = DecoderStage(
            config.model, vocab_size, DepthPlan.plain(1),
            owned=owned, first=first, last=last, kernels=kernels, recompute=config.train.recompute,
        )  # fmt: skip
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.normal_(std=0.02)
        return made.to(device, dtype)

    embedding, layer, head = stage((), True, False), stage((0,), False, False), stage((), False, True)
    if config.train.compile:
        layer.compile_layers()
    parts: list[Callable[[], None]] = [
        lambda: embedding(tokens_BS).sum().backward(),
        lambda: layer(x_BSD.requires_grad_()).sum().backward(),
        lambda: vocab_parallel_cross_entropy(head(x_BSD.requires_grad_()), tokens_BS, head.tp).backward(),
    ]
    times: list[list[float]] = [[] for _ in parts]
    for number in range(-2, rounds):  # two rounds to warm up
        for part, seconds in zip(parts, times, strict=True):
            elapsed = _timed(part, device)
            if number >= 0:
                seconds.append(elapsed)
    medians = [statistics.median(seconds) for seconds in times]
    return LayerTimes(describe_machine(), *medians)


def _timed(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
