"""Small looped models, and how they loop by the definition: every token in every pass, without packing and without engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, LoopStyle
from megaloop.model import Decoder, LoopInput
from megaloop.model.layers import KeyValueCache

__all__ = ["VOCAB", "dense", "model_of", "prompts", "shared_slots"]

VOCAB = 61


def model_of(depth: str, style: LoopStyle = LoopStyle(), **config: bool) -> Decoder:
    """A model with weights so large that iterations differ and predictions are not all the same."""
    plan = DepthPlan.parse(depth)
    plan = DepthPlan(plan.order, plan.lineage, style if plan.loop is not None else LoopStyle())
    settings = {"tied_embeddings": False} | config
    shape = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, init_std=0.15, **settings)  # type: ignore[arg-type]
    model = Decoder(shape, VOCAB, plan)
    model.initialise(3)
    return model.eval()


def prompts(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Of mixed lengths, from 1 on."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


class _Latest(KeyValueCache):
    """Keys and values of all tokens at one iteration; those that had left before are those of the iteration before."""

    def __init__(self, before: _Latest | None, left_S: Tensor):
        self.before, self.left_S, self.length = before, left_S, 0

    def append(self, k_BKSH: Tensor, v_BKSH: Tensor) -> tuple[Tensor, Tensor]:
        if self.before is not None:
            left = self.left_S[:, None]
            k_BKSH, v_BKSH = (
                torch.where(left, self.before.k_BKTH, k_BKSH),
                torch.where(left, self.before.v_BKTH, v_BKSH),
            )
        self.k_BKTH, self.v_BKTH = k_BKSH, v_BKSH
        return k_BKSH, v_BKSH


@torch.no_grad()
def dense(model: Decoder, tokens: Sequence[int], loops: Sequence[int] | Callable[[int], int]) -> Tensor:
    """Logits [S, V] of one sequence whose tokens run that many iterations each.

    All tokens run all iterations; the states of those that have left stay, and so do their keys and values.
    """
    calls, loop = model.plan.calls(), model.plan.loop
    assert loop is not None
    wanted_S = torch.tensor(loops)
    before, after = calls[: loop.start], calls[loop.stop :]
    x = model.run(torch.tensor([tokens]), before, first=True, last=False)
    context = model.attention_context(len(tokens), 0, None, x.device)
    entered, caches = x, [None] * loop.block
    for iteration in range(loop.iterations):
        left_S = wanted_S <= iteration
        own = calls[loop.start + iteration * loop.block : loop.start + (iteration + 1) * loop.block]
        caches = [_Latest(cache, left_S) for cache in caches]  # type: ignore[misc]
        new = model.run(x, own, caches=caches, first=False, last=False, entry=LoopInput(entered), context=context)  # type: ignore[arg-type]
        x = torch.where(left_S[:, None], x, new)
    return model.run(x, after, first=False, last=True, context=context)[0]


class _Slot(KeyValueCache):
    """Keys and values of a layer in one slot, each token's overwritten by every iteration that has the slot."""

    def append(self, k_BKSH: Tensor, v_BKSH: Tensor) -> tuple[Tensor, Tensor]:
        stop = self.length + 1
        self.k_BKTH[:, :, self.length : stop], self.v_BKTH[:, :, self.length : stop] = k_BKSH, v_BKSH
        return self.k_BKTH[:, :, :stop], self.v_BKTH[:, :, :stop]


@torch.no_grad()
def shared_slots(model: Decoder, tokens: Sequence[int], shared: int, prompt: int = 0) -> Tensor:
    """Logits [S, V] of one sequence, token after token, whose iterations read and write slot i mod ``shared``; no layers but the loop's.

    So many tokens of a prompt come before: they ran on full caches, and each slot has the last iteration's that falls on it.
    """
    calls = model.plan.calls()
    slots = {
        (i, layer): _Slot(1, 2, len(tokens), 8, torch.float32, model.device)
        for i in range(shared)
        for layer in {call.layer_id for call in calls}
    }
    caches = [slots[(call.iteration or 0) % shared, call.layer_id] for call in calls]
    full = model.new_caches(1, len(tokens), calls)
    if prompt:
        model(torch.tensor([tokens[:prompt]]), calls=calls, caches=full)
    for slot, cache in zip(caches, full, strict=True):
        slot.k_BKTH[:, :, :prompt], slot.v_BKTH[:, :, :prompt] = (
            cache.k_BKTH[:, :, :prompt],
            cache.v_BKTH[:, :, :prompt],
        )
    rows = []
    for at, token in enumerate(tokens[prompt:], start=prompt):
        for slot in slots.values():
            slot.length = at
        rows.append(model(torch.tensor([[token]]), calls=calls, caches=caches)[0, 0])
    return torch.stack(rows)
