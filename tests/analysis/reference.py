"""The measures of depth by their formulas, from hooks on transformers' own Llama: one prompt at a time, one pass for each question.

h_l is what enters layer l, a_l and m_l what attention and MLP add, d_l = a_l + m_l (arXiv 2505.13898; 2303.08112 for the lens,
2602.13517 for the deep-thinking ratio). Nothing of megaloop is used.

Shape suffixes: S positions, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["HookedLlama", "Lens", "Observed"]


@dataclass(frozen=True)
class Observed:
    """Of one pass over one prompt, each without a batch dimension.

    Attributes:
        h, a, m: of every layer, [S, D].
        end: what enters the final norm, [S, D].
        p: the distribution that comes out, [S, V].
    """

    h: list[Tensor]
    a: list[Tensor]
    m: list[Tensor]
    end: Tensor
    p: Tensor

    def d(self, layer: int) -> Tensor:
        return self.a[layer] + self.m[layer]


@dataclass(frozen=True)
class Lens:
    """Of every place, the embedding's first and the end last, means over tokens (loss and accuracy: over targets).

    Attributes:
        deep: the deep-thinking ratio.
    """

    kl: list[float]
    overlap: list[float]
    agreement: list[float]
    divergence: list[float]
    loss: list[float]
    accuracy: list[float]
    deep: float


class HookedLlama:
    """A ``LlamaForCausalLM`` that is looked at and changed by forward hooks, which are gone after each pass."""

    def __init__(self, model: Any):
        self.model = model.eval()
        self.layers = list(model.model.layers)
        self._whole: dict[tuple[int, ...], Observed] = {}

    def whole(self, tokens: Sequence[int]) -> Observed:
        """The unchanged pass, which many questions are about."""
        key = tuple(tokens)
        if key not in self._whole:
            self._whole[key] = self.observe(tokens)
        return self._whole[key]

    @torch.no_grad()
    def observe(self, tokens: Sequence[int], *hooks: Callable[[], Any]) -> Observed:
        """A pass; ``hooks`` register what changes it."""
        h: dict[int, Tensor] = {}
        a: dict[int, Tensor] = {}
        m: dict[int, Tensor] = {}
        end: dict[int, Tensor] = {}

        def keep(into: dict[int, Tensor], number: int) -> Callable[..., None]:
            def hook(_module: Any, *values: Any) -> None:
                found = values[-1][0] if isinstance(values[-1], tuple) else values[-1]
                into[number] = found[0]

            return hook

        with ExitStack() as stack:
            handles = [hook() for hook in hooks]  # first: what they change is what is seen
            for number, layer in enumerate(self.layers):
                # what a layer reads is what its first norm reads, after any change of it
                handles.append(layer.input_layernorm.register_forward_pre_hook(keep(h, number)))
                handles.append(layer.self_attn.register_forward_hook(keep(a, number)))
                handles.append(layer.mlp.register_forward_hook(keep(m, number)))
            handles.append(self.model.model.norm.register_forward_pre_hook(keep(end, 0)))
            for handle in handles:
                stack.callback(handle.remove)
            logits_SV = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        numbers = range(len(self.layers))
        h_a_m = [[kept[number] for number in numbers] for kept in (h, a, m)]
        return Observed(h_a_m[0], h_a_m[1], h_a_m[2], end[0], logits_SV.softmax(-1))

    def contributions(self, tokens: Sequence[int]) -> list[list[float]]:
        """Of each layer: |a|/|h|, |m|/|h+a|, |a+m|/|h|, cos(a,h), cos(m,h+a), cos(a+m,h), |h|; means over tokens."""
        seen = self.whole(tokens)
        return [
            [
                float((a.norm(dim=1) / h.norm(dim=1)).mean()),
                float((m.norm(dim=1) / (h + a).norm(dim=1)).mean()),
                float(((a + m).norm(dim=1) / h.norm(dim=1)).mean()),
                float(torch.cosine_similarity(a, h).mean()),
                float(torch.cosine_similarity(m, h + a).mean()),
                float(torch.cosine_similarity(a + m, h).mean()),
                float(h.norm(dim=1).mean()),
            ]
            for h, a, m in zip(seen.h, seen.a, seen.m, strict=True)
        ]

    def _skip(self, layer: int, skipped: slice) -> Callable[[], Any]:
        """The layer's output is its input at those positions."""

        def hook(_module: Any, inputs: Any, keywords: Any, output: Tensor) -> Tensor:
            entered = inputs[0] if inputs else keywords["hidden_states"]
            output = output.clone()
            output[:, skipped] = entered[:, skipped]
            return output

        return lambda: self.layers[layer].register_forward_hook(hook, with_kwargs=True)

    def _subtract(self, layer: int, taken_SD: Tensor) -> Callable[[], Any]:
        """Something is taken from what a layer reads."""

        def hook(_module: Any, inputs: Any) -> Any:
            return (inputs[0] - taken_SD, *inputs[1:])

        return lambda: self.layers[layer].register_forward_pre_hook(hook)

    def skipping(self, tokens: Sequence[int], layer: int, at: Sequence[int] | None) -> tuple[list[float], float]:
        """Effects of skipping a layer on every later one (0 on others) and on the output.

        Args:
            at: the boundaries of a future effect; None: the current effect.
        """
        whole = self.whole(tokens)
        later, output = [0.0] * len(self.layers), 0.0
        for skipped, measured in _settings(at):
            without = self.observe(tokens, self._skip(layer, skipped))
            for after in range(layer + 1, len(self.layers)):
                later[after] = max(later[after], _change(whole.d(after), without.d(after), measured))
            output = max(output, float((whole.p - without.p)[measured].norm(dim=1).max()))
        return later, output

    def local(self, tokens: Sequence[int], layer: int, after: int, at: Sequence[int] | None) -> float:
        """Effect on one later layer of taking from its input what a layer added; ``at`` as :meth:`skipping`."""
        whole, effect = self.whole(tokens), 0.0
        for skipped, measured in _settings(at):
            taken = torch.zeros_like(whole.end)
            taken[skipped] = whole.d(layer)[skipped]
            without = self.observe(tokens, self._subtract(after, taken))
            effect = max(effect, _change(whole.d(after), without.d(after), measured))
        return effect

    @torch.no_grad()
    def lens(self, tokens: Sequence[int], targets: Sequence[int]) -> Lens:
        """head(norm(h)) of every place against the end; targets of -1 are none."""
        seen = self.whole(tokens)
        final = seen.p.log()
        logs = [self.model.lm_head(self.model.model.norm(state)).log_softmax(-1) for state in (*seen.h, seen.end)]
        wanted = [(place, target) for place, target in enumerate(targets) if target >= 0]
        js = [_jensen_shannon(log.exp(), seen.p) for log in logs]
        settled = [_settling_layer([float(of[token]) for of in js[1:]]) for token in range(len(tokens))]
        deep = [layer >= math.ceil(0.85 * len(self.layers)) for layer in settled]
        return Lens(
            kl=[float((log.exp() * (log - final)).sum(1).mean()) for log in logs],
            overlap=[_overlap(log, final) for log in logs],
            agreement=[float((log.argmax(1) == final.argmax(1)).float().mean()) for log in logs],
            divergence=[float(of.mean()) for of in js],
            loss=[sum(-float(log[place, target]) for place, target in wanted) / len(wanted) for log in logs],
            accuracy=[
                sum(int(log[place].argmax()) == target for place, target in wanted) / len(wanted) for log in logs
            ],
            deep=sum(deep) / len(deep),
        )


