"""Questions as tokens, in the way of EleutherAI's lm-eval, so that both measure the same.

The whole text of a prompt (header, shots, query) is one text to the tokenizer, and nothing stands before it but what the
tokenizer itself puts there. A candidate is what follows the prompt's tokens when both are encoded as one text.
"""

from __future__ import annotations

from collections.abc import Sequence

from megaloop.errors import MegaloopError
from megaloop.evaluation.scoring import Question
from megaloop.evaluation.tasks import Example, Task
from megaloop.text import printable
from megaloop.tokenizer import Tokenizer

__all__ = ["encode_pairs", "encode_text", "questions"]


def encode_text(tokenizer: Tokenizer, text: str, *, prefix: bool = True) -> list[int]:
    """Token ids of a text that a model is asked about, as transformers' ``tokenizer(text)`` gives them.

    Args:
        prefix: with what the tokenizer puts before every text.
    """
    ids = tokenizer.encode_prompt(text)
    return ids if prefix else ids[len(tokenizer.prefix_ids) :]


def encode_pairs(tokenizer: Tokenizer, context: str, continuations: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Token ids of a context, and of each text that may follow it: lm-eval's ``TemplateLM._encode_pair``.

    White space at the end of the context belongs to the continuation, because many tokens begin with a space. The
    continuation's tokens are those of both texts together after as many as the context alone has.
    """
    kept = context.rstrip()
    space = context[len(kept) :]
    seen = encode_text(tokenizer, kept)
    return seen, [encode_text(tokenizer, kept + space + text)[len(seen) :] for text in continuations]


def questions(
    tokenizer: Tokenizer, task: Task, solved: Sequence[Example], asked: Sequence[Example]
) -> tuple[list[int], list[Question]]:
    """Examples that share their shots as token ids: the longest beginning that all have in common, and the rest of each.

    Args:
        solved: the shots.

    Raises:
        MegaloopError: the tokenizer makes nothing of a candidate.
    """
    contexts: list[list[int]] = []
    answers: list[list[list[int]]] = []
    for example in asked:
        texts = [task.delimiter + candidate for candidate in example.candidates]
        context, continuations = encode_pairs(tokenizer, task.prompt(solved, example), texts)
        if [] in continuations:
            raise MegaloopError(
                f"tokenizer {tokenizer.path} has no token of its own for "
                f"{printable(texts[continuations.index([])])!r} after a question of {task.name}; leave that task out with --tasks"
            )
        contexts.append(context)
        answers.append(continuations)
    shared = _shared(contexts)
    return contexts[0][:shared], [
        Question(context[shared:], own) for context, own in zip(contexts, answers, strict=True)
    ]


def _shared(contexts: Sequence[list[int]]) -> int:
    """Tokens that all begin with; each keeps one of its own, which predicts the first of its answers."""
    least, most = min(contexts), max(contexts)  # in the order of lists, whatever lies between begins as these two do
    limit = min(len(context) for context in contexts) - 1
    differing = (place for place, (one, other) in enumerate(zip(least, most, strict=False)) if one != other)
    return min(next(differing, limit), limit)
