"""Documents from files: txt, jsonl (plain, gzip, zstd) and parquet, streamed."""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import IO, Any, Literal

from megaloop.data.jsonl import BEGINNING, MARK, NotText, field_text, foreign_encoding, read_object
from megaloop.errors import MegaloopError
from megaloop.text import printable

__all__ = ["HASH_RANGE", "Inputs", "document_hash", "find_inputs"]

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DOCUMENT_BYTES = 1 << 16
"""A text file larger than this is cut at blank lines into documents of about this size.

Small enough that part of a single file of a megabyte can be held out, longer than most training samples.
"""
_LONGEST_DOCUMENT = 4 * DOCUMENT_BYTES
"""Where a text file has no blank line for this long, it is cut at a line's end or else at a space."""
_LONGEST_LINE = 1 << 28
HASH_RANGE = 1 << 64
"""Hashes of documents are smaller."""


@dataclass
class Inputs:
    """Input files, and what was found in them so far.

    Attributes:
        files: in the order in which they are read.
        text_field: the field of jsonl and parquet that holds the text.
        template: of jsonl, instead of one field: text with the names of fields in braces.
        errors: ``stop`` at what cannot be read as text, or ``skip`` and count it.
        check_line: documents are whole lines of jsonl, which this raises NotText for where it takes one not; None: text.
        documents, skipped: per file, of the last pass.
        first_skipped: what was skipped first, where and why.
    """

    files: list[Path]
    text_field: str = "text"
    errors: Literal["stop", "skip"] = "stop"
    template: str | None = None
    check_line: Callable[[str], None] | None = None
    documents: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    first_skipped: str | None = None

    def __post_init__(self) -> None:
        self._names: list[str] = []
        if self.template is None:
            return
        try:
            parts = [part for part in Formatter().parse(self.template) if part[1] is not None]
        except ValueError as error:
            raise MegaloopError(f"--template: {error}; braces hold names of fields, {{{{ and }}}} are braces") from None
        self._names = [str(name) for _, name, _, _ in parts]
        plain = all(str(name).isidentifier() and not form and not conversion for _, name, form, conversion in parts)
        if not self._names or not plain:
            raise MegaloopError(
                f"--template '{printable(self.template)}': expected names of fields in braces, such as 'Q: {{question}} A: {{answer}}'"
            )
        parquet = next((file for file in self.files if file.name.endswith(".parquet")), None)
        if parquet is not None:
            raise MegaloopError(f"input {parquet}: --template is for jsonl; name a column of parquet with --text-field")

    @property
    def bytes(self) -> int:
        """Size of all files on disk."""
        return sum(file.stat().st_size for file in self.files)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """(file number, document) for all documents that are not empty, in order."""
        self.documents = [0] * len(self.files)
        self.skipped = [0] * len(self.files)
        for number, path in enumerate(self.files):
            try:
                for text in self._read(number, path):
                    if text and not text.isspace():
                        self.documents[number] += 1
                        yield number, text
            except OSError as error:
                raise MegaloopError(f"input {path}: cannot be read ({error.strerror or error})") from None

    def _read(self, number: int, path: Path) -> Iterator[str]:
        if path.name.endswith(".parquet"):
            yield from self._parquet(number, path)
            return
        with _opened(path) as file:
            encoding = foreign_encoding(file.read(BEGINNING))
        if encoding is not None:
            self._leave_out(number, f"input {path}: {encoding}", "pass --errors skip to leave such files out")
        elif path.name.endswith(".txt"):
            yield from self._text(number, path)
        else:
            yield from self._jsonl(number, path)

    def _skip(self, number: int, path: Path, line: int, what: str) -> None:
        self._leave_out(
            number, f"input {path}, line {line}: {what}", "fix it, or pass --errors skip to leave such lines out"
        )

    def _leave_out(self, number: int, what: str, advice: str) -> None:
        if self.errors == "stop":
            raise MegaloopError(f"{what}; {advice}")
        self.first_skipped = self.first_skipped or what
        self.skipped[number] += 1

    def _text(self, number: int, path: Path) -> Iterator[str]:
        whole = path.stat().st_size <= DOCUMENT_BYTES
        parts: list[str] = []
        size = 0
        for part, (line, raw) in enumerate(_parts_of_lines(path)):
            if part == 0:
                raw = raw.removeprefix(MARK)
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:
                self._skip(number, path, line, f"byte 0x{raw[error.start]:02x} is not UTF-8")
                continue
            if not whole and not text.strip() and size >= DOCUMENT_BYTES:
                yield "".join(parts)
                parts, size = [], 0
                continue
            parts.append(text)
            size += len(raw)
            if size >= _LONGEST_DOCUMENT:  # no blank line in sight: memory stays bounded
                yield "".join(parts)
                parts, size = [], 0
        yield "".join(parts)

    def _jsonl(self, number: int, path: Path) -> Iterator[str]:
        for line, raw in enumerate(_lines(path), start=1):
            if line == 1:
                raw = raw.removeprefix(MARK)
            if not raw.strip():
                continue
            try:
                fields = read_object(raw)
                if self.check_line is None:
                    document = self.text_of(fields)
                else:
                    document = raw.decode().strip()
                    self.check_line(document)
            except NotText as error:
                self._skip(number, path, line, str(error))
                continue
            yield document

    def text_of(self, fields: dict[str, Any]) -> str:
        """The text of a line of jsonl.

        Raises:
            NotText: it has none.
        """
        option = "--template" if self._names else "--text-field"
        texts = {name: field_text(fields, name, option) for name in self._names or [self.text_field]}
        return texts[self.text_field] if self.template is None else self.template.format_map(texts)

    def _parquet(self, number: int, path: Path) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if self.text_field not in file.schema_arrow.names:
                    raise MegaloopError(
                        f"input {path}: no column '{printable(self.text_field)}'; "
                        f"it has {printable(', '.join(file.schema_arrow.names))}: "
                        "name one with --text-field"
                    )
                line = 0
                for batch in file.iter_batches(batch_size=256, columns=[self.text_field]):
                    for value in batch.column(0):
                        line += 1
                        try:
                            text = value.as_py()
                        except UnicodeDecodeError:
                            self._skip(number, path, line, "not UTF-8")
                            continue
                        if isinstance(text, str):
                            yield text
                        else:
                            self._skip(number, path, line, f"no text in column '{printable(self.text_field)}'")
        except pyarrow.ArrowException as error:
            raise MegaloopError(f"input {path}: damaged, or no parquet file ({_first_line(error)})") from None