def _settings(at: Sequence[int] | None) -> list[tuple[slice, slice]]:
    """(where a layer is skipped, where it is measured): from 1 on, and everywhere; or from 1 to before t, and from t on."""
    return [(slice(1, None), slice(None))] if at is None else [(slice(1, t), slice(t, None)) for t in at]


def _change(before: Tensor, after: Tensor, measured: slice) -> float:
    return float(((before - after).norm(dim=1) / before.norm(dim=1).clamp(min=1e-6))[measured].max())


def _overlap(one: Tensor, other: Tensor) -> float:
    """The share of the five likeliest tokens that both have, mean over positions."""
    pairs = zip(one.topk(5).indices.tolist(), other.topk(5).indices.tolist(), strict=True)
    shares = [len(set(a) & set(b)) / 5 for a, b in pairs]
    return sum(shares) / len(shares)


def _jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """H((p + q) / 2) - (H(p) + H(q)) / 2, in nats, of every position."""

    def entropy(distribution: Tensor) -> Tensor:
        return torch.special.entr(distribution.double()).sum(-1)

    return entropy((p.double() + q.double()) / 2) - (entropy(p) + entropy(q)) / 2


def _settling_layer(divergences: Sequence[float]) -> int:
    """The first layer, counted from 1, by which a divergence was at most 0.5."""
    return next(layer for layer, found in enumerate(divergences, start=1) if found <= 0.5)
