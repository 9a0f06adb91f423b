"""Tasks by difficulty: p-hop induction, n-ary addition and chains of variables, with a target for each place that asks.

:mod:`.tasks` draws samples, :mod:`.words` is the vocabulary that all of them share, :mod:`.write` makes files of them.
"""

from data_prep.ladders.tasks import NONE, TASKS, Addition, Chains, Draws, Ladder, PHop, Samples
from data_prep.ladders.words import WORDS, word_tokenizer, write_word_tokenizer
from data_prep.ladders.write import Block, WrittenLadder, blocks, ladder_of, parse_difficulties, write_ladder

__all__ = [
    "NONE",
    "TASKS",
    "WORDS",
    "Addition",
    "Block",
    "Chains",
    "Draws",
    "Ladder",
    "PHop",
    "Samples",
    "WrittenLadder",
    "blocks",
    "ladder_of",
    "parse_difficulties",
    "word_tokenizer",
    "write_ladder",
    "write_word_tokenizer",
]
