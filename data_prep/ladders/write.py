"""Files of tasks by difficulty: lines of jsonl with ``tokens``, ``targets`` and ``difficulty``, and the tokenizer beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.ladders.tasks import NONE, TASKS, Doubles, Draws, Ladder, Samples
from data_prep.ladders.words import WORDS, write_word_tokenizer
from data_prep.synthetic import writing
from megaloop.errors import MegaloopError
from megaloop.text import parse_whole, printable, quoted
from megaloop.tokenizer.files import FOLDER
from megaloop.tokenizer.huggingface import TOKENIZER_JSON

__all__ = ["Block", "WrittenLadder", "blocks", "ladder_of", "parse_difficulties", "write_ladder"]

_LINES = 1024
"""Of a block, about: the difficulties take turns in it as often as they fit."""
_OPTIONS = {"alphabet": "--alphabet", "length": "--length", "doubles": "--doubles", "digits": "--digits"}
"""Options of tasks: their fields, and what the command line calls them."""


@dataclass(frozen=True)
class Block:
    """Lines of a data set: line n is sample ``places[n]`` of difficulty ``difficulties[n]``.

    Attributes:
        samples: by difficulty.
        difficulties: of each line, [N].
        places: of each line among the samples of its difficulty, [N].
    """

    samples: dict[int, Samples]
    difficulties: NDArray[np.int64]
    places: NDArray[np.int64]


@dataclass(frozen=True)
class WrittenLadder:
    """What was written.

    Attributes:
        documents: lines, one sample each.
        targets: places that have one.
        redrawn: samples that were drawn and left out because they ask nothing at their end.
        longest: tokens of the longest sample.
        bytes: of the file.
        tokenizer: the ``tokenizer.json``.
    """

    documents: int
    targets: int
    redrawn: int
    longest: int
    bytes: int
    tokenizer: str


def parse_difficulties(text: str) -> list[int]:
    """``1-8`` or ``1,2,4,12`` or both: ``1-4,8``.

    Raises:
        MegaloopError: that is none.
    """
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        ends = parse_whole(first), parse_whole(last if "-" in part else first)
        if ends[0] is None or ends[1] is None or ends[0] > ends[1] or ends[1] >= 1000:
            raise MegaloopError(
                f"synthesize: --difficulty {quoted(text)}: {quoted(part.strip())} is no difficulty; "
                "give numbers and ranges, such as 1-8 or 1,2,4,12"
            )
        found += range(ends[0], ends[1] + 1)
    return found


def ladder_of(task: str, difficulties: Sequence[int], options: dict[str, Any]) -> Ladder:
    """The task of a name with its options (those that are None are left as they are), for these difficulties.

    Raises:
        MegaloopError: an unknown task, an option of another, or difficulties that it does not have.
    """
    if task not in TASKS:
        raise MegaloopError(f"synthesize: unknown task {printable(task)}; choose from {', '.join(TASKS)}")
    given = {name: value for name, value in options.items() if value is not None}
    fields = TASKS[task].__dataclass_fields__
    if foreign := [name for name in given if name not in fields]:
        owner = next(name for name, kind in TASKS.items() if foreign[0] in kind.__dataclass_fields__)
        raise MegaloopError(
            f"synthesize: {_OPTIONS[foreign[0]]} belongs to --task {owner}, and this is {task}; leave it out"
        )
    made: Ladder = TASKS[task](**given)
    if not difficulties:
        raise MegaloopError(f"synthesize: no difficulty; give {made.lowest} to {made.highest} with --difficulty")
    for difficulty in sorted(difficulties, reverse=True):  # what the hardest one needs is enough for all
        if not made.lowest <= difficulty <= made.highest:
            raise MegaloopError(
                f"synthesize: {task} has no difficulty {difficulty}; use {made.lowest} to {made.highest}"
            )
        made.check(difficulty)
    if len(set(difficulties)) < len(difficulties):
        raise MegaloopError("synthesize: a difficulty stands twice in --difficulty; each has the same number of lines")
    return made


def blocks(ladder: Ladder, difficulties: Sequence[int], count: int, seed: int) -> Iterator[Block]:
    """The first ``count`` lines of a seed, those of a block at a time.

    Each run of ``len(difficulties)`` lines has every difficulty once, in an order of its own. What a line holds depends on the task with its
    options, the difficulties (in whatever order), the seed and the line's number.
    """
    ordered = sorted(difficulties)
    turns = max(1, _LINES // len(ordered))
    for number in range(-(-count // (turns * len(ordered)))):
        key = f"{ladder.key}; {','.join(map(str, ordered))}; seed {seed}; block {number}"
        samples = {
            difficulty: ladder.draw(Draws(f"{key}; difficulty {difficulty}"), difficulty, turns)
            for difficulty in ordered
        }
        orders = Draws(f"{key}; orders").orders((turns,), len(ordered))
        left = count - number * orders.size
        places = np.repeat(np.arange(turns), len(ordered))
        yield Block(samples, np.array(ordered)[orders].reshape(-1)[:left], places[:left])


def write_ladder(
    out: Path,
    task: str,
    *,
    difficulties: Sequence[int],
    count: int,
    seed: int = 0,
    alphabet: int | None = None,
    length: int | None = None,
    doubles: Doubles | None = None,
    digits: int | None = None,
    tokenizer: Path | None = None,
    on_document: Callable[[int], None] | None = None,
) -> WrittenLadder:
    """Write samples of a task as lines of JSON, atomically, and the tokenizer that they are words of.

    A line has ``tokens`` (words), ``targets`` (for each token, the word to be predicted having read up to it, or null) and ``difficulty``.

    Args:
        count: lines, one sample each.
        alphabet, length, doubles: of p-hop; digits: of addition. None: as the task has it.
        tokenizer: directory (or the ``tokenizer.json`` in it) for the tokenizer; default: ``tokenizer`` beside ``out``.
        on_document: called with the lines written so far.

    Raises:
        MegaloopError: a task, option or difficulty that there is not, another tokenizer in the way, or a file that cannot be written.
    """
    options = {"alphabet": alphabet, "length": length, "doubles": doubles, "digits": digits}
    ladder = ladder_of(task, difficulties, options)
    folder = out.parent / FOLDER if tokenizer is None else tokenizer
    folder = folder.parent if folder.name == TOKENIZER_JSON else folder
    if out.resolve() == (folder / TOKENIZER_JSON).resolve():
        raise MegaloopError(f"synthesize: --out {out} is where the tokenizer goes; name another file")
    done = targets = redrawn = longest = 0
    with writing(out) as file:
        words = write_word_tokenizer(folder)
        for block in blocks(ladder, difficulties, count, seed):
            text = {difficulty: _as_words(samples) for difficulty, samples in block.samples.items()}
            for difficulty, place in zip(block.difficulties.tolist(), block.places.tolist(), strict=True):
                tokens, answers = (part[place] for part in text[difficulty])
                line = {"tokens": tokens, "targets": answers, "difficulty": difficulty}
                file.write(json.dumps(line).encode() + b"\n")
            for difficulty, samples in block.samples.items():
                mine = block.places[block.difficulties == difficulty]
                targets += int((samples.targets[mine] != NONE).sum())
                redrawn += int(samples.redrawn[mine].sum())
                longest = max(longest, samples.tokens.shape[1] if len(mine) else 0)
            done += len(block.places)
            if on_document is not None:
                on_document(done)
        size = file.tell()
    return WrittenLadder(count, targets, redrawn, longest, size, str(words))


_SPELLED = np.array([*WORDS, None], dtype=object)
"""Words by id; :data:`NONE`, the last, is null."""


def _as_words(samples: Samples) -> tuple[list[list[str]], list[list[str | None]]]:
    """(tokens, targets) of each sample."""
    return _SPELLED[samples.tokens].tolist(), _SPELLED[samples.targets].tolist()