def find_inputs(paths: Sequence[Path]) -> list[Path]:
    """The input files that paths name: files as they are, directories searched through, in sorted order.

    Raises:
        MegaloopError: nothing there, an empty file, or a file of an unknown kind.
    """
    files: list[Path] = []
    for path in paths:
        try:
            files += _files_of(path)
        except OSError as error:
            raise MegaloopError(f"input {printable(path)}: cannot be read ({error.strerror})") from None
    if not any(file.stat().st_size for file in files):
        raise MegaloopError(f"input {', '.join(map(str, paths)) or '(none)'}: empty; give files with text")
    return files


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(item for item in path.rglob("*") if item.is_file() and item.name.endswith(SUFFIXES))
        if not found:
            raise MegaloopError(f"input {path}: the directory holds no {', '.join(SUFFIXES)} file")
        return found
    if not path.is_file():
        raise MegaloopError(f"input {path}: no such file or directory")
    if not path.name.endswith(SUFFIXES):
        raise MegaloopError(f"input {path}: unknown kind of file; expected one of {', '.join(SUFFIXES)}")
    return [path]


def _lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, decompressed as its name says."""
    with _opened(path) as file:
        while line := file.readline(_LONGEST_LINE):
            yield line


def _parts_of_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a text file; a line of excessive length comes in parts, cut between characters."""
    line, rest = 1, b""
    with _opened(path) as file:
        while raw := file.readline(DOCUMENT_BYTES - len(rest)):
            raw = rest + raw
            ended = raw.endswith(b"\n")
            cut = len(raw) if ended or len(raw) < DOCUMENT_BYTES else _boundary(raw)
            yield line, raw[:cut]
            rest = raw[cut:]
            line += ended
    if rest:
        yield line, rest


def _boundary(raw: bytes) -> int:
    """Where to cut: before the last space, or else before the last character."""
    space = raw.rfind(b" ", len(raw) - 4096)
    if space > 0:
        return space
    cut = len(raw) - 1
    while cut > len(raw) - 4 and raw[cut] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        cut -= 1
    return cut


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path.name.endswith(".gz"):
        try:
            with gzip.open(path) as packed:
                yield packed  # type: ignore[misc]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise MegaloopError(f"input {path}: damaged gzip ({_first_line(error)})") from None
    elif path.name.endswith(".zst"):
        import zstandard

        try:
            with path.open("rb") as packed:
                yield io.BufferedReader(_Zstd(packed))
        except zstandard.ZstdError as error:
            raise MegaloopError(f"input {path}: damaged zstd ({_first_line(error)})") from None
    else:
        with path.open("rb") as plain:
            yield plain


class _Zstd(io.RawIOBase):
    """Decompresses a stream of zstd frames. zstandard's own reader takes a stream cut short for its end."""

    def __init__(self, packed: IO[bytes]):
        self._packed = packed
        self._frame: Any = None
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._plain:
            data = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = data or self._packed.read(1 << 14)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise zstandard.ZstdError("the file ends in the middle of a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._plain = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._plain))
        buffer[:size] = self._plain[:size]
        self._plain = self._plain[size:]
        return size


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def document_hash(text: str, salt: bytes = b"") -> int:
    """What decides whether a document is held out; with a salt, for another purpose."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, salt=salt).digest(), "big")
