"""Prep reads every kind of input, gives the same data whatever the workers, and leaves nothing half-done."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import zstandard

from data_prep.demo import demo_text
from data_prep.prepare import PrepSummary, prepare
from data_prep.sources import Inputs
from megaloop.data import DataSet
from megaloop.errors import MegaloopError
from megaloop.tokenizer import load_tokenizer
from tests.data.corpus import documents

TEXTS = documents(120)


def _jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def _prepare(inputs: list[Path], out: Path, **options: object) -> PrepSummary:
    defaults: dict[str, object] = {"sequence_length": 32, "validation_fraction": 0.05}
    if "tokenizer" not in options:
        defaults["vocab_size"] = 360
    return prepare(inputs, out, **(defaults | options))  # type: ignore[arg-type]


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", TEXTS)


@pytest.fixture(scope="module")
def prepared(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "shards"
    _prepare([text], out, workers=1)
    return out


def test_workers_change_nothing(text: Path, prepared: Path, tmp_path: Path) -> None:
    _prepare([text], tmp_path / "shards", workers=3)
    assert _digest(tmp_path / "shards") == _digest(prepared)


def _shards(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in _digest(folder).items() if name != "data.json"}


def test_every_kind_of_input_gives_the_same_shards(prepared: Path, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    kinds = {name: tmp_path / name for name in ("jsonl", "gz", "zst", "parquet", "txt")}
    for folder in kinds.values():
        folder.mkdir()
    (kinds["jsonl"] / "a.jsonl").write_bytes(lines)
    (kinds["gz"] / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    packer = zstandard.ZstdCompressor()
    (kinds["zst"] / "a.jsonl.zst").write_bytes(packer.compress(lines[:5000]) + packer.compress(lines[5000:]))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), kinds["parquet"] / "a.parquet")
    for number, item in enumerate(TEXTS):
        (kinds["txt"] / f"{number:04}.txt").write_text(item)
    for name, folder in kinds.items():
        _prepare([folder], tmp_path / f"{name}-out", tokenizer=prepared / "tokenizer.model")
        assert _shards(tmp_path / f"{name}-out") == _shards(prepared), name


def test_counts_are_true(prepared: Path) -> None:
    dataset = DataSet.open(prepared)
    tokenizer = load_tokenizer(dataset.tokenizer)
    splits = dataset.description.splits
    assert sum(split.documents for split in splits.values()) == len(TEXTS)
    assert sum(split.bytes for split in splits.values()) == sum(len(text.encode()) for text in TEXTS)
    assert sum(split.tokens for split in splits.values()) == sum(len(tokenizer.encode(text)) + 1 for text in TEXTS)
    for name, split in splits.items():
        assert split.samples == len(dataset.split(name)) == (split.tokens - 1) // 32


def test_the_held_out_split_is_chosen_by_document_not_by_place(text: Path, prepared: Path, tmp_path: Path) -> None:
    backwards = _jsonl(tmp_path / "backwards.jsonl", TEXTS[::-1])
    _prepare([backwards], tmp_path / "shards", tokenizer=prepared / "tokenizer.model")
    counts = [DataSet.open(path).description.splits["validation"] for path in (prepared, tmp_path / "shards")]
    assert counts[0] == counts[1]
    assert counts[0].samples > 0


def test_even_a_tiny_fraction_holds_out_something(text: Path, tmp_path: Path) -> None:
    summary = _prepare([text], tmp_path / "shards", validation_fraction=0.0)
    assert summary.validation_samples >= 1
    assert summary.train_samples > 4 * summary.validation_samples


def test_large_text_files_become_documents_at_blank_lines(prepared: Path, tmp_path: Path) -> None:
    text = "".join("In the beginning was the word. " * 40 + f"{number}\n\n" for number in range(1000))
    (tmp_path / "large.txt").write_text(text)
    summary = _prepare([tmp_path / "large.txt"], tmp_path / "shards", tokenizer=prepared / "tokenizer.model")
    assert summary.documents == pytest.approx(len(text) / 2**16, abs=2)
    assert summary.train_samples > 5 * summary.validation_samples > 0


@pytest.mark.parametrize("word", ["word ", "漢字\U0001f600"])
def test_a_text_file_of_a_single_line_is_cut_between_characters(tmp_path: Path, word: str) -> None:
    text = word * (2_000_000 // len(word.encode()))
    (tmp_path / "line.txt").write_text(text)
    documents = [document for _, document in Inputs([tmp_path / "line.txt"])]
    assert "".join(documents) == text
    assert len(documents) > 5


def test_a_bad_byte_in_a_long_line_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "line.txt").write_bytes(b"first\n" + b"x" * 1_000_000 + b"\xff" + b"x" * 100_000 + b"\nthird\xff\n")
    with pytest.raises(MegaloopError, match=r"line.txt, line 2: byte 0xff is not UTF-8"):
        list(Inputs([tmp_path / "line.txt"]))
    inputs = Inputs([tmp_path / "line.txt"], errors="skip")
    assert sum(map(len, (text for _, text in inputs))) > 700_000
    assert inputs.skipped == [2]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "parquet"])
def test_damage_of_any_byte_is_one_clear_error_or_harmless(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), path)
    else:
        packed = gzip.compress(lines) if kind.endswith("gz") else zstandard.ZstdCompressor().compress(lines)
        path.write_bytes(packed)
    whole, chance = path.read_bytes(), random.Random(0)
    for _ in range(100):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
        path.write_bytes(data)
        with contextlib.suppress(MegaloopError):  # any other error fails
            list(Inputs([path]))
    for cut in (3, 100, len(whole) // 2, len(whole) - 2):  # a download that broke off
        path.write_bytes(whole[:cut])
        with pytest.raises(MegaloopError, match=r"damaged|cannot be read"):
            list(Inputs([path], errors="skip"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nnot \xff fine\n", r"a.txt, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "\xff"}\n', r"a.jsonl, line 2: byte 0xff is not UTF-8"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": \n', r"a.jsonl, line 3: not JSON"),
        (
            "a.jsonl",
            b'{"body": "fine", "id": 3, "\\u001b[2Ktitle": "x"}\n',
            r"a.jsonl, line 1: no text in field 'text' \(set --text-field to a field that has: body, \\x1b\[2Ktitle\)",
        ),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl, line 1: no text in field 'text' \(no field has any\)"),
        ("a.jsonl", b'"text"\n', r"a.jsonl, line 1: no object of JSON"),
        ("a.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", r"a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a.jsonl, line 1: not JSON"),
        ("a.jsonl", '{"text": "fine"}\n'.encode("utf-16-le"), r"a.jsonl: UTF-16LE, by 17 NUL bytes among the first 34"),
        (
            "a.txt",
            "живи и жди, пиши и думай\n".encode("utf-16-le"),
            r"a.txt: UTF-16LE, by .*iconv -f UTF-16LE -t UTF-8",
        ),
        ("a.txt", "of the earth\n".encode("utf-16-be"), r"a.txt: UTF-16BE, by 13 NUL bytes among the first 26"),
        ("a.txt", "of the earth\n".encode("utf-16"), r"a.txt: UTF-16, as its byte order mark FF FE says; convert it"),
        ("a.txt", "of the earth\n".encode("utf-32"), r"a.txt: UTF-32, as its byte order mark FF FE 00 00 says"),
        ("a.txt", "of the earth\n".encode("utf-32-le"), r"a.txt: UTF-32, or no text at all, by 39 NUL bytes"),
        ("a.txt", bytes([1, 0, 0, 1, 7, 8, 9]) * 99, r"a.txt: no text at all, by 198 NUL bytes"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl, line 1: half a surrogate pair"),
        ("a.jsonl.gz", b"no gzip", r"a.jsonl.gz: damaged gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "fine"}\n' * 9, mtime=0)[:-9], r"a.jsonl.gz: damaged gzip"),
        ("a.jsonl.zst", b"no zstd", r"a.jsonl.zst: damaged zstd"),
        ("a.parquet", b"no parquet", r"a.parquet: damaged, or no parquet file"),
        ("a.txt", b"", r"a.txt: empty; give files with text"),
        ("a.txt", b" \n \n", r"no text in it"),
        ("a.csv", b"text\n", r"a.csv: unknown kind of file; expected one of .txt, .jsonl"),
    ],
)
def test_input_that_cannot_be_read_is_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MegaloopError, match=message):
        _prepare([tmp_path / name], tmp_path / "shards")
    assert os.listdir(tmp_path) == [name]  # nothing was left behind


def test_a_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"\n\nthe word\n")
    (tmp_path / "b.txt").write_bytes(mark + b"x" * 65_533 + "\u00e9".encode() + b"\nend\n")  # cut there, but not within
    (tmp_path / "c.jsonl").write_bytes(mark + b'{"text": "the word"}\n')
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(mark + b'{"text": "\xef\xbb\xbfkept"}\n'))
    (tmp_path / "e.txt").write_bytes(b"one stray \0 among many letters " * 4 + b"\n")
    texts = [text for _, text in Inputs(sorted(tmp_path.iterdir()))]
    assert texts[0] == "\n\nthe word\n"
    assert texts[1] == "x" * 65_533 + "\u00e9\nend\n"
    assert texts[2:] == ["the word", "\ufeffkept", "one stray \0 among many letters " * 4 + "\n"]


def test_a_file_of_another_encoding_is_left_out_as_a_whole_on_request(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("of the earth\nand of heaven\n".encode("utf-16"))
    inputs = Inputs([tmp_path / "a.txt"], errors="skip")
    assert list(inputs) == []
    assert inputs.skipped == [1]
    with pytest.raises(MegaloopError, match=r"no text in it \(skipped: 1; the first: input .*a.txt: UTF-16"):
        _prepare([tmp_path / "a.txt"], tmp_path / "shards", errors="skip")


def test_a_missing_input_and_an_empty_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(MegaloopError, match=r"nowhere: no such file or directory"):
        _prepare([tmp_path / "nowhere"], tmp_path / "shards")
    with pytest.raises(MegaloopError, match=r"input yyy.*\.\.\.: cannot be read \(File name too long\)"):
        _prepare([Path("y" * 5000)], tmp_path / "shards")
    with pytest.raises(MegaloopError, match=r"the directory holds no .txt, .jsonl"):
        _prepare([tmp_path], tmp_path / "shards")


def test_what_is_no_text_is_skipped_and_counted_on_request(tmp_path: Path) -> None:
    good = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}\n' + good + b"oops\n")
    (tmp_path / "b.txt").write_bytes(b"fine \xe9\nbut this is read")
    summary = _prepare([tmp_path], tmp_path / "shards", errors="skip")
    assert summary.skipped == 3
    sources = DataSet.open(tmp_path / "shards").description.sources
    assert [(Path(source.path).name, source.documents, source.skipped) for source in sources] == [
        ("a.jsonl", len(TEXTS), 2),
        ("b.txt", 1, 1),
    ]


def test_a_vocabulary_that_the_text_cannot_support_names_one_that_works(text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        MegaloopError, match=r"--vocab-size 5000 is larger than the text supports; use \d+ or less"
    ) as large:
        _prepare([text], tmp_path / "shards", vocab_size=5000)
    largest = int(str(large.value).split("use ")[1].split(" ")[0])
    assert _prepare([text], tmp_path / "shards", vocab_size=largest).vocab_size == largest
    with pytest.raises(MegaloopError, match=r"could not be trained with --vocab-size 10{30}"):
        _prepare([text], tmp_path / "more", vocab_size=10**30)
    with pytest.raises(MegaloopError, match=r"--vocab-size 100 is smaller than the text's characters need"):
        _prepare([text], tmp_path / "more", vocab_size=100)


def test_too_little_text_says_what_is_missing(tmp_path: Path, prepared: Path) -> None:
    few = _jsonl(tmp_path / "few.jsonl", TEXTS[:2])
    with pytest.raises(MegaloopError, match=r"too little text: the .* split has"):
        _prepare([few], tmp_path / "shards", tokenizer=prepared / "tokenizer.model", sequence_length=512)
    assert not (tmp_path / "shards").exists()


def test_nothing_but_a_data_set_is_overwritten(text: Path, prepared: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(text, mine / "text.jsonl")
    before = _digest(mine)
    for overwrite in (False, True):
        with pytest.raises(MegaloopError, match=r"is not empty|holds no data set"):
            _prepare([mine], mine, overwrite=overwrite)
    assert _digest(mine) == before
    copy = shutil.copytree(prepared, tmp_path / "copy")
    shutil.copy(text, copy / "text.jsonl")
    with pytest.raises(MegaloopError, match=r"holds the input .*text.jsonl, so it is not overwritten"):
        _prepare([copy / "text.jsonl"], copy, overwrite=True)
    (copy / "text.jsonl").unlink()
    _prepare([text], copy, overwrite=True, sequence_length=16)
    assert DataSet.open(copy).sequence_length == 16


def test_an_output_that_is_a_link_keeps_being_one(text: Path, prepared: Path, tmp_path: Path) -> None:
    real = shutil.copytree(prepared, tmp_path / "real")
    (real / "NOTES").write_text("mine")
    (tmp_path / "link").symlink_to(real)
    _prepare([text], tmp_path / "link", overwrite=True, sequence_length=16)
    assert (tmp_path / "link").is_symlink()
    assert DataSet.open(real).sequence_length == 16
    DataSet.open(real).verify()
    assert sorted(os.listdir(real)) == ["NOTES", "data.json", "tokenizer.model", "train", "validation"]


def test_an_output_may_be_a_mount_point_and_may_fill_up(text: Path, prepared: Path, tmp_path: Path) -> None:
    tokenizer = prepared / "tokenizer.model"
    with _mounted(tmp_path / "volume", "4m") as volume:
        _prepare([text], volume, tokenizer=tokenizer)
        assert _shards(volume) == _shards(prepared)
    with _mounted(tmp_path / "volume", "16k") as volume:
        with pytest.raises(MegaloopError, match="No space left on device"):
            _prepare([text], volume, tokenizer=tokenizer)
        assert os.listdir(volume) == []


def test_an_output_that_is_a_file_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(MegaloopError, match=r"is a file; choose a directory|Not a directory"):
            _prepare([text], out, overwrite=True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_of_two_preps_into_one_directory_the_later_is_refused(text: Path, prepared: Path, tmp_path: Path) -> None:
    """The second finishes while the first still reads its input, here a pipe's worth of it."""
    out, tokenizer = tmp_path / "shards", prepared / "tokenizer.model"
    first = subprocess.Popen(
        [sys.executable, "-c", _PAUSED, str(text), str(out), str(tokenizer)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "writing\n"
    _prepare([text], out, tokenizer=tokenizer)
    before = _digest(out)
    output, _ = first.communicate("go on\n")
    assert f"output {out} is not empty" in output
    assert {name: digest for name, digest in _digest(out).items() if not name.startswith(".")} == {
        name: digest for name, digest in before.items() if not name.startswith(".")
    }


_PAUSED = """
import sys
from pathlib import Path
import data_prep.pack
from data_prep.prepare import prepare
from megaloop.errors import MegaloopError
finish = data_prep.pack.SplitWriter.finish
def pausing(self):
    if "train" in str(self._writer.local):
        print("writing", flush=True)
        sys.stdin.readline()
    return finish(self)
data_prep.pack.SplitWriter.finish = pausing
try:
    prepare([Path(sys.argv[1])], Path(sys.argv[2]), tokenizer=Path(sys.argv[3]), sequence_length=32)
except MegaloopError as error:
    print(error)
"""


def test_a_tokenizer_that_will_not_do_is_refused_before_anything_is_read(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(inputs: Inputs) -> Iterator[tuple[int, str]]:
        raise AssertionError("the input was read")

    monkeypatch.setattr(Inputs, "__iter__", read)
    unending = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the word"] * 9), model_writer=unending, vocab_size=20, eos_id=-1, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "unending.model").write_bytes(unending.getvalue())
    for tokenizer, message in (
        (text, "no tokenizer.json"),
        (tmp_path / "nowhere.model", "no such file; expected a sentencepiece model"),
        (tmp_path / "unending.model", r"unending.model has no end-of-text token"),
    ):
        with pytest.raises(MegaloopError, match=message):
            _prepare([text], tmp_path / "shards", tokenizer=tokenizer)
    assert not (tmp_path / "shards").exists()


@contextlib.contextmanager
def _mounted(at: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    at.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], capture_output=True).returncode:
        pytest.skip("a small file system can't be mounted here (not root)")
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def test_a_full_disk_leaves_nothing_behind(text: Path, prepared: Path, tmp_path: Path) -> None:
    with _mounted(tmp_path / "small", "16k") as small:
        with pytest.raises(MegaloopError, match="No space left on device"):
            _prepare([text], small / "shards", tokenizer=prepared / "tokenizer.model")
        assert os.listdir(small) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
import data_prep.pack
from data_prep.prepare import prepare
calls, limit, write = 0, int(sys.argv[1]), data_prep.pack.SplitWriter.add
def add(self, tokens):
    global calls
    calls += 1
    if calls == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, tokens)
data_prep.pack.SplitWriter.add = add
prepare([Path(sys.argv[2])], Path(sys.argv[3]), tokenizer=Path(sys.argv[4]), sequence_length=32)
"""


@pytest.mark.slow
def test_a_killed_prep_is_not_taken_for_a_data_set(text: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    command = [sys.executable, "-c", _KILLED, "100", str(text), str(out), str(prepared / "tokenizer.model")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    for folder in (out, *out.iterdir()):
        with pytest.raises(MegaloopError, match=r"no data.json there"):
            DataSet.open(folder)
    _prepare([text], out, tokenizer=prepared / "tokenizer.model")
    assert _digest(out) == _digest(prepared)  # with nothing left of the one that was killed


_MEMORY = """
import sys
from pathlib import Path
from data_prep.prepare import prepare
prepare([Path(sys.argv[1])] * int(sys.argv[2]), Path(sys.argv[3]), tokenizer=Path(sys.argv[4]), workers=2)
print(dict(line.split(":", 1) for line in open("/proc/self/status"))["VmHWM"].split()[0])
"""


@pytest.mark.slow
def test_memory_stays_flat_as_the_input_grows(prepared: Path, tmp_path: Path) -> None:
    demo_text(tmp_path / "kjv.jsonl")
    peaks = []
    for times in (2, 8):  # 8 and 33 MB of text
        arguments = [tmp_path / "kjv.jsonl", times, tmp_path / f"out-{times}", prepared / "tokenizer.model"]
        run = subprocess.run(
            [sys.executable, "-c", _MEMORY, *map(str, arguments)], capture_output=True, text=True, check=True
        )
        peaks.append(int(run.stdout))
    assert peaks[1] < 1.25 * peaks[0], peaks
