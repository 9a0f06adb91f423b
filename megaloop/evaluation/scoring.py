"""How likely a decoder finds each answer to each question, in as few passes as that takes.

Questions that share their beginning (the shots) are scored together. The beginning runs once, and its keys and values are
copied to every question. A question and all of its candidate answers then are one row: the candidates stand one after another,
each looks at the question and at itself alone, and has the positions that it would have right after the question.

    row        q0 q1 q2  a0 a1  b0 b1 b2
    position    0  1  2   3  4   3  4  5      (after the shots)

B rows, S tokens in a row, P tokens of the beginning, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaloop.depth import LayerCall
from megaloop.model import Decoder
from megaloop.model.layers import AttentionContext, KeyValueCache, rotary_tables

__all__ = ["Question", "Scores", "score"]

_ROW_TOKENS = {"cpu": 1 << 11}
"""Tokens of a batch, about, by kind of device: enough to keep the matrix products busy. On a CPU fewer do, and more would
add padding (beside questions of other lengths) and leave its caches: 8192 takes a twelfth longer."""
_OTHER_ROW_TOKENS = 1 << 13
_HEAD_ROWS = 1 << 10
"""Positions whose logits are in memory at once."""


@dataclass(frozen=True)
class Question:
    """Token ids: of the question, and of each answer; both have at least one."""

    query: list[int]
    answers: list[list[int]]

    @property
    def length(self) -> int:
        """Tokens of the row; nothing follows an answer's last token."""
        return len(self.query) + sum(len(answer) - 1 for answer in self.answers)


@dataclass(frozen=True)
class Scores:
    """Of one question.

    Attributes:
        log_likelihoods: of each answer, in nats, all its tokens together.
        greedy: whether greedy decoding gives it, token by token.
    """

    log_likelihoods: list[float]
    greedy: list[bool]

    @property
    def best(self) -> int:
        """The likeliest answer, the first of equals."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


@torch.inference_mode()
def score(
    model: Decoder,
    beginning: list[int],
    questions: Sequence[Question],
    *,
    calls: Sequence[LayerCall] | None = None,
    vocab_size: int | None = None,
    batch_tokens: int | None = None,
) -> list[Scores]:
    """Scores of questions that all follow ``beginning``, in their order.

    Args:
        beginning: what they share; nothing, where each brings its own.
        calls: the executions of layers; default: as trained.
        vocab_size: the tokenizer's tokens; greedy decoding never chooses rows of the embedding beyond them.
        batch_tokens: at most this many tokens, padding included, go through the model together; default: what suits the device.
    """
    batch_tokens = batch_tokens or _ROW_TOKENS.get(model.device.type, _OTHER_ROW_TOKENS)
    calls = model.plan.calls() if calls is None else calls
    caches = model.new_caches(1, len(beginning), calls)
    if beginning:
        model.run(torch.tensor([beginning], device=model.device), calls, caches=caches, first=True, last=False)
    tables = _tables(model, len(beginning) + max(question.length for question in questions))
    scores: list[Scores | None] = [None] * len(questions)
    for batch in _batches(questions, batch_tokens):
        chosen = [questions[index] for index in batch]
        for index, result in zip(batch, _score_batch(model, calls, caches, chosen, tables, vocab_size), strict=True):
            scores[index] = result
    return [score for score in scores if score is not None]


def _batches(questions: Sequence[Question], tokens: int) -> Iterator[list[int]]:
    """Indices of questions of similar length."""
    order = sorted(range(len(questions)), key=lambda index: questions[index].length)
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * questions[index].length > tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _tables(model: Decoder, length: int) -> tuple[Tensor, Tensor]:
    dtype = next(model.parameters()).dtype
    cos, sin = rotary_tables(model.config, length, model.device)
    return cos.to(dtype), sin.to(dtype)


def _score_batch(
    model: Decoder,
    calls: Sequence[LayerCall],
    caches: Sequence[KeyValueCache],
    questions: Sequence[Question],
    tables: tuple[Tensor, Tensor],
    vocab_size: int | None,
) -> list[Scores]:
    batch, length = len(questions), max(question.length for question in questions)
    tokens_BS = torch.zeros(batch, length, dtype=torch.long)
    places_BS = torch.zeros(batch, length, dtype=torch.long)
    answer_BS = torch.full((batch, length), -1)  # which answer a token belongs to; 0: the question; -1: padding
    rows: list[int] = []  # where each token of an answer is predicted, and which it is
    columns: list[int] = []
    targets: list[int] = []
    for row, question in enumerate(questions):
        at = len(question.query)
        tokens_BS[row, :at] = torch.tensor(question.query)
        places_BS[row, :at] = torch.arange(at)
        answer_BS[row, :at] = 0
        for number, answer in enumerate(question.answers, start=1):
            inside = slice(at, at + len(answer) - 1)
            tokens_BS[row, inside] = torch.tensor(answer[:-1], dtype=torch.long)
            places_BS[row, inside] = len(question.query) + torch.arange(len(answer) - 1)
            answer_BS[row, inside] = number
            rows += [row] * len(answer)
            columns += [len(question.query) - 1, *range(inside.start, inside.stop)]
            targets += answer
            at = inside.stop

    before, device = caches[0].length, model.device
    causal_SS = torch.ones(length, length, dtype=torch.bool).tril()
    own_BSS = (answer_BS.unsqueeze(2) == answer_BS.unsqueeze(1)) | (answer_BS == 0).unsqueeze(1)
    mask_BST = torch.cat([torch.ones(batch, length, before, dtype=torch.bool), causal_SS & own_BSS], dim=2)
    positions_BS = (before + places_BS).to(device)
    cos_B1Sh, sin_B1Sh = (table[positions_BS].unsqueeze(1) for table in tables)
    hidden_BSD = model.run(
        tokens_BS.to(device),
        calls,
        caches=[cache.copied(batch, length) for cache in caches],
        first=True,
        last=False,
        context=AttentionContext(cos_B1Sh, sin_B1Sh, mask_BST.to(device)),
    )
    likelihoods, greedy = _predicted(model, hidden_BSD[rows, columns], targets, vocab_size)
    results, at = [], 0
    for question in questions:
        sums, hits = [], []
        for answer in question.answers:
            sums.append(sum(likelihoods[at : at + len(answer)]))
            hits.append(all(greedy[at : at + len(answer)]))
            at += len(answer)
        results.append(Scores(sums, hits))
    return results


def _predicted(
    model: Decoder, hidden_MD: Tensor, targets: list[int], vocab_size: int | None
) -> tuple[list[float], list[bool]]:
    """Log-likelihood of each target, and whether it is the likeliest token."""
    likelihoods: list[float] = []
    greedy: list[bool] = []
    for first in range(0, len(targets), _HEAD_ROWS):
        wanted_M = torch.tensor(targets[first : first + _HEAD_ROWS], device=model.device)
        logits_MV = model.logits(hidden_MD[first : first + _HEAD_ROWS].unsqueeze(0))[0].float()
        chosen_M = logits_MV.gather(1, wanted_M.unsqueeze(1)).squeeze(1)
        likelihoods += (chosen_M - logits_MV.logsumexp(1)).tolist()
        greedy += (logits_MV[:, :vocab_size].argmax(1) == wanted_M).tolist()
    return likelihoods, greedy
