"""The words of all tasks by difficulty, and the one tokenizer for them, so that data sets of several tasks can be mixed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from string import ascii_lowercase

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from megaloop.errors import MegaloopError
from megaloop.files import replace_file
from megaloop.tokenizer.huggingface import TOKENIZER_JSON, write_tokenizer_json

__all__ = ["END", "LETTERS", "NUMBERS", "SIGNS", "WORDS", "word_tokenizer", "write_word_tokenizer"]

END = "</s>"
"""Ends a document. The last id, and no word of the model's: a text that spells it out cannot be encoded, instead of ending there."""
NUMBERS = tuple(map(str, range(64)))
LETTERS = tuple(ascii_lowercase)
SIGNS = ("+", "=", ";", "?", ":")
"""The colon stands in no sample: with it there are 96 tokens, which 2, 3, 4, 6 or 8 ranks can split between them."""
WORDS = (*NUMBERS, *LETTERS, *SIGNS)
"""By id. The order is that of every data set made so far: a new word would make another tokenizer."""


def word_tokenizer() -> Tokenizer:
    """Words that spaces separate, 96 tokens: :data:`WORDS` by their place there, then ``</s>``.

    There is no token for unknown words: text that holds one is an error, not a sample that means nothing.
    """
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return tokenizer


def write_word_tokenizer(folder: Path) -> Path:
    """Write :func:`word_tokenizer` into a directory, or find that it is there already.

    Returns:
        The ``tokenizer.json``.

    Raises:
        MegaloopError: another tokenizer is there, or it cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory() as made:
            write_tokenizer_json(word_tokenizer(), Path(made), {"eos_token": END})
            contents = {path.name: path.read_bytes() for path in sorted(Path(made).iterdir(), reverse=True)}
        folder.mkdir(parents=True, exist_ok=True)
        present = {name for name in contents if (folder / name).exists()}
        if other := [name for name in sorted(present) if (folder / name).read_bytes() != contents[name]]:
            raise MegaloopError(
                f"synthesize: {folder / other[0]} belongs to another tokenizer than that of the tasks; "
                "name another directory with --tokenizer"
            )
        for name, content in contents.items():  # the one that names the tokenizer last
            if name not in present:
                replace_file(folder / name, content)
    except OSError as error:
        raise MegaloopError(f"synthesize: cannot write the tokenizer to {folder} ({error.strerror})") from None
    return folder / TOKENIZER_JSON
