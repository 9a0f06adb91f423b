"""The tokenizer inside a GGUF file, as the files that transformers opens.

A GGUF holds a byte-level BPE's tokens and merges, and names how text is split before them (``tokenizer.ggml.pre``); llama.cpp has
those rules in its code (``src/llama-vocab.cpp``), and the ones for models of Llama's architecture are here. transformers' own
conversion (4.57) splits all of them as GPT-2 does, takes the beginning of a text for its end, and always adds the beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from megaloop.errors import MegaloopError
from megaloop.text import printable
from megaloop.tokenizer.huggingface import write_tokenizer_json
from megaloop.tokenizer.protocol import MOST_TOKENS

__all__ = ["write_gguf_tokenizer"]

_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTROL, _USER_DEFINED = 3, 4
"""Values of ``tokenizer.ggml.token_type``: special tokens, and added ones that are text."""


def write_gguf_tokenizer(source: Path, metadata: Mapping[str, Any], folder: Path) -> Path | None:
    """Write ``tokenizer.json``, its settings and the chat template into ``folder``.

    Args:
        source: the GGUF, for errors.
        metadata: its key-values.

    Returns:
        The ``tokenizer.json``; None where the GGUF has no tokenizer.

    Raises:
        MegaloopError: a kind of tokenizer that is not known, or one whose parts do not belong together.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None:
        return None
    if model != "gpt2":
        raise _refused(source, f"tokenizer.ggml.model {printable(model)!r}; expected gpt2 (a byte-level BPE)")
    pre = metadata.get("tokenizer.ggml.pre")
    split = _splitting(pre) if isinstance(pre, str) else None
    if split is None:
        raise _refused(source, f"tokenizer.ggml.pre {printable(pre)!r}; expected {', '.join(_KNOWN)}")
    tokens, merges = _texts(source, metadata, "tokens"), _texts(source, metadata, "merges")
    if not 0 < len(tokens) <= MOST_TOKENS or len(set(tokens)) != len(tokens):
        raise _refused(source, f"{len(tokens)} tokens; expected them to be unique, and at most {MOST_TOKENS}")
    kinds = metadata.get("tokenizer.ggml.token_type", [])
    if not isinstance(kinds, list) or len(kinds) not in (0, len(tokens)):
        raise _refused(source, f"tokenizer.ggml.token_type is no list of {len(tokens)} kinds")
    try:
        tokenizer = Tokenizer(
            models.BPE(
                vocab={token: number for number, token in enumerate(tokens)},
                merges=[_pair(merge) for merge in merges],
                ignore_merges=pre in _LLAMA_3_NAMES,
            )
        )
    except Exception as error:  # the library's errors have no class of their own
        raise _refused(source, f"merges that do not fit its tokens ({printable(str(error), 120)})") from None
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    for token, kind in zip(tokens, kinds or [0] * len(tokens), strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == _CONTROL)
            (tokenizer.add_special_tokens if kind == _CONTROL else tokenizer.add_tokens)([added])
    names = {name: named for name in ("bos", "eos") if (named := _named(source, metadata, tokens, name))}
    # llama.cpp's default where the file does not say
    if metadata.get("tokenizer.ggml.add_bos_token", pre in _LLAMA_3_NAMES) is True and "bos" in names:
        bos = names["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return write_tokenizer_json(tokenizer, folder, {f"{name}_token": token for name, token in names.items()})


def _splitting(pre: str) -> pre_tokenizers.PreTokenizer | None:
    """How text is split into the parts that merges stay inside of."""
    if pre == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if pre == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre in _LLAMA_3_NAMES:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_LLAMA_3), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return None


_LLAMA_3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_KNOWN = ("smollm", "gpt-2", *_LLAMA_3_NAMES)


def _texts(source: Path, metadata: Mapping[str, Any], name: str) -> list[str]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _refused(source, f"no list of texts as tokenizer.ggml.{name}")
    return values


def _pair(merge: str) -> tuple[str, str]:
    first, second = merge.split(" ")  # a byte-level vocabulary writes a space as another character
    return first, second


def _named(source: Path, metadata: Mapping[str, Any], tokens: list[str], name: str) -> str | None:
    """The token that begins or ends a text."""
    number = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if number is None:
        return None
    if type(number) is not int or not 0 <= number < len(tokens):
        raise _refused(source, f"tokenizer.ggml.{name}_token_id {printable(number)}, and {len(tokens)} tokens")
    return tokens[number]


def _refused(source: Path, found: str) -> MegaloopError:
    return MegaloopError(
        f"{source}: its tokenizer cannot be read: {found}; name the model's tokenizer with --tokenizer PATH, "
        "or leave it out with --without-tokenizer"
    )
