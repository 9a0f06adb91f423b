"""How likely a decoder finds each answer to each question, in as few passes as that takes.

Questions that share their beginning (the shots) are scored together. The beginning runs once, and its keys and values are
copied to every question. A question and all of its candidate answers then are one row: the candidates stand one after another,
each looks at the question and at itself alone, and has the positions that it would have right after the question.

    row        q0 q1 q2  a0 a1  b0 b1 b2
    position    0  1  2   3  4   3  4  5      (after the shots)

Where tokens may leave a loop early, or iterations share their caches, a question runs up to its last token as a prompt does in
generation: all iterations, each with its own caches. Its last token and the answers' are what is generated, the row
``q2 a0 a1 b0 b1 b2``. A prompt that leaves the loop as one (scope ``sequence``) runs with its question's last token, and by itself.

B rows, S tokens in a row, T slots of the caches: C before the row, then its own. M tokens that are predicted, D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megaloop.depth import LayerCall
from megaloop.inference.caches import CachePolicy, LoopCaches, Place
from megaloop.inference.passes import Passes, Thought
from megaloop.inference.thinking import Thinking
from megaloop.model import Decoder

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
        loops: iterations of the question's last token, and of each answer's tokens but the last.
    """

    log_likelihoods: list[float]
    greedy: list[bool]
    loops: list[int]

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
    thinking: Thinking = Thinking(),
) -> list[Scores]:
    """Scores of questions that all follow ``beginning``, in their order.

    Args:
        beginning: what they share; nothing, where each brings its own.
        calls: the executions of layers; default: as trained.
        vocab_size: the tokenizer's tokens; greedy decoding never chooses rows of the embedding beyond them.
        batch_tokens: at most this many tokens, padding included, go through the model together; default: what suits the device.
        thinking: when tokens leave the loop, and which caches they see.

    Raises:
        MegaloopError: a ``thinking`` that the model cannot do.
    """
    batch_tokens = batch_tokens or _ROW_TOKENS.get(model.device.type, _OTHER_ROW_TOKENS)
    passes = thinking.passes(model, calls, vocab_size)
    together = thinking.halting is not None and thinking.halting.scope == "sequence"
    if together:
        questions = [Question([*beginning, *question.query], question.answers) for question in questions]
        beginning = []
    scorer = _Scorer(passes, thinking, beginning)
    scores: list[Scores | None] = [None] * len(questions)
    for batch in _batches(questions, batch_tokens):
        chosen = [questions[index] for index in batch]
        if together:
            found = scorer.after_their_prompts(chosen)
        else:
            found = scorer.at_once(chosen) if thinking.is_plain else scorer.after_the_rest(chosen)
        for index, result in zip(batch, found, strict=True):
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


@dataclass(frozen=True)
class _Rows:
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
    def of(cls, questions: Sequence[Question]) -> _Rows:
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


