"""How likely a decoder finds each answer to each question, in as few passes as that takes.

Questions that share their beginning (the shots) are scored together: the beginning runs once, and every row of a question and its
candidates (:mod:`megaloop.evaluation.rows`) looks at its keys and values. Scored in many orders of execution, rows and beginning
run once what several orders begin with.

Where tokens may leave a loop early, or iterations share their caches, a question runs up to its last token as a prompt does in
generation: all iterations, each with its own caches. Its last token and the answers' are what is generated, the row
``q2 a0 a1 b0 b1 b2``. A prompt that leaves the loop as one (scope ``sequence``) runs with its question's last token, and by itself.

B rows, S tokens in a row; C tokens before it. D model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megaloop.depth import LayerCall
from megaloop.evaluation.rows import Question, Rows, Scores, batches, scores_of
from megaloop.inference.caches import CachePolicy, Following, LoopCaches, Place, Recorded, loop_iterations
from megaloop.inference.orders import Trail, Visit, visits
from megaloop.inference.passes import Passes, Thought
from megaloop.inference.thinking import Thinking
from megaloop.model import Decoder

__all__ = ["Question", "Scores", "score", "score_in_orders"]

_ROW_TOKENS = {"cpu": 1 << 11}
"""Tokens of a batch, about, by kind of device: enough to keep the matrix products busy. On a CPU fewer do, and more would
add padding (beside questions of other lengths) and leave its caches: 8192 takes a twelfth longer."""
_OTHER_ROW_TOKENS = 1 << 13


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
    if thinking.is_plain:
        orders = [model.plan.calls() if calls is None else calls]
        ((_, found),) = score_in_orders(
            model, beginning, questions, orders, vocab_size=vocab_size, batch_tokens=batch_tokens
        )
        return found
    passes = thinking.passes(model, calls, vocab_size)
    together = thinking.halting is not None and thinking.halting.scope == "sequence"
    if together:
        questions = [Question([*beginning, *question.query], question.answers) for question in questions]
        beginning = []
    scorer = _Scorer(passes, thinking, beginning)
    scores: dict[int, Scores] = {}
    for batch in batches(questions, batch_tokens or _row_tokens(model)):
        chosen = [questions[index] for index in batch]
        found = scorer.after_their_prompts(chosen) if together else scorer.after_the_rest(chosen)
        scores.update(zip(batch, found, strict=True))
    return [scores[index] for index in range(len(questions))]


@torch.inference_mode()
def score_in_orders(
    model: Decoder,
    beginning: list[int],
    questions: Sequence[Question],
    orders: Sequence[Sequence[LayerCall]],
    *,
    vocab_size: int | None = None,
    batch_tokens: int | None = None,
) -> Iterator[tuple[int, list[Scores]]]:
    """The same in each order of execution: its number and the scores, as they come; what several orders begin with runs once.

    In memory are, of all questions at once, the states that the next order goes on from: as many as it shares executions; of one
    order, none.
    """
    passes = Passes(model)
    shared = _Beginning(passes, beginning)
    together = list(batches(questions, batch_tokens or _row_tokens(model)))
    under_way: dict[int, _Batch] = {}
    for turn, visit in enumerate(visits(orders), start=1):
        before = shared.follow(visit)
        scores: dict[int, Scores] = {}
        for number, batch in enumerate(together):
            rows = under_way.pop(number, None) or _Batch(passes, len(beginning), [questions[i] for i in batch])
            scores.update(zip(batch, rows.follow(visit, before, vocab_size), strict=True))
            if turn < len(orders):
                under_way[number] = rows
        yield visit.number, [scores[index] for index in range(len(questions))]


def _row_tokens(model: Decoder) -> int:
    return _ROW_TOKENS.get(model.device.type, _OTHER_ROW_TOKENS)


class _Beginning:
    """What all questions share, in one order after another."""

    def __init__(self, passes: Passes, tokens: list[int]):
        self._recorded: list[Recorded] = []
        self._trail = None
        if tokens:
            tokens_1C = torch.tensor([tokens], device=passes.model.device)
            self._trail = Trail(passes.model, tokens_1C, _after(passes, tokens_1C, 0).context)

    def follow(self, visit: Visit) -> Sequence[Recorded | None]:
        """Its keys and values in each execution that the visit itself runs."""
        del self._recorded[visit.shared :]
        if self._trail is None:
            return [None] * len(visit.own)
        self._recorded += [Recorded() for _ in visit.own]
        own = self._recorded[visit.shared :]
        self._trail.follow(visit, own)
        return own


class _Batch:
    """A batch of questions after a beginning, in one order after another."""

    def __init__(self, passes: Passes, start: int, questions: Sequence[Question]):
        self._model, self._questions, self._rows = passes.model, questions, Rows.of(questions)
        place = _place(passes, self._rows, [start] * len(questions))
        self._trail = Trail(self._model, self._rows.tokens_BS.to(self._model.device), place.context)

    def follow(self, visit: Visit, before: Sequence[Recorded | None], vocab_size: int | None) -> list[Scores]:
        hidden_BSD = self._trail.follow(visit, [Following(recorded) for recorded in before])
        loops_BS = torch.full_like(self._rows.tokens_BS, loop_iterations(visit.calls))
        return scores_of(self._model, self._questions, self._rows, hidden_BSD, loops_BS, vocab_size)


class _Scorer:
    """Scores batches of questions after a beginning that they share."""

    def __init__(self, passes: Passes, thinking: Thinking, beginning: list[int]):
        self._passes, self._thinking, self._device = passes, thinking, passes.model.device
        self._start = len(beginning)
        self._beginning = passes.caches(1, self._start, CachePolicy())
        if beginning:
            tokens_BC = torch.tensor([beginning], device=self._device)
            passes.context(tokens_BC, _after(passes, tokens_BC, 0), self._beginning)

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
        rows = Rows.of(asked)
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
        rows = Rows.of(asked)
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

    def _scores(self, questions: Sequence[Question], rows: Rows, thought: Thought) -> list[Scores]:
        passes = self._passes
        return scores_of(passes.model, questions, rows, thought.hidden_BSD, thought.loops_BS, passes.vocab_size)


def _after(passes: Passes, tokens_BS: Tensor, start: int) -> Place:
    """Tokens from that slot on, whose rows are filled up at their ends: what follows nobody sees."""
    length = start + tokens_BS.shape[1]
    return passes.place(torch.arange(start, length, device=tokens_BS.device).expand_as(tokens_BS), length)


def _place(passes: Passes, rows: Rows, lengths: Sequence[int], known: int = 0) -> Place:
    """Where rows stand.

    Args:
        lengths: tokens before each row that it sees.
        known: columns at the beginning of the rows that are among these already.
    """
    device, most = passes.model.device, max(lengths)
    batch, count = rows.tokens_BS[:, known:].shape
    lengths_B1 = torch.tensor(lengths).unsqueeze(1)
    before_BSC = (torch.arange(most) < lengths_B1).unsqueeze(1).expand(-1, count, -1)
    return passes.place(
        torch.arange(most, most + count, device=device).expand(batch, -1),
        most + count,
        positions_BS=(lengths_B1 - known + rows.offset_BS[:, known:]).to(device),
        mask_BST=torch.cat([before_BSC, rows.sees_BSS[:, known:, known:]], dim=2).to(device),
    )


def _think(
    passes: Passes, thinking: Thinking, rows: Rows, before: LoopCaches, lengths: Sequence[int], known: int = 0
) -> Thought:
    """Rows after what caches hold, with all iterations; arguments as of :func:`_place`."""
    tokens_BS = rows.tokens_BS[:, known:].to(passes.model.device)
    batch, count = tokens_BS.shape
    caches = passes.caches(batch, max(lengths) + count)
    caches.take(before, range(batch), max(lengths))
    limits_BS = None
    if thinking.halting is not None and thinking.halting.decay is not None:
        limits = [thinking.thresholds(places[known:]) for places in rows.places]
        limits_BS = torch.tensor(limits, device=tokens_BS.device)
    return passes.think(tokens_BS, _place(passes, rows, lengths, known), caches, thresholds_BS=limits_BS)
