"""Text to token ids and back."""

from megaloop.tokenizer.sentencepiece import Tokenizer, file_sha256

__all__ = ["Tokenizer", "file_sha256"]
