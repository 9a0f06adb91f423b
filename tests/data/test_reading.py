"""Shards, loader and tokenizer: the same global batches on any number of replicas, and damage is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaloop.config import DataConfig, SourceConfig
from megaloop.data import BatchLoader, DataSet, MicroBatch, open_sources, validation_batches
from megaloop.data.streaming_base import mds_writer
from megaloop.errors import MegaloopError
from megaloop.tokenizer import Tokenizer, load_tokenizer
from tests.data.corpus import documents


def _read(
    path: Path, batches: int, *, dp_rank: int = 0, dp_size: int = 1, start: int = 0, prefetch: int = 2, length: int = 64
) -> list[MicroBatch]:
    sources = open_sources(DataConfig(sources=(SourceConfig(path=path),), sequence_length=length))
    options: dict[str, Any] = {"global_batch": 8, "micro_batch": 2, "dp_rank": dp_rank, "dp_size": dp_size}
    with BatchLoader(sources.datasets, sources.order(0), start_sample=start, prefetch=prefetch, **options) as loader:
        return [next(loader) for _ in range(batches)]


def _ids(batches: list[MicroBatch]) -> list[int]:
    return [number for batch in batches for number in batch.sample_ids]


@pytest.mark.parametrize("dp", [2, 4])
def test_replicas_together_read_the_global_batch(corpus: Path, dp: int) -> None:
    alone = _read(corpus, 3 * 4, prefetch=0)
    ranks = [_read(corpus, 3 * 4 // dp, dp_rank=rank, dp_size=dp) for rank in range(dp)]
    per_step = 4 // dp
    together = [batch for step in range(3) for rank in ranks for batch in rank[step * per_step : (step + 1) * per_step]]
    assert _ids(together) == _ids(alone) == list(range(24))
    assert all(a.inputs.equal(b.inputs) and a.targets.equal(b.targets) for a, b in zip(together, alone, strict=True))


def test_reading_on_from_a_step_gives_what_reading_through_gives(corpus: Path) -> None:
    through, later = _read(corpus, 12), _read(corpus, 4, start=16, prefetch=0)
    assert _ids(later) == _ids(through[8:])
    assert all(a.inputs.equal(b.inputs) for a, b in zip(later, through[8:], strict=True))


def test_every_token_is_predicted_exactly_once_in_an_epoch(corpus: Path) -> None:
    """The packed samples, laid end to end, are the documents' tokens, each followed by end-of-text."""
    dataset = DataSet.open(corpus)
    tokenizer = load_tokenizer(dataset.tokenizer)
    split = dataset.split("train")
    samples = [split.sample(i) for i in range(len(split))]
    assert all(a.tokens[-1] == b.tokens[0] for a, b in pairwise(samples))
    stream = [int(samples[0].tokens[0]), *(int(t) for sample in samples for t in sample.tokens[1:])]
    texts, rest = [], stream
    while tokenizer.eos_id in rest:
        end = rest.index(tokenizer.eos_id)
        texts.append(tokenizer.decode(rest[:end]))
        assert rest[:end] == tokenizer.encode(texts[-1])
        rest = rest[end + 1 :]
    remaining = iter(documents())
    assert all(text in remaining for text in texts)  # each is a document, in the input's order, the held out left out
    counts = dataset.description.splits["train"]
    assert counts.documents - len(texts) <= 64  # less than a sample is cut off at the end
    assert counts.tokens - len(stream) < 64
    starts = [64 * number + int(start) for number, sample in enumerate(samples) for start in sample.starts]
    assert starts[0] == 0
    assert all(stream[start - 1] == tokenizer.eos_id for start in starts[1:])
    assert len(starts) == sum(token == tokenizer.eos_id for token in stream[:-1]) + 1
    predicted = tokenizer.decode([token for token in stream[1:] if token != tokenizer.eos_id])
    assert sum(sample.bytes for sample in samples) == len(predicted.encode())


def test_documents_number_the_tokens_of_a_sample(corpus: Path) -> None:
    eos = DataSet.open(corpus).description.tokenizer.eos_id
    for batch in _read(corpus, 6):
        ends = (batch.inputs == eos).int().cumsum(1)
        assert batch.documents[:, 1:].equal(ends[:, :-1].int())
        assert batch.documents[:, 0].eq(0).all()
        assert batch.targets[:, :-1].equal(batch.inputs[:, 1:])


