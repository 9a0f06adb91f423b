"""A primitive asked of a model: accuracy and exact match over its examples, for any order of execution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megaloop.depth import LayerCall
from megaloop.evaluation.prompts import questions
from megaloop.evaluation.records import clustered
from megaloop.evaluation.scoring import score
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
        asked = examples(task, self.examples, self.seed)
        blocks = [asked[first : first + BLOCK] for first in range(0, len(asked), BLOCK)]
        scored = share_over_ranks(
            label, blocks, lambda number, block: self._score(task, number, block, calls), self.on_part
        )
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

    def _score(
        self, task: Task, number: int, block: Sequence[Example], calls: Sequence[LayerCall]
    ) -> list[tuple[bool, bool, list[int]]]:
        """Of each example, whether the right answer is the likeliest, whether greedy decoding gives it, and the loops of its tokens."""
        solved = shots(task, self.shots, self.seed, number)
        beginning, asked = questions(self.tokenizer, task, solved, block)
        vocab_size = self.tokenizer.vocab_size
        results = score(self.model, beginning, asked, calls=calls, vocab_size=vocab_size, thinking=self.thinking)
        return [
            (result.best == example.correct, result.greedy[example.correct], result.loops)
            for result, example in zip(results, block, strict=True)
        ]

    def check(self, tasks: Sequence[Task]) -> None:
        """Raise MegaloopError if the tokenizer has no words for the questions of these tasks."""
        for task in tasks:
            questions(self.tokenizer, task, [], examples(task, 1, self.seed))
