"""``megaloop bench diagnose``: effects of skipping layers, against full forward passes with hooks on transformers' own model.

Both compute all future effects (arXiv 2505.13898, section 3.2) of the same prompts and boundaries: of skipping each layer at the positions before a
boundary, on what every later layer adds after it and on the output. The other way is what a notebook does: for each prompt, boundary and layer one
forward pass in which a hook replaces the layer's output by its input. They take turns; the ratio of their times is the result, and the effects are compared.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megaloop.analysis.contributions import SMALLEST
from megaloop.analysis.effects import boundaries, skip_effects
from megaloop.analysis.prompts import Prompt, Prompts
from megaloop.analysis.trace import trace
from megaloop.huggingface.weights import import_huggingface
from megaloop.inference.load import load_decoder
from megaloop.model import Decoder
from megaloop.runtime.hardware import describe_machine

__all__ = ["DiagnoseBenchmark", "bench_diagnose"]

_BATCH_TOKENS = 512
"""Tokens of prompts that go through together, each as often as it has boundaries."""


@dataclass(frozen=True)
class DiagnoseBenchmark:
    """What the benchmark measured.

    Attributes:
        ours, theirs: seconds, the median over repetitions.
        ratio: the median over repetitions of theirs / ours.
        spread: smallest and largest of those ratios.
        largest_difference: of any effect, relative to the largest one.
    """

    machine: str
    layers: int
    prompts: int
    tokens: int
    boundaries: int
    repeats: int
    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]
    largest_difference: float


def bench_diagnose(
    source: Path,
    *,
    prompts: int = 10,
    length: int = 128,
    boundaries_each: int = 4,
    seed: int = 123,
    repeats: int = 3,
    on_repeat: Callable[[int, float, float], None] | None = None,
) -> DiagnoseBenchmark:
    """Time both ways on a Hugging Face directory of a Llama, with random tokens as prompts.

    Raises:
        MegaloopError: there is no such model.
    """
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory(prefix="megaloop-bench-") as folder:
        checkpoint = Path(folder) / "imported"
        import_huggingface(source, checkpoint, without_tokenizer=True)
        model, _ = load_decoder(checkpoint)
        theirs: Any = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="sdpa").eval()
    generator = np.random.default_rng(seed)
    lengths = [int(generator.integers(length // 2, length + 1)) for _ in range(prompts)]
    tokens = [generator.integers(0, model.vocab_size, size) for size in lengths]
    asked = Prompts("random tokens", [Prompt(ids, np.append(ids[1:], -1)) for ids in tokens])
    at = boundaries(lengths, boundaries_each, seed)
    times: list[tuple[float, float]] = []
    for number in range(repeats + 1):  # the first warms up
        began = time.perf_counter()
        found = _ours(model, asked, at)
        middle = time.perf_counter()
        expected = _with_hooks(theirs, tokens, at)
        ended = time.perf_counter()
        if number:
            times.append((middle - began, ended - middle))
            if on_repeat is not None:
                on_repeat(number, *times[-1])
    ratios = [other / own for own, other in times]
    return DiagnoseBenchmark(
        machine=describe_machine(),
        layers=model.plan.depth,
        prompts=prompts,
        tokens=sum(lengths),
        boundaries=sum(map(len, at)),
        repeats=repeats,
        ours=statistics.median(own for own, _ in times),
        theirs=statistics.median(other for _, other in times),
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        largest_difference=float(np.abs(found - expected).max() / np.abs(expected).max()),
    )


def _ours(model: Decoder, prompts: Prompts, at: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """[P, L, L + 1]: effects of each layer on each later one, and on the output."""
    found: dict[int, NDArray[np.float64]] = {}
    for numbers in prompts.together(_BATCH_TOKENS):
        batch = prompts.batch(numbers, model.device)
        traced = trace(model, batch.tokens_BS)
        effects = skip_effects(model, traced, batch, "future", [at[number] for number in batch.numbers])
        both = torch.cat([effects.later_BLL, effects.output_BL.unsqueeze(2)], 2).numpy()
        found |= dict(zip(batch.numbers, both, strict=True))
    return np.stack([found[number] for number in range(len(prompts))])


@torch.no_grad()
def _with_hooks(model: Any, prompts: Sequence[NDArray[np.int64]], at: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """The same by full forward passes, a prompt at a time."""
    layers = model.model.layers
    found = np.zeros((len(prompts), len(layers), len(layers) + 1))
    for number, (ids, own) in enumerate(zip(prompts, at, strict=True)):
        tokens_1S = torch.from_numpy(ids).unsqueeze(0)
        added, logits = _added(model, tokens_1S, None, 0)
        expected = logits.softmax(-1)
        for t in own:
            for skipped in range(len(layers)):
                changed, changed_logits = _added(model, tokens_1S, skipped, t)
                for later in range(skipped + 1, len(layers)):
                    before, after = added[later][:, t:], changed[later][:, t:]
                    change = (before - after).norm(dim=-1) / before.norm(dim=-1).clamp(min=SMALLEST)
                    found[number, skipped, later] = max(found[number, skipped, later], float(change.max()))
                distance = (changed_logits[:, t:].softmax(-1) - expected[:, t:]).norm(dim=-1)
                found[number, skipped, -1] = max(found[number, skipped, -1], float(distance.max()))
    return found


def _added(model: Any, tokens_1S: Tensor, skipped: int | None, t: int) -> tuple[list[Tensor], Tensor]:
    """What each layer adds, and the logits; with a layer skipped at positions 1 to t - 1."""
    added: list[Tensor] = []

    def hook(number: int) -> Callable[[Any, Any, Any], Any]:
        def after(module: Any, inputs: tuple[Tensor, ...], output: Any) -> Any:
            given = output[0] if isinstance(output, tuple) else output
            added.append(given - inputs[0])
            if number != skipped:
                return output
            changed = given.clone()
            changed[:, 1:t] = inputs[0][:, 1:t]
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return after

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(model.model.layers)]
    try:
        logits: Tensor = model(tokens_1S, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return added, logits