def test_shorter_samples_are_pieces_of_the_stored_ones(corpus: Path) -> None:
    whole, pieces = DataSet.open(corpus).split("train"), DataSet.open(corpus, 16).split("train")
    assert len(pieces) == 4 * len(whole)
    for index in range(len(whole)):
        parts = [pieces.sample(4 * index + i) for i in range(4)]
        sample = whole.sample(index)
        assert [int(t) for part in parts for t in part.tokens[:-1]] == sample.tokens[:-1].tolist()
        assert [16 * i + int(s) for i, part in enumerate(parts) for s in part.starts] == sample.starts.tolist()
        assert sum(part.bytes for part in parts) == sample.bytes


def test_validation_is_sliced_like_training(corpus: Path) -> None:
    datasets = [DataSet.open(corpus)]
    alone = validation_batches(datasets, samples=12, micro_batch=2)
    ranks = [validation_batches(datasets, samples=12, micro_batch=2, dp_rank=rank, dp_size=2) for rank in range(2)]
    assert sorted(_ids(ranks[0] + ranks[1])) == sorted(_ids(alone)) == list(range(12))
    with pytest.raises(MegaloopError, match="fewer than one micro-batch on each rank"):
        validation_batches(datasets, samples=3, micro_batch=2, dp_size=2)


def test_a_closed_loader_leaves_no_thread(corpus: Path) -> None:
    _read(corpus, 1, prefetch=4)
    assert not [thread for thread in threading.enumerate() if thread.name == "megaloop-data"]


@pytest.mark.parametrize("shares", [(1.0, 1.0), (3.0, 1.0)])
def test_a_mixture_reads_its_sources_in_their_shares(corpus: Path, tmp_path: Path, shares: tuple[float, float]) -> None:
    """Micro-batch by micro-batch what the order says, from more than one source and over more than one epoch."""
    copy = shutil.copytree(corpus, tmp_path / "copy")
    configured = tuple(
        SourceConfig(path=path, weight=share) for path, share in zip((corpus, copy), shares, strict=True)
    )
    sources = open_sources(DataConfig(sources=configured, sequence_length=64))
    order = sources.order(7)
    steps = 3 * len(sources.datasets[0].split("train")) // 8
    with BatchLoader(sources.datasets, order, global_batch=8, micro_batch=8) as loader:
        batches = [next(loader) for _ in range(steps)]
    places = [order(number) for number in _ids(batches)]
    rows = [row for batch in batches for row in batch.inputs]
    for (source, index), row in zip(places, rows, strict=True):
        assert row.tolist() == sources.datasets[source].split("train").sample(index).tokens[:-1].tolist()
    taken = sum(source == 0 for source, _ in places)
    assert taken == pytest.approx(len(places) * shares[0] / sum(shares), abs=1)


