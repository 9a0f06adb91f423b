"""Texts that tokenizers get wrong."""

from __future__ import annotations

import random

__all__ = ["nasty_texts"]

_PIECES = [
    "", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u200b", "\u3000", "\ufeff", "\x00", "\x1f", "\x7f", "a", "The king", " said",
    "don't", "DON'T", "we'll", "\u2019s", "1", "12345", "3.14", "1e-5", "\u0661\u0662", "\u00b2", "\u2167", "caf\u00e9", "cafe\u0301", "\ufb01n",
    "stra\u00dfe", "\u0130", "\u4f60\u597d", "\u3053\u3093", "\uc548\ub155", "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627",
    "\U0001f389", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7", "\u20ac", "def f(x):\n    return x", "{\"a\": [1, 2]}", "<html>",
    "https://a.b/c?d=e&f", "<|endoftext|>", "<|im_start|>user\n", "<|im_end|>", "<|begin_of_text|>", "</s>", "<s>", "<unk>", "<0x41>", "\u2581", "\u0120",
    "\ue000", "\U0010ffff", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "........", "-----", "____", "!!!???", "\\n", "'''", '"""', "$\\alpha$", "\u0300\u0301",
]  # fmt: skip


def nasty_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of up to eight pieces: spaces, digits, scripts, marks, controls, code, special tokens spelled out."""
    chance = random.Random(seed)
    return [*_PIECES, *("".join(chance.choices(_PIECES, k=chance.randint(1, 8))) for _ in range(count - len(_PIECES)))]
