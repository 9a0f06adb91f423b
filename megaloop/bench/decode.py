"""``megaloop bench decode``: tokens per second of greedy generation, alternated in one run.

    ours       the engine of ``megaloop generate``
    theirs     transformers' ``generate`` with its static cache, on the exported model: a batch is padded, and runs until its longest
               sequence is done
    half       ours, where every token runs half the loops
    drafted    ours, where tokens are drafted with few loops and verified with all

Prompts are beginnings of held-out samples of the run's data, or random tokens where that is not at hand, of mixed lengths;
sequences are of mixed lengths too, and none ends early.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from megaloop.checkpoint import Checkpoint
from megaloop.depth import DepthSpec
from megaloop.errors import MegaloopError
from megaloop.evaluation.held_out import open_as_trained
from megaloop.huggingface.weights import export_huggingface
from megaloop.inference.engine import Engine, Request
from megaloop.inference.halting import Halting
from megaloop.inference.load import load_decoder
from megaloop.inference.passes import Passes
from megaloop.inference.setting import Setting
from megaloop.inference.speculation import Speculation
from megaloop.runtime.hardware import describe_machine

__all__ = ["DecodeBenchmark", "DecodeResult", "bench_decode", "table"]


_MOST_TEXTS = 64


@dataclass(frozen=True)
class DecodeResult:
    """One way to generate, at one size of the batch.

    Attributes:
        way: ``ours``, ``theirs``, ``half`` or ``drafted``.
        tokens_per_second: the median over repetitions.
        speed: relative to ours: the median over repetitions of ours' seconds / this way's.
        spread: smallest and largest of those.
        same: share of the tokens that are ours; of ``half``, which is another model, None.
        loops: iterations per token.
        accepted: share of the drafted tokens that were right; None: nothing was drafted.
    """

    batch: int
    way: str
    tokens_per_second: float
    speed: float
    spread: tuple[float, float]
    same: float | None
    loops: float
    accepted: float | None


@dataclass(frozen=True)
class DecodeBenchmark:
    """What the benchmark measured; ``prompts``: of what they were."""

    machine: str
    depth: str
    parameters: int
    prompts: str
    tokens: int
    repeats: int
    results: list[DecodeResult]


def bench_decode(
    checkpoint: Path,
    *,
    depth: DepthSpec | None = None,
    batches: Sequence[int] = (1, 16),
    prompt: int = 32,
    tokens: int = 64,
    repeats: int = 3,
    seed: int = 123,
    transformers: bool = True,
    speculate: Speculation | None = None,
    compiled: bool = False,
    on_way: Callable[[str], None] | None = None,
) -> DecodeBenchmark:
    """Time every way on the model of a checkpoint, or of a run's newest.

    Args:
        depth: how deep the model runs; None: as trained.
        batches: sequences at a time.
        prompt, tokens: of the longest sequence; the shortest has half as many of each.
        transformers: whether to compare with transformers; loops with an injection or a norm cannot be exported for its cache.
        speculate: how tokens are drafted; None: they are not.
        compiled: compile our layers; the repetition that warms up pays for it.

    Raises:
        MegaloopError: a damaged checkpoint, or a loop that cannot be exported.
    """
    model, opened = load_decoder(checkpoint)
    if compiled:
        model.compile_layers()
    texts = _held_out(opened)
    passes = Setting(depth).passes(model)
    theirs = _exported(checkpoint, depth) if transformers else None
    generator = np.random.default_rng(seed)
    results: list[DecodeResult] = []
    for batch in batches:
        sizes = [(_between(generator, prompt, batch), _between(generator, tokens, batch)) for _ in range(batch)]
        requests = [
            Request(_prompt(texts, row, size, model.vocab_size, generator), count)
            for row, (size, count) in enumerate(sizes)
        ]
        ways = _ways(passes, requests, theirs, speculate)
        results += _measure(batch, ways, sum(request.max_tokens for request in requests), repeats, on_way or _mute)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prompts = "held-out text" if texts else "random tokens"
    return DecodeBenchmark(describe_machine(), str(depth or model.plan), parameters, prompts, tokens, repeats, results)


def _held_out(checkpoint: Checkpoint) -> list[list[int]]:
    """Beginnings of held-out samples of a run's data; nothing where it is not at hand, and prompts are random."""
    for path in checkpoint.manifest.data.paths:
        with contextlib.suppress(MegaloopError):
            split = open_as_trained(checkpoint, path).split("validation")
            return [split.sample(number).tokens.tolist() for number in range(min(len(split), _MOST_TEXTS))]
    return []


def _prompt(
    texts: Sequence[list[int]], row: int, size: int, vocab_size: int, generator: np.random.Generator
) -> list[int]:
    """The beginning of a text, of the first ones again where there are fewer texts than rows; random tokens without any."""
    if not texts:
        return [int(token) for token in generator.integers(0, vocab_size, size)]
    return texts[row % len(texts)][:size]


