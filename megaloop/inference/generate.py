"""Text generation with a key-value cache, greedy or sampled, on one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megaloop.depth import DepthSpec, LayerCall, with_inference_loop
from megaloop.errors import MegaloopError
from megaloop.inference.load import load_decoder
from megaloop.model import Decoder

__all__ = ["GenerationResult", "generate_text", "generate_tokens"]


@dataclass(frozen=True)
class GenerationResult:
    """A generated text.

    Attributes:
        text: prompt and continuation.
        tokens: tokens generated, the end-of-text token included.
        seconds: time from the prompt to the last token.
        stopped: ``end`` (the model ended the text) or ``length`` (``max_tokens`` were generated).
    """

    text: str
    tokens: int
    seconds: float
    stopped: Literal["end", "length"]


def generate_text(
    checkpoint: Path,
    prompt: str,
    *,
    max_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    depth: DepthSpec | None = None,
    on_text: Callable[[str], None] | None = None,
) -> GenerationResult:
    """Continue ``prompt`` with the model of a checkpoint.

    Args:
        checkpoint: a checkpoint, or a run (its newest).
        prompt: taken as it is, as transformers does; without one the model writes a new document.
        temperature: 0 is greedy.
        top_k: sample from the k likeliest tokens; 0: all.
        top_p: sample from the likeliest tokens that together have this probability.
        depth: run the layers in this order, such as ``10-4x3-10``; default: as trained.
        on_text: called with each piece of text as it comes.

    Raises:
        MegaloopError: a damaged checkpoint, or one without a tokenizer; no prompt, and a tokenizer without an end-of-text token.
    """
    model, opened = load_decoder(checkpoint, precision=precision)
    calls = None if depth is None else with_inference_loop(model.plan, depth).calls
    tokenizer = opened.open_tokenizer("generate writes text")
    ids = tokenizer.encode_prompt(prompt)
    if not ids and tokenizer.eos_id < 0:
        raise MegaloopError(
            f"tokenizer {tokenizer.path} has no end-of-text token, after which a document could begin; give a prompt"
        )
    generator = torch.Generator(device=model.device).manual_seed(seed)
    began = time.perf_counter()
    produced: list[int] = []
    shown = tokenizer.decode(ids)
    stopped: Literal["end", "length"] = "length"
    sampling = (temperature, top_k, top_p, generator, tokenizer.vocab_size)
    for token in generate_tokens(model, ids, max_tokens, *sampling, end_id=tokenizer.eos_id, calls=calls):
        produced.append(token)
        if token == tokenizer.eos_id:
            stopped = "end"
            break
        text = tokenizer.decode(ids + produced)
        # a character of several bytes is shown when its last byte token has come
        if on_text is not None and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            on_text(text[len(shown) :])
            shown = text
    kept = [token for token in produced if token != tokenizer.eos_id]
    seconds = time.perf_counter() - began
    return GenerationResult(tokenizer.decode(ids + kept), len(produced), seconds, stopped)


def generate_tokens(
    model: Decoder,
    prompt: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    vocab_size: int | None = None,
    *,
    end_id: int = -1,
    calls: Sequence[LayerCall] | None = None,
) -> Iterator[int]:
    """Token ids after ``prompt``, one by one; each new token costs one pass over itself alone.

    Args:
        prompt: may be empty where ``end_id`` is given: a new document begins.
        vocab_size: the tokenizer's tokens; rows of the embedding beyond them are padding and are never chosen.
        end_id: what ends a document, and so stands before the next.
        calls: the executions of layers; default: as trained.
    """
    choose = partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    if prompt:
        yield from _continue(model, prompt, max_tokens, vocab_size, choose, calls)
        return
    # in training, the first token of a document is what follows the end of another
    document = _continue(model, [end_id], max_tokens, vocab_size, choose, calls)
    if not model.config.document_masking:
        yield from document
        return
    # and the tokens after it do not look back to that end
    token = next(document)
    yield token
    yield from _continue(model, [token], max_tokens - 1, vocab_size, choose, calls)


@torch.inference_mode()
def _continue(
    model: Decoder,
    prompt: list[int],
    max_tokens: int,
    vocab_size: int | None,
    choose: Callable[[Tensor], int],
    calls: Sequence[LayerCall] | None,
) -> Iterator[int]:
    calls = model.plan.calls() if calls is None else calls
    caches = model.new_caches(1, len(prompt) + max_tokens, calls)
    tokens_BS = torch.tensor([prompt], device=model.device)
    for _ in range(max_tokens):
        logits_V = model(tokens_BS, caches=caches, calls=calls)[0, -1, :vocab_size].float()
        token = choose(logits_V)
        yield token
        tokens_BS = torch.tensor([[token]], device=model.device)


def _choose(logits_V: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / temperature
    if top_k:
        threshold = logits_V.topk(min(top_k, logits_V.numel())).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, float("-inf"))
    if top_p < 1:
        sorted_V, order_V = logits_V.softmax(-1).sort(descending=True)
        before_V = sorted_V.cumsum(-1) - sorted_V
        outside_V = (before_V >= top_p).index_fill(0, torch.tensor([0], device=logits_V.device), False)
        logits_V = logits_V.index_fill(0, order_V[outside_V], float("-inf"))
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))
