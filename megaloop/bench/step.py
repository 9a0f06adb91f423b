"""``megaloop bench step``: our training step against a plain loop around transformers' Llama.

Both train the same shape on the same batches with the same dtype, optimizer and threads; they take turns in
one process, because machines are shared and noisy, and the median of their ratios is the result. Where a GPU's memory
does not hold both, each runs in a process of its own, one after the other.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from megaloop.bench.batches import random_batches
from megaloop.config import Config
from megaloop.depth.flops import flops_per_token
from megaloop.huggingface.llama import llama_settings
from megaloop.layout.sources import InitialValues
from megaloop.layout.topology import Topology
from megaloop.parallel.engine import TrainingEngine, join_ranks
from megaloop.runtime.device import local_device
from megaloop.runtime.dtype import training_dtype
from megaloop.runtime.hardware import describe_machine

__all__ = ["SHAPES", "StepBenchmark", "bench_step"]

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "depth": "8",
        "model": {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 8, "ffn_size": 688, "vocab_size": 4096},
    },
    "small": {
        "depth": "8",
        "model": {"hidden_size": 512, "num_heads": 8, "num_kv_heads": 8, "ffn_size": 1376, "vocab_size": 4096},
    },
    "360m": {
        "depth": "32",
        "model": {"hidden_size": 960, "num_heads": 15, "num_kv_heads": 5, "ffn_size": 2560, "vocab_size": 49152},
    },
    "1.7b": {
        "depth": "24",
        "model": {"hidden_size": 2048, "num_heads": 32, "num_kv_heads": 32, "ffn_size": 8192, "vocab_size": 49152},
    },
}
"""Shapes by name: two for CPUs, and SmolLM v1's."""


@dataclass(frozen=True)
class StepBenchmark:
    """What the benchmark measured.

    Attributes:
        ours, theirs: tokens per second, the median over rounds; theirs is transformers'.
        ratio: the median over rounds of ours / theirs (each round runs both).
        spread: smallest and largest of those ratios.
        tflops: our model TFLOP/s (forward and backward, no recomputation).
        product_tflops: rate of a large matrix product in the same dtype, measured in the same run.
        utilisation: tflops / product_tflops.
        ours_loss, theirs_loss: losses of the last step, which must agree.
        apart: each ran in a process of its own.
        ours_peak, theirs_peak: the most bytes of the GPU's memory that tensors took, in processes of their own; None on a CPU.
    """

    machine: str
    shape: str
    precision: str
    batch: int
    sequence_length: int
    compile: bool
    threads: int
    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]
    tflops: float
    product_tflops: float
    utilisation: float
    ours_loss: float
    theirs_loss: float
    apart: bool = False
    ours_peak: int | None = None
    theirs_peak: int | None = None


@dataclass
class _Contender:
    """What was measured of a contender: seconds of each round, the last loss, and the most memory that it took."""

    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    peak: int | None = None


def bench_step(
    shape: str = "tiny",
    *,
    precision: str = "fp32",
    batch: int = 4,
    sequence_length: int = 256,
    steps: int = 5,
    rounds: int = 5,
    compile: bool = False,
    recompute: str = "none",
    threads: int | None = None,
    apart: bool = False,
    on_round: Callable[[int, float, float], None] | None = None,
) -> StepBenchmark:
    """Alternate ``rounds`` times between ``steps`` of our 1x1x1 engine and of the plain loop.

    Args:
        shape: a key of :data:`SHAPES`.
        batch: samples per step, one micro-batch.
        compile: torch.compile both (our layers; their whole model).
        threads: CPU threads of both; default: torch's.
        apart: do not alternate: all rounds of each in a process of its own, whose memory is free when the other begins.
        on_round: called after each round with its number and both rates in tokens per second.
    """
    config = _configuration(shape, precision, batch, sequence_length, compile, recompute)
    tokens = batch * sequence_length * steps
    if apart:
        ours, theirs = (
            _in_a_process(steps_of, config, steps, rounds, threads) for steps_of in (_our_steps, _their_steps)
        )
    if threads:
        torch.set_num_threads(threads)
    if not apart:
        ours, theirs = _in_turns(config, steps, rounds, tokens, on_round)
    pairs = list(zip(ours.seconds, theirs.seconds, strict=True))
    if apart and on_round is not None:
        for number, (our_seconds, their_seconds) in enumerate(pairs, 1):
            on_round(number, tokens / our_seconds, tokens / their_seconds)
    our_rate, their_rate = (tokens / statistics.median(trainer.seconds) for trainer in (ours, theirs))
    ratios = [their_seconds / our_seconds for our_seconds, their_seconds in pairs]
    product = _product_tflops(training_dtype(precision))
    flops = flops_per_token(config.depth.plan, config.model, sequence_length).total
    tflops = flops * our_rate / 1e12
    return StepBenchmark(
        machine=describe_machine(), shape=shape, precision=precision, batch=batch, sequence_length=sequence_length,
        compile=compile, threads=torch.get_num_threads(), ours=our_rate, theirs=their_rate,
        ratio=statistics.median(ratios), spread=(min(ratios), max(ratios)),
        tflops=tflops, product_tflops=product, utilisation=tflops / product,
        ours_loss=ours.loss, theirs_loss=theirs.loss, apart=apart, ours_peak=ours.peak, theirs_peak=theirs.peak,
    )  # fmt: skip