def table(benchmark: DecodeBenchmark) -> Table:
    """A row for each way."""
    title = f"depth {benchmark.depth}, {benchmark.parameters:,} parameters, prompts of {benchmark.prompts}; {benchmark.machine}"
    found = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    for name in ("batch", "way", "tokens/s", "speed", "from", "to", "loops", "same tokens", "drafts accepted"):
        found.add_column(name, justify="left" if name == "way" else "right")
    for row in benchmark.results:
        shares = ("-" if share is None else f"{share:.1%}" for share in (row.same, row.accepted))
        numbers = (f"{value:.2f}x" for value in (row.speed, *row.spread))
        found.add_row(str(row.batch), row.way, f"{row.tokens_per_second:.1f}", *numbers, f"{row.loops:.2f}", *shares)
    return found


def _mute(what: str) -> None:
    pass


def _between(generator: np.random.Generator, most: int, batch: int) -> int:
    """Half to all; one sequence alone has all."""
    return most if batch == 1 else int(generator.integers(max(most // 2, 1), most + 1))


@dataclass(frozen=True)
class _Made:
    """Tokens of each sequence, iterations per token, and the share of drafted tokens that were right."""

    tokens: list[list[int]]
    loops: float
    accepted: float | None = None


Way = Callable[[], _Made]


def _ways(
    passes: Passes, requests: Sequence[Request], theirs: Any | None, speculate: Speculation | None
) -> dict[str, Way]:
    ways: dict[str, Way] = {"ours": lambda: _ours(passes, requests)}
    if theirs is not None:
        ways["theirs"] = lambda: _Made(_theirs(theirs, requests), float(passes.iterations))
    if passes.iterations > 1:
        half = Passes(passes.model, passes.calls, halting=Halting("fixed", passes.iterations // 2))
        ways["half"] = lambda: _ours(half, requests)
    if speculate is not None:
        ways["drafted"] = lambda: _ours(passes, requests, speculate)
    return ways


def _measure(
    batch: int, ways: dict[str, Way], tokens: int, repeats: int, on_way: Callable[[str], None]
) -> list[DecodeResult]:
    """All ways in turn, so that whatever else the machine does is the same for all."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    made: dict[str, _Made] = {}
    for number in range(repeats + 1):  # the first warms up
        for way, run in ways.items():
            on_way(f"batch {batch}, {way}, repetition {number} of {repeats}")
            began = time.perf_counter()
            made[way] = run()
            if number:
                seconds[way].append(time.perf_counter() - began)
    results = []
    for way, taken in seconds.items():
        ratios = [own / other for own, other in zip(seconds["ours"], taken, strict=True)]
        pairs = [
            pair
            for one, other in zip(made["ours"].tokens, made[way].tokens, strict=True)
            for pair in zip(one, other, strict=True)
        ]
        results.append(
            DecodeResult(
                batch,
                way,
                tokens / statistics.median(taken),
                statistics.median(ratios),
                (min(ratios), max(ratios)),
                None if way == "half" else sum(one == other for one, other in pairs) / len(pairs),
                made[way].loops,
                made[way].accepted,
            )
        )
    return results


def _ours(passes: Passes, requests: Sequence[Request], speculate: Speculation | None = None) -> _Made:
    made: list[list[int]] = [[] for _ in requests]
    loops = drafted = accepted = 0
    for event in Engine(passes, rows=len(requests), speculate=speculate).run(requests):
        made[event.number].append(event.token)
        loops += event.loops
        if event.stopped is not None:
            drafted, accepted = drafted + event.drafted, accepted + event.accepted
    return _Made(made, loops / sum(map(len, made)), accepted / drafted if drafted else None)


def _exported(checkpoint: Path, depth: DepthSpec | None) -> Any:
    """The model as transformers has it: every use of a layer a layer of its own."""
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory(prefix="megaloop-bench-") as folder:
        export_huggingface(checkpoint, Path(folder) / "out", dtype="fp32", depth=depth)
        return LlamaForCausalLM.from_pretrained(
            Path(folder) / "out", dtype=torch.float32, attn_implementation="sdpa"
        ).eval()


@torch.inference_mode()
def _theirs(model: Any, requests: Sequence[Request]) -> list[list[int]]:
    longest, count = (max(len(request.tokens) for request in requests), max(request.max_tokens for request in requests))
    padding = [longest - len(request.tokens) for request in requests]
    ids = torch.tensor([[0] * pad + list(request.tokens) for pad, request in zip(padding, requests, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        cache_implementation="static", pad_token_id=0, eos_token_id=None,
    )[:, longest:]  # fmt: skip
    return [row[: request.max_tokens] for row, request in zip(made.tolist(), requests, strict=True)]
