"""``megaloop bench prep``: our tokenization against sentencepiece's own multi-threaded batch encoding, and its memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from data_prep.prepare import encode_documents
from data_prep.sources import Inputs, find_inputs
from megaloop.data.tokenizer import Tokenizer
from megaloop.train.hardware import describe_machine

__all__ = ["PrepBenchmark", "bench_prep"]

_CHILD = """
import sys
from pathlib import Path
from data_prep.prepare import prepare
prepare([Path(p) for p in sys.argv[3:]], Path(sys.argv[1]), tokenizer=Path(sys.argv[2]), sequence_length=512)
# not ru_maxrss: Linux carries that over from the parent's memory
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


@dataclass(frozen=True)
class PrepBenchmark:
    """What the benchmark measured.

    Attributes:
        ours: MB/s of text, reading, splitting into batches and arrays included; the median over rounds.
        theirs: MB/s of one call of sentencepiece's batch encoding of all documents with as many threads.
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
    inputs: list[Path], *, tokenizer: Path, workers: int | None = None, rounds: int = 5, text_field: str = "text"
) -> PrepBenchmark:
    """Encode the inputs ``rounds`` times with ours and theirs in turn, then prepare 1x and 4x of them for the memory."""
    workers = workers or os.cpu_count() or 1
    model = Tokenizer.load(tokenizer).path.read_bytes()
    files = find_inputs(inputs)
    texts = [text for _, text in Inputs(files, text_field)]
    size = sum(len(text.encode()) for text in texts) / 1e6
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    rates: list[tuple[float, float]] = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in encode_documents(iter(Inputs(files, text_field)), model, "uint16", workers):
            pass
        middle = time.perf_counter()
        processor.encode(texts, num_threads=workers)
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
        peak_bytes=_peak(files, tokenizer),
        peak_bytes_4x=_peak(files * 4, tokenizer),
    )


def _peak(files: list[Path], tokenizer: Path) -> int:
    """Peak memory of a process that prepares ``files``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _CHILD, f"{folder}/out", str(tokenizer), *map(str, files)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output)