def _in_turns(
    config: Config, steps: int, rounds: int, tokens: int, on_round: Callable[[int, float, float], None] | None
) -> tuple[_Contender, _Contender]:
    """Both in this process, in turns."""
    running = [(_our_steps(config), _Contender()), (_their_steps(config), _Contender())]
    for number in range(-1, rounds):  # round -1 warms up and compiles
        for losses, contender in running:
            _time(losses, steps, contender)
        if number < 0:
            for _, contender in running:
                contender.seconds.clear()
        elif on_round is not None:
            on_round(number + 1, *(tokens / contender.seconds[-1] for _, contender in running))
    (_, ours), (_, theirs) = running
    return ours, theirs


def _in_a_process(
    steps_of: Callable[[Config], Iterator[float]], config: Config, steps: int, rounds: int, threads: int | None
) -> _Contender:
    """One of them, all rounds, in a process that has ended when this returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_alone, steps_of, config, steps, rounds, threads).result()


def _alone(
    steps_of: Callable[[Config], Iterator[float]], config: Config, steps: int, rounds: int, threads: int | None
) -> _Contender:
    if threads:
        torch.set_num_threads(threads)
    losses, found = steps_of(config), _Contender()
    for _ in range(-1, rounds):
        _time(losses, steps, found)
    del found.seconds[0]
    if torch.cuda.is_available():
        found.peak = torch.cuda.max_memory_allocated()
    return found


def _configuration(
    shape: str, precision: str, batch: int, sequence_length: int, compile: bool, recompute: str
) -> Config:
    return Config.model_validate(
        {
            **SHAPES[shape],
            "name": "bench",
            "data": {"sources": [{"path": "synthetic"}], "sequence_length": sequence_length},
            "train": {
                "global_batch": batch,
                "micro_batch": batch,
                "precision": precision,
                "compile": compile,
                "recompute": recompute,
            },
        }
    )


def _time(losses: Iterator[float], count: int, contender: _Contender) -> None:
    """Time ``count`` steps. A loss is a number on the host, so the device is done."""
    began = time.perf_counter()
    for _ in range(count):
        contender.loss = next(losses)
    contender.seconds.append(time.perf_counter() - began)


def _our_steps(config: Config) -> Iterator[float]:
    """Losses of our engine on one rank, a step each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    join_ranks()
    vocab_size = config.model.vocab_size or 0
    engine = TrainingEngine(
        config, config.plan, Topology(), vocab_size, InitialValues(config.model, config.seed, config.plan, vocab_size)
    )
    batches = random_batches(config, vocab_size, local_device())
    while True:
        yield engine.train_step(batches, config.optimizer.lr).loss


def _their_steps(config: Config) -> Iterator[float]:
    """Losses of a plain loop around transformers, a step each: bf16 weights have fp32 masters there too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model_config, device = config.model, local_device()
    bf16 = config.train.precision == "bf16"
    model = LlamaForCausalLM(
        LlamaConfig(
            **llama_settings(model_config, config.plan.depth, config.data.sequence_length, config.train.precision),
            use_cache=False,
        )
    ).to(device, training_dtype(config.train.precision))
    weights = list(model.parameters())
    masters = [weight.detach().float().requires_grad_() for weight in weights] if bf16 else weights
    options = config.optimizer
    adam = torch.optim.AdamW(
        masters, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps,
        weight_decay=options.weight_decay, fused=True,
    )  # fmt: skip
    forward: Any = torch.compile(model) if config.train.compile else model
    for batch in random_batches(config, model_config.vocab_size or 0, device):
        logits_BSV = forward(batch.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1).float(), batch.targets.flatten())
        loss.backward()
        if bf16:
            for weight, master in zip(weights, masters, strict=True):
                master.grad = weight.grad.float() if weight.grad is not None else None
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, options.clip)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if bf16:
            with torch.no_grad():
                for weight, master in zip(weights, masters, strict=True):
                    weight.copy_(master)
        yield float(loss.detach())


def _product_tflops(dtype: torch.dtype) -> float:
    """TFLOP/s of a square matrix product, the best of several."""
    device = local_device()
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12
