"""Text to token ids and back: one protocol, and two kinds."""

from megaloop.tokenizer.files import copy_tokenizer, find_tokenizer, load_tokenizer, tokenizer_files
from megaloop.tokenizer.huggingface import HuggingFaceTokenizer
from megaloop.tokenizer.protocol import Tokenizer, file_sha256
from megaloop.tokenizer.sentencepiece import SentencePieceTokenizer

__all__ = [
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "copy_tokenizer",
    "file_sha256",
    "find_tokenizer",
    "load_tokenizer",
    "tokenizer_files",
]
