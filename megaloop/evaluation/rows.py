"""Questions and their candidate answers as rows of tokens.

    row        q0 q1 q2  a0 a1  b0 b1 b2
    position    0  1  2   3  4   3  4  5      (after what all questions begin with)

The candidates of a question stand one after another, each looks at the question and at itself alone, and has the positions that it
would have right after the question.

B rows, S tokens in a row; M tokens that are predicted, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megaloop.model import Decoder

__all__ = ["Question", "Rows", "Scores", "batches", "scores_of"]

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
        loops: iterations of the question's last token, and of each answer's tokens but the last.
    """

    log_likelihoods: list[float]
    greedy: list[bool]
    loops: list[int]

    @property
    def best(self) -> int:
        """The likeliest answer, the first of equals."""
        return max(range(len(self.log_likelihoods)), key=self.log_likelihoods.__getitem__)


def batches(questions: Sequence[Question], tokens: int) -> Iterator[list[int]]:
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


@dataclass(frozen=True)
class Rows:
    """Questions as rows.

    Attributes:
        offset_BS: of each token's position from that of its question's first.
        sees_BSS: which tokens of its row each sees.
        asked: row and column where each token of an answer is predicted.
        targets: which it is.
        places: of each token of each row in the answer that it predicts, and how many tokens that has.
    """

    tokens_BS: Tensor
    offset_BS: Tensor
    sees_BSS: Tensor
    asked: tuple[list[int], list[int]]
    targets: list[int]
    places: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, questions: Sequence[Question]) -> Rows:
        batch, length = len(questions), max(question.length for question in questions)
        tokens_BS = torch.zeros(batch, length, dtype=torch.long)
        offset_BS = torch.zeros(batch, length, dtype=torch.long)
        answer_BS = torch.full((batch, length), -1)  # which answer a token belongs to; 0: the question; -1: padding
        all_places = [[(0, 1)] * length for _ in questions]
        rows: list[int] = []
        columns: list[int] = []
        targets: list[int] = []
        for row, question in enumerate(questions):
            at = len(question.query)
            tokens_BS[row, :at] = torch.tensor(question.query)
            offset_BS[row, :at] = torch.arange(at)
            answer_BS[row, :at] = 0
            for number, answer in enumerate(question.answers, start=1):
                inside = slice(at, at + len(answer) - 1)
                tokens_BS[row, inside] = torch.tensor(answer[:-1], dtype=torch.long)
                offset_BS[row, inside] = len(question.query) + torch.arange(len(answer) - 1)
                answer_BS[row, inside] = number
                all_places[row][inside] = [(place, len(answer)) for place in range(1, len(answer))]
                rows += [row] * len(answer)
                columns += [len(question.query) - 1, *range(inside.start, inside.stop)]
                targets += answer
                at = inside.stop
        own_BSS = (answer_BS.unsqueeze(2) == answer_BS.unsqueeze(1)) | (answer_BS == 0).unsqueeze(1)
        sees_BSS = torch.ones(length, length, dtype=torch.bool).tril() & own_BSS
        return cls(tokens_BS, offset_BS, sees_BSS, (rows, columns), targets, all_places)


def scores_of(
    model: Decoder,
    questions: Sequence[Question],
    rows: Rows,
    hidden_BSD: Tensor,
    loops_BS: Tensor,
    vocab_size: int | None,
) -> list[Scores]:
    """What the residual stream of rows says of their questions.

    Args:
        loops_BS: iterations that each token ran.
        vocab_size: the tokenizer's tokens, beyond which greedy decoding never chooses; None: all.
    """
    likelihoods, greedy = _predicted(model, hidden_BSD[rows.asked], rows.targets, vocab_size)
    loops, results, at = loops_BS.tolist(), [], 0
    for question, own in zip(questions, loops, strict=True):
        sums, hits = [], []
        for answer in question.answers:
            sums.append(sum(likelihoods[at : at + len(answer)]))
            hits.append(all(greedy[at : at + len(answer)]))
            at += len(answer)
        results.append(Scores(sums, hits, own[len(question.query) - 1 : question.length]))
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