class _Scorer:
    """Scores batches of questions after a beginning that they share."""

    def __init__(self, passes: Passes, thinking: Thinking, beginning: list[int]):
        self._passes, self._thinking, self._device = passes, thinking, passes.model.device
        self._start = len(beginning)
        self._beginning = passes.caches(1, self._start, CachePolicy())
        if beginning:
            tokens_BC = torch.tensor([beginning], device=self._device)
            passes.context(tokens_BC, _after(passes, tokens_BC, 0), self._beginning)

    def at_once(self, questions: Sequence[Question]) -> list[Scores]:
        """All of each row in one pass."""
        rows = _Rows.of(questions)
        thought = _think(self._passes, self._thinking, rows, self._beginning, [self._start] * len(questions))
        return self._scores(questions, rows, thought)

    def after_the_rest(self, questions: Sequence[Question]) -> list[Scores]:
        """Each question but its last token as a prompt, then its last token and the answers'."""
        contexts = [question.query[:-1] for question in questions]
        lengths = [self._start + len(context) for context in contexts]
        full = self._passes.caches(len(questions), max(lengths), CachePolicy())
        full.take(self._beginning, range(len(questions)), self._start)
        if any(contexts):
            tokens_BC = self._padded(contexts)
            self._passes.context(tokens_BC, _after(self._passes, tokens_BC, self._start), full)
        asked = [Question(question.query[-1:], question.answers) for question in questions]
        rows = _Rows.of(asked)
        return self._scores(asked, rows, _think(self._passes, self._thinking, rows, full, lengths))

    def after_their_prompts(self, questions: Sequence[Question]) -> list[Scores]:
        """Each question as a prompt that leaves the loop as one, then the answers' tokens, each by itself."""
        passes, halting = self._passes, self._thinking.halting
        assert halting is not None
        lengths = [len(question.query) for question in questions]
        at = list(range(len(questions))), [length - 1 for length in lengths]
        full = passes.caches(len(questions), max(lengths), CachePolicy())
        tokens_BC = self._padded([question.query for question in questions])
        asked_BC = torch.zeros_like(tokens_BC, dtype=torch.bool)
        asked_BC[at] = True
        first_11 = None if halting.decay is None else torch.tensor([[halting.threshold_at(0, 1)]], device=self._device)
        prompts = passes.think(tokens_BC, _after(passes, tokens_BC, 0), full, asked_BC, first_11)
        thought = Thought(prompts.hidden_BSD[at].unsqueeze(1), prompts.loops_BS[at].unsqueeze(1))
        asked = [Question(question.query[-1:], question.answers) for question in questions]
        rows = _Rows.of(asked)
        if rows.tokens_BS.shape[1] > 1:
            alone = replace(self._thinking, halting=replace(halting, scope="token"))
            more = _think(
                alone.passes(passes.model, passes.calls, passes.vocab_size), alone, rows, full, lengths, known=1
            )
            thought = Thought(
                torch.cat([thought.hidden_BSD, more.hidden_BSD], 1), torch.cat([thought.loops_BS, more.loops_BS], 1)
            )
        return self._scores(asked, rows, thought)

    def _padded(self, sequences: Sequence[list[int]]) -> Tensor:
        longest = max(map(len, sequences))
        return torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences], device=self._device)

    def _scores(self, questions: Sequence[Question], rows: _Rows, thought: Thought) -> list[Scores]:
        hidden_MD = thought.hidden_BSD[rows.asked]
        likelihoods, greedy = _predicted(self._passes.model, hidden_MD, rows.targets, self._passes.vocab_size)
        loops, results, at = thought.loops_BS.tolist(), [], 0
        for question, own in zip(questions, loops, strict=True):
            sums, hits = [], []
            for answer in question.answers:
                sums.append(sum(likelihoods[at : at + len(answer)]))
                hits.append(all(greedy[at : at + len(answer)]))
                at += len(answer)
            results.append(Scores(sums, hits, own[len(question.query) - 1 : question.length]))
        return results


def _after(passes: Passes, tokens_BS: Tensor, start: int) -> Place:
    """Tokens from that slot on, whose rows are filled up at their ends: what follows nobody sees."""
    length = start + tokens_BS.shape[1]
    return passes.place(torch.arange(start, length, device=tokens_BS.device).expand_as(tokens_BS), length)


def _think(
    passes: Passes, thinking: Thinking, rows: _Rows, before: LoopCaches, lengths: Sequence[int], *, known: int = 0
) -> Thought:
    """Rows after what caches hold.

    Args:
        before: with all iterations; of one row, where that is before all.
        lengths: tokens before each row that it sees.
        known: columns at the beginning of the rows that are among these already.
    """
    device, most = passes.model.device, max(lengths)
    tokens_BS = rows.tokens_BS[:, known:].to(device)
    batch, count = tokens_BS.shape
    caches = passes.caches(batch, most + count)
    caches.take(before, range(batch), most)
    lengths_B1 = torch.tensor(lengths).unsqueeze(1)
    before_BSC = (torch.arange(most) < lengths_B1).unsqueeze(1).expand(-1, count, -1)
    place = passes.place(
        torch.arange(most, most + count, device=device).expand(batch, -1),
        most + count,
        positions_BS=(lengths_B1 - known + rows.offset_BS[:, known:]).to(device),
        mask_BST=torch.cat([before_BSC, rows.sees_BSS[:, known:, known:]], dim=2).to(device),
    )
    limits_BS = None
    if thinking.halting is not None and thinking.halting.decay is not None:
        limits = [thinking.thresholds(places[known:]) for places in rows.places]
        limits_BS = torch.tensor(limits, device=device)
    return passes.think(tokens_BS, place, caches, thresholds_BS=limits_BS)


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