def test_special_tokens_written_out_in_a_text_are_text(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer.model")
    text = "the </s> of <s> and <unk> <0x41>"
    assert tokenizer.eos_id not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("prefetch", [0, 3])
def test_damage_found_in_the_background_reaches_the_reader(corpus: Path, tmp_path: Path, prefetch: int) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    for shard in (copy / "train").glob("*.mds"):
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(data)
    with pytest.raises(MegaloopError, match=r"shard\.\d+\.mds: shard was altered"):
        _read(copy, 1, prefetch=prefetch)


class _Unpickled:
    """Writes a file when it is unpickled."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.witness,)


def _sign(dataset: Path, index: dict[str, Any]) -> None:
    """Write a crafted index of the training split with checksums to match."""
    (dataset / "train/index.json").write_text(json.dumps(index))
    description = json.loads((dataset / "data.json").read_text())
    description["indices"]["train"] = hashlib.sha256((dataset / "train/index.json").read_bytes()).hexdigest()
    (dataset / "data.json").write_text(json.dumps(description))


@pytest.mark.parametrize("hidden", [False, True])
def test_nothing_is_ever_unpickled(corpus: Path, tmp_path: Path, hidden: bool) -> None:
    """A crafted data set, its checksums in order, whose tokens are pickled; hidden behind a column of the same name."""
    copy, witness = shutil.copytree(corpus, tmp_path / "copy"), tmp_path / "witness"
    shutil.rmtree(copy / "train")
    columns = {"tokens": "pkl", "starts": "bytes", "text_bytes": "int"}
    with mds_writer()(out=str(copy / "train"), columns=columns, hashes=["xxh3_128"]) as writer:
        writer.write({"tokens": _Unpickled(witness), "starts": b"", "text_bytes": 1})
    index = json.loads((copy / "train/index.json").read_text())
    if hidden:
        for key, value in {"column_names": "tokens", "column_encodings": "bytes", "column_sizes": None}.items():
            index["shards"][0][key].append(value)
    _sign(copy, index)
    with pytest.raises(MegaloopError, match="shards of another layout than megaloop's"):
        DataSet.open(copy).split("train").sample(0)
    assert not witness.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"raw_data": {"basename": "../../text.jsonl", "bytes": 1, "hashes": {}}}, "points outside the data set"),
        ({"raw_data": {"basename": "/etc/passwd", "bytes": 1, "hashes": {}}}, "points outside the data set"),
        ({"raw_data": {"basename": "..", "bytes": 1, "hashes": {}}}, "points outside the data set"),
        ({"raw_data": 3}, "damaged"),
        ({"column_names": None}, "damaged"),
        ({"column_encodings": ["bytes"]}, "damaged"),
        ({"samples": "many"}, "damaged"),
        ({"samples": -3}, "damaged"),
        ({"samples": True}, "damaged"),
        ({"samples": 10**30}, "damaged"),
        ({"samples": 1}, r"\d+ samples in the shards, \d+ in data.json"),
        ({"raw_data": {"basename": "a\0", "bytes": 1, "hashes": {}}}, "points outside the data set"),
        ({"raw_data": {"basename": ["a"], "bytes": 1, "hashes": {}}}, "points outside the data set"),
        ({"raw_data": {"basename": "index.json", "bytes": 1e9, "hashes": {}}}, "damaged"),
        ({"column_sizes": [None, None, 10**12]}, "of another layout"),
        ({"zip_data": {"basename": "../x", "bytes": 1, "hashes": {}}}, "of another layout"),
        ({"version": 3}, "damaged"),
        ({"format": "json"}, "of another layout"),
        ({"compression": "zstd"}, "of another layout"),
    ],
)
def test_a_crafted_index_is_refused(corpus: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    index = json.loads((copy / "train/index.json").read_text())
    index["shards"][0] |= change
    _sign(copy, index)
    with pytest.raises(MegaloopError, match=message):
        DataSet.open(copy).split("train").sample(0)


def test_a_shard_that_goes_missing_while_a_run_reads_is_named(corpus: Path, tmp_path: Path) -> None:
    split = DataSet.open(shutil.copytree(corpus, tmp_path / "copy")).split("train")
    _first_shard(tmp_path / "copy").unlink()
    with pytest.raises(MegaloopError, match=r"shard\.00000\.mds: shard cannot be read"):
        split.sample(0)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda data: data[:8], "was altered after it was checked"),
        (lambda data: b"", "was altered after it was checked"),
        (lambda data: bytes(len(data)), "was altered after it was checked"),
        (lambda data: b"\xff" * len(data), "was altered after it was checked"),
        (lambda data: data[:-40] + b"\xff" * 40, "was altered after it was checked"),
        (None, "shard is gone; put it back"),
    ],
)
def test_a_shard_that_is_altered_after_its_check_is_named(
    corpus: Path, tmp_path: Path, alter: Callable[[bytes], bytes] | None, message: str
) -> None:
    split = DataSet.open(shutil.copytree(corpus, tmp_path / "copy")).split("train")
    split.verify()
    shard = _first_shard(tmp_path / "copy")
    last = split.shard_sizes[0] - 1
    assert split.sample(last).tokens.shape == (65,)
    if alter is None:
        shard.unlink()
    else:
        shard.write_bytes(alter(shard.read_bytes()))
    with pytest.raises(MegaloopError, match=rf"shard\.00000\.mds: shard {message}".replace("shard shard", "shard")):
        split.sample(last)


def test_verify_names_the_one_altered_shard(corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    DataSet.open(copy).verify()
    shard = sorted((copy / "train").glob("*.mds"))[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    with pytest.raises(MegaloopError, match=f"{shard.name}: shard was altered"):
        DataSet.open(copy).verify()


def _first_shard(path: Path) -> Path:
    return sorted((path / "train").glob("*.mds"))[0]


def test_missing_and_truncated_shards_are_named(corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    shard = _first_shard(copy)
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(MegaloopError, match=rf"{shard.name}: shard has \d+ bytes, expected"):
        DataSet.open(copy).split("train")
    shard.unlink()
    with pytest.raises(MegaloopError, match=f"{shard.name}: shard is missing"):
        DataSet.open(copy).split("train")


@pytest.mark.parametrize("victim", ["train/index.json", "validation/index.json"])
def test_an_altered_index_is_named(corpus: Path, tmp_path: Path, victim: str) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    index = json.loads((copy / victim).read_text())
    index["shards"][0]["column_encodings"] = ["pkl", "pkl", "pkl"]
    (copy / victim).write_text(json.dumps(index))
    with pytest.raises(MegaloopError, match=f"{victim}: altered"):
        DataSet.open(copy).verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "no data.json there"),
        ("{", "data.json is damaged"),
        ({"format_version": 3, "news": 1}, "format version 3, expected 1 or 2"),
        ({"format_version": 2}, "data.json is damaged .targets"),
        ({"surprise": 1}, "data.json is damaged .surprise"),
        ({"splits": {}}, "lacks the train split"),
        ({"sequence_length": "64"}, "data.json is damaged .sequence_length"),
        ({"sequence_length": 10**30}, "data.json is damaged .sequence_length"),
        ({"sequence_length": -1}, "data.json is damaged .sequence_length"),
        ({"splits": {"train": {"documents": 1, "tokens": 1, "bytes": 1, "samples": True}}}, "damaged .splits.train"),
        ({"\x1b[2J": 1}, r"data.json is damaged .\\x1b\[2J"),
        ({"indices": []}, "data.json is damaged .indices"),
        ({"folder": "../other"}, "names a folder outside the data set"),
        ({"folder": ".."}, "names a folder outside the data set"),
        ('{"format_version": ' + "9" * 5000 + "}", "data.json is damaged"),
        ("[" * 100_000, "data.json is damaged"),
        (
            {"tokenizer": {"file": "../t", "sha256": "", "vocab_size": 9, "bos_id": 1, "eos_id": 2}},
            "names a tokenizer outside the data set",
        ),
    ],
)
def test_a_bad_description_is_one_clear_error(
    corpus: Path, tmp_path: Path, change: dict[str, object] | str | None, message: str
) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    path = copy / "data.json"
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(MegaloopError, match=message):
        DataSet.open(copy)


def test_a_sequence_the_shards_cannot_give_is_refused(corpus: Path) -> None:
    with pytest.raises(MegaloopError, match="sequence_length 128 is longer than the 64 tokens"):
        DataSet.open(corpus, 128)
    with pytest.raises(MegaloopError, match="sequence_length 48 does not divide the 64 tokens"):
        DataSet.open(corpus, 48)


def test_a_vocabulary_that_the_tokenizer_does_not_have_is_refused(corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    description = json.loads((copy / "data.json").read_text())
    description["tokenizer"]["vocab_size"] = 2**31 - 1
    (copy / "data.json").write_text(json.dumps(description))
    with pytest.raises(
        MegaloopError, match=r"data.json gives the tokenizer another size, beginning or end than it has"
    ):
        open_sources(DataConfig(sources=(SourceConfig(path=copy),), sequence_length=64))


def test_sources_must_share_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(corpus, tmp_path / "copy")
    both = DataConfig(sources=(SourceConfig(path=corpus), SourceConfig(path=copy, weight=3)), sequence_length=64)
    assert len(open_sources(both).datasets) == 2
    (copy / "tokenizer.model").write_bytes(b"another")
    with pytest.raises(MegaloopError, match=r"tokenizer.model was altered"):
        open_sources(both)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_the_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = _TOKENIZER[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text


_TOKENIZER: list[Tokenizer] = []


@pytest.fixture(autouse=True, scope="module")
def _tokenizer(corpus: Path) -> None:
    _TOKENIZER.append(load_tokenizer(corpus / "tokenizer.model"))
