"""A primitive asked of a model: accuracy and exact match over its examples, for any order of execution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megaloop.depth import LayerCall
from megaloop.evaluation.prompts import questions
from megaloop.evaluation.records import clustered
from megaloop.evaluation.scoring import Question, Scores, score, score_in_orders
from megaloop.evaluation.tasks import BLOCK, Example, Task, examples, shots
from megaloop.evaluation.thinking import spent
from megaloop.inference.caches import loop_iterations
from megaloop.inference.thinking import Thinking
from megaloop.model import Decoder
from megaloop.runtime.share import OnPart, share_over_ranks
from megaloop.tokenizer import Tokenizer

__all__ = ["Questioning"]


@dataclass(frozen=True)
class Questioning:
    """How primitives are asked.

    Attributes:
        shots: solved examples before each question.
        examples: questions of each primitive.
        seed: of the questions.
        thinking: when tokens that are asked for leave the loop, and which caches they see.
    """

    model: Decoder
    tokenizer: Tokenizer
    shots: int
    examples: int
    seed: int
    on_part: OnPart
    thinking: Thinking = field(default_factory=Thinking)

    def ask(self, task: Task, calls: Sequence[LayerCall], label: str) -> dict[str, Any]:
        """Accuracy and exact match with their standard errors, questions that share their shots as one cluster; and chance.

        Where tokens may leave the loop early, also the iterations of those that predict: a question's last, and the answers'.

        Args:
            calls: the executions of layers.
            label: of the progress.
        """
        scored = share_over_ranks(
            label, self._blocks(task), lambda number, block: self._score(task, number, block, calls), self.on_part
        )
        return self._result(task, calls, scored)

    def ask_in_orders(self, task: Task, orders: Sequence[Sequence[LayerCall]], label: str) -> list[dict[str, Any]]:
        """The same in each order of execution, all iterations."""
        blocks, silent = self._blocks(task), lambda *_: None

        def run(number: int, block: Sequence[Example]) -> dict[int, _Answered]:
            beginning, asked = self._asked(task, number, block)
            found: dict[int, _Answered] = {}
            done, total = number * len(orders), len(blocks) * len(orders)
            self.on_part(label, done, total)  # the first order may take long
            for order, scores in score_in_orders(
                self.model, beginning, asked, orders, vocab_size=self.tokenizer.vocab_size
            ):
                found[order] = _answered(block, scores)
                self.on_part(label, done + len(found), total)
            return found

        by_block = share_over_ranks(label, blocks, run, silent)
        self.on_part(label, len(blocks) * len(orders), len(blocks) * len(orders))
        return [self._result(task, calls, [found[order] for found in by_block]) for order, calls in enumerate(orders)]

    def _blocks(self, task: Task) -> list[list[Example]]:
        """Questions that share their shots."""
        asked = examples(task, self.examples, self.seed)
        return [asked[first : first + BLOCK] for first in range(0, len(asked), BLOCK)]

    def _asked(self, task: Task, number: int, block: Sequence[Example]) -> tuple[list[int], list[Question]]:
        """What a block of questions begins with, and how each goes on."""
        return questions(self.tokenizer, task, shots(task, self.shots, self.seed, number), block)

    def _score(self, task: Task, number: int, block: Sequence[Example], calls: Sequence[LayerCall]) -> _Answered:
        beginning, asked = self._asked(task, number, block)
        vocab_size = self.tokenizer.vocab_size
        return _answered(
            block, score(self.model, beginning, asked, calls=calls, vocab_size=vocab_size, thinking=self.thinking)
        )

    def _result(self, task: Task, calls: Sequence[LayerCall], scored: Sequence[_Answered]) -> dict[str, Any]:
        """Of all blocks."""
        right = [float(best) for block in scored for best, _, _ in block]
        exact = [float(greedy) for block in scored for _, greedy, _ in block]
        clusters = [number for number, block in enumerate(scored) for _ in block]
        accuracy, match = clustered(right, clusters), clustered(exact, clusters)
        loops: dict[str, Any] = {}
        if self.thinking.halting is not None:
            loops = spent((one for block in scored for *_, each in block for one in each), loop_iterations(calls))
        return {
            "accuracy": accuracy.mean,
            "accuracy_stderr": accuracy.known_error,
            "exact_match": match.mean,
            "exact_match_stderr": match.known_error,
            "chance": task.chance,
            **loops,
        }

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise MegaloopError if the tokenizer has no words for the questions of these tasks."""
        for task in tasks:
            questions(self.tokenizer, task, [], examples(task, 1, self.seed))


_Answered = list[tuple[bool, bool, list[int]]]
"""Of each question of a block, whether the right answer is the likeliest, whether greedy decoding gives it, and the loops of its tokens."""


def _answered(block: Sequence[Example], scores: Sequence[Scores]) -> _Answered:
    return [
        (one.best == example.correct, one.greedy[example.correct], one.loops)
        for one, example in zip(scores, block, strict=True)
    ]
