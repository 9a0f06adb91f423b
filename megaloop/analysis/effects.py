"""What skipping a layer changes: on later layers and on the output (arXiv 2505.13898, section 3.2).

Layer s is skipped: its output is its input.

* *current* effect: it is skipped at all positions but the first, and every position is measured;
* *future* effect: it is skipped at positions 1 to t - 1, and positions from t on are measured: what later tokens still read of what the layer
  computed for earlier ones;
* *local* effect on a later layer l: what layer s added is taken from the input of l alone, and nothing of it goes further: which layers use
  directly what s writes.

The first position is spared, as in the authors' code (github RobertCsordas/llm_effective_depth, commit f29a115): attention rests there, with a residual
stream many times as long as others, and without it a model is another one.

On a later layer the effect is |d_l - d'_l| / |d_l|, where d_l is what it adds; on the output it is the Euclidean distance of the two distributions.
Both are the largest over positions, and boundaries t of a prompt.

A pass with layer s skipped begins after s, from the trace of the untouched pass, and all boundaries of all prompts of a batch go through together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megaloop.analysis.contributions import relative_change
from megaloop.analysis.prompts import Prompt, PromptBatch
from megaloop.analysis.trace import LayerTrace, Trace, execute_layer, resume
from megaloop.model import AttentionContext, Decoder, DecoderLayer

__all__ = ["SHORTEST", "Effects", "Setting", "answer_starts", "boundaries", "local_effects", "skip_effects"]

Setting = Literal["current", "future"]
SHORTEST = 13
"""Tokens of a prompt that has a boundary: they are multiples of 8 from 8 on, with more than 4 tokens from them on."""
_HEAD_ROWS = 512
"""Positions whose distributions are in memory at once."""


@dataclass(frozen=True)
class Effects:
    """Largest effects of skipping each layer, for each prompt of a batch.

    Attributes:
        later_BLL: of skipping the first index on the layer at the second; 0 on layers that are not later.
        output_BL: on the output.
    """

    later_BLL: Tensor
    output_BL: Tensor


def boundaries(lengths: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Of each prompt, so many boundaries at random, or all there are: multiples of 8, from 8 to less than its length less 4."""
    rng = random.Random(seed)
    found = []
    for length in lengths:
        possible = list(range(8, length - 4, 8))
        found.append(sorted(rng.sample(possible, min(count, len(possible)))))
    return found


def answer_starts(prompts: Sequence[Prompt]) -> list[int] | None:
    """Where each prompt's answer begins to be predicted: its first target, if in all prompts targets are one run with a question before it.

    None for texts, whose every token is a target, and for problems with targets here and there.
    """
    starts = []
    for prompt in prompts:
        (places,) = (prompt.targets >= 0).nonzero()
        if not len(places) or places[0] < 2 or places[-1] - places[0] + 1 != len(places):
            return None
        starts.append(int(places[0]))
    return starts


@dataclass(frozen=True)
class _Rows:
    """Prompts of a batch, each once for each boundary.

    Attributes:
        prompt_R: which prompt.
        skipped_RS1: at which positions the layer is skipped.
        measured_RS: which positions are measured.
    """

    prompt_R: Tensor
    skipped_RS1: Tensor
    measured_RS: Tensor

    @classmethod
    def of(cls, batch: PromptBatch, setting: Setting, at: Sequence[Sequence[int]]) -> _Rows:
        valid_BS, device = batch.valid_BS, batch.valid_BS.device
        if setting == "current":
            everywhere_B = torch.arange(len(valid_BS), device=device)
            return cls(everywhere_B, (_positions(valid_BS) >= 1).expand_as(valid_BS).unsqueeze(2), valid_BS)
        pairs = [(row, t) for row, own in enumerate(at) for t in own]
        prompt_R = torch.tensor([row for row, _ in pairs], device=device, dtype=torch.long)
        t_R1 = torch.tensor([[t] for _, t in pairs], device=device, dtype=torch.long).reshape(-1, 1)
        position_S = _positions(valid_BS)
        skipped_RS = (position_S >= 1) & (position_S < t_R1)
        return cls(prompt_R, skipped_RS.unsqueeze(2), valid_BS[prompt_R] & (position_S >= t_R1))

    def largest(self, values_RS: Tensor, prompts: int) -> Tensor:
        """Of each prompt over its measured positions; fp64 [B]."""
        of_row = values_RS.double().masked_fill(~self.measured_RS, 0.0).amax(1)
        return of_row.new_zeros(prompts).scatter_reduce(0, self.prompt_R, of_row, "amax")


def _positions(valid_BS: Tensor) -> Tensor:
    return torch.arange(valid_BS.shape[1], device=valid_BS.device)


