"""``megaloop bench prep``: our tokenization against the library's own multi-threaded batch encoding, and its memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_prep.prepare import available_cores
from data_prep.sources import Inputs, find_inputs
from data_prep.tokenizer import train_sentencepiece
from data_prep.write import encode_documents
from megaloop.data.sources import open_tokenizer
from megaloop.runtime.hardware import describe_machine
from megaloop.tokenizer import SentencePieceTokenizer, Tokenizer

__all__ = ["PrepBenchmark", "bench_prep"]

_CHILD = """
import sys
from pathlib import Path
from data_prep.prepare import prepare
inputs = [Path(p) for p in sys.argv[4:]]
prepare(inputs, Path(sys.argv[1]), tokenizer=Path(sys.argv[2]), workers=int(sys.argv[3]), sequence_length=512)
# not ru_maxrss: Linux carries that over from the parent's memory
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


@dataclass(frozen=True)
class PrepBenchmark:
    """What the benchmark measured.

    Attributes:
        ours: MB/s of text, reading, splitting into batches and arrays included; the median over rounds.
        theirs: MB/s of one call of sentencepiece's, or tokenizers', batch encoding of all documents with as many threads.
        ratio, spread: median, smallest and largest of ours / theirs, round by round.
        peak_bytes, peak_bytes_4x: largest resident memory of a whole ``prep`` of the input, and of four times the input.
    """

    machine: str
    megabytes: float
    workers: int
    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]
    peak_bytes: int
    peak_bytes_4x: int


def bench_prep(
    inputs: list[Path],
    *,
    tokenizer: Path | None = None,
    vocab_size: int = 8192,
    workers: int | None = None,
    rounds: int = 5,
) -> PrepBenchmark:
    """Encode the inputs ``rounds`` times with ours and theirs in turn, then prepare 1x and 4x of them for the memory.

    Args:
        inputs: as ``prepare`` takes them; read into memory for the library.
        tokenizer: to encode with, as ``prepare`` takes it; None: a sentencepiece model of ``vocab_size`` is trained on the inputs first.
        workers: threads of both; default: one per core.

    Raises:
        MegaloopError: bad input, or too little of it for the vocabulary.
    """
    if tokenizer is None:
        with tempfile.TemporaryDirectory() as folder:
            trained = Path(folder) / "tokenizer.model"
            trained.write_bytes(train_sentencepiece((text for _, text in Inputs(find_inputs(inputs))), vocab_size))
            return bench_prep(inputs, tokenizer=trained, workers=workers, rounds=rounds)
    workers = workers or available_cores()
    opened = open_tokenizer(tokenizer)
    files = find_inputs(inputs)
    texts = [text for _, text in Inputs(files)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    dtype = "uint16" if opened.vocab_size <= 1 << 16 else "uint32"
    encode = _batch_encoder(opened, workers)
    rates: list[tuple[float, float]] = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in encode_documents(iter(Inputs(files)), opened, dtype, workers):
            pass
        middle = time.perf_counter()
        encode(texts)
        rates.append((size / (middle - began), size / (time.perf_counter() - middle)))
    ratios = [ours / theirs for ours, theirs in rates]
    ours, theirs = (statistics.median(column) for column in zip(*rates, strict=True))
    return PrepBenchmark(
        machine=describe_machine(),
        megabytes=size,
        workers=workers,
        ours=ours,
        theirs=theirs,
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        peak_bytes=_peak(files, tokenizer, workers),
        peak_bytes_4x=_peak(files * 4, tokenizer, workers),
    )


def _batch_encoder(tokenizer: Tokenizer, workers: int) -> Callable[[list[str]], object]:
    """The library's own call for many texts, its own threads included."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return partial(tokenizer.processor.encode, num_threads=workers)
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(tokenizer.path))

    def encode(texts: list[str]) -> None:
        before = os.environ["TOKENIZERS_PARALLELISM"]  # ours encode with one thread each
        os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(workers)}
        try:
            library.encode_batch(texts, add_special_tokens=False)
        finally:
            os.environ["TOKENIZERS_PARALLELISM"] = before

    return encode


def _peak(files: list[Path], tokenizer: Path, workers: int) -> int:
    """Peak memory of a process that prepares ``files``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _CHILD, f"{folder}/out", str(tokenizer), str(workers), *map(str, files)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output)