@torch.no_grad()
def skip_effects(
    model: Decoder, traced: Trace, batch: PromptBatch, setting: Setting, at: Sequence[Sequence[int]] = ()
) -> Effects:
    """Current or future effects of skipping each layer on later ones and on the output.

    Args:
        at: of future effects: the boundaries of each prompt.
    """
    rows, prompts, depth = _Rows.of(batch, setting, at), len(batch.numbers), len(traced.layers)
    later_BLL = torch.zeros(prompts, depth, depth, dtype=torch.float64)
    output_BL = torch.zeros(prompts, depth, dtype=torch.float64)
    deltas = [layer.delta_BSD for layer in traced.layers]
    distance = _OutputDistance(model, traced, rows)

    def skipped(x: Tensor, layer: LayerTrace) -> Tensor:
        return torch.where(rows.skipped_RS1, x, layer.after_BSD[rows.prompt_R])

    for place in range(depth):

        def watch(at: int, added_RSD: Tensor, place: int = place) -> None:
            change_RS = relative_change(deltas[at][rows.prompt_R], added_RSD)
            later_BLL[:, place, at] = rows.largest(change_RS, prompts).cpu()

        final_RSD = resume(model, traced, place, rows.prompt_R, skipped, watch)
        output_BL[:, place] = rows.largest(distance(final_RSD), prompts).cpu()
    return Effects(later_BLL, output_BL)


class _OutputDistance:
    """How far the distributions of changed passes are from those of the untouched one, where they are measured."""

    def __init__(self, model: Decoder, traced: Trace, rows: _Rows):
        self._model, self._rows = model, rows
        prompt_M, self._position_M = rows.measured_RS.nonzero(as_tuple=True)
        places_M2 = torch.stack([rows.prompt_R[prompt_M], self._position_M], 1)
        unique_U2, self._which_M = places_M2.unique(dim=0, return_inverse=True)
        self._row_M = prompt_M
        hidden_UD = traced.final_BSD[unique_U2[:, 0], unique_U2[:, 1]]
        self._expected_UV = torch.cat([self._distribution(part) for part in hidden_UD.split(_HEAD_ROWS)])

    def __call__(self, final_RSD: Tensor) -> Tensor:
        """[R, S]; 0 where nothing is measured."""
        hidden_MD = final_RSD[self._row_M, self._position_M]
        found = [
            (self._distribution(hidden) - self._expected_UV[which]).norm(dim=1)
            for hidden, which in zip(hidden_MD.split(_HEAD_ROWS), self._which_M.split(_HEAD_ROWS), strict=True)
        ]
        distance_RS = torch.zeros(final_RSD.shape[:2], device=final_RSD.device)
        distance_RS[self._row_M, self._position_M] = torch.cat(found)
        return distance_RS

    def _distribution(self, hidden_MD: Tensor) -> Tensor:
        return self._model.logits(hidden_MD.unsqueeze(0))[0].float().softmax(-1)


@torch.no_grad()
def local_effects(
    model: Decoder, traced: Trace, batch: PromptBatch, setting: Setting, at: Sequence[Sequence[int]] = ()
) -> Tensor:
    """Effects of taking what each layer added from the input of each later one alone, fp64 [B, L, L]."""
    rows, prompts, depth = _Rows.of(batch, setting, at), len(batch.numbers), len(traced.layers)
    effects_BLL = torch.zeros(prompts, depth, depth, dtype=torch.float64)
    documents = None if traced.documents_BS is None else traced.documents_BS[rows.prompt_R]
    context = model.attention_context(batch.tokens_BS.shape[1], 0, documents, batch.tokens_BS.device)
    for later, layer in enumerate(traced.layers):
        added_RSD = layer.delta_BSD[rows.prompt_R]
        for place in range(later):
            taken_RSD = traced.layers[place].delta_BSD[rows.prompt_R] * rows.skipped_RS1
            changed = _Taking(layer.h_BSD[rows.prompt_R] - taken_RSD)
            model.run(
                layer.before_BSD[rows.prompt_R],
                [layer.call],
                first=False,
                last=False,
                entry=traced.entry(later, rows.prompt_R),
                context=context,
                execute=changed,
            )
            effects_BLL[:, place, later] = rows.largest(relative_change(added_RSD, changed.added), prompts).cpu()
    return effects_BLL


class _Taking:
    """Executes a layer on another input, and keeps what it adds."""

    def __init__(self, h_RSD: Tensor):
        self._h_RSD = h_RSD
        self.added: Tensor

    def __call__(
        self, call: object, layer: DecoderLayer, x: Tensor, context: AttentionContext, scale: float, factor: float
    ) -> Tensor:
        _, attention, mlp = execute_layer(layer, self._h_RSD, context, scale, factor)
        self.added = attention + mlp
        return x
