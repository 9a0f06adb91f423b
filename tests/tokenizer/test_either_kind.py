"""A run on a byte-level BPE: prepared, trained, resumed, grown, asked, fine-tuned and written out again, with the very files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.prepare import prepare
from megaloop.checkpoint import Checkpoint, resolve_checkpoint
from megaloop.checkpoint.depth import grow_checkpoint
from megaloop.config import DataConfig
from megaloop.data import DataSet, open_sources
from megaloop.depth import DepthSpec
from megaloop.errors import DamagedCheckpoint, MegaloopError
from megaloop.evaluation.evaluate import evaluate
from megaloop.huggingface.weights import export_huggingface, import_huggingface
from megaloop.inference.generate import Generation, generate_text
from megaloop.inference.sampling import Sampling
from megaloop.tokenizer import file_sha256, load_tokenizer, tokenizer_files
from tests.data.corpus import documents
from tests.distributed import RankError, run_ranks
from tests.tokenizer.test_tokenizers import chat_tokenizer
from tests.train.runs import configuration, losses, train

NAMES = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in tokenizer_files(folder / "tokenizer.json")}


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a model's directory holds of its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    chat_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(120)))
    return path


@pytest.fixture(scope="module")
def shards(model_directory: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "data"
    prepare([text], out, tokenizer=model_directory, sequence_length=32)
    return out


@pytest.fixture(scope="module")
def run(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 steps, and 10 more after a resume on two ranks."""
    folder = tmp_path_factory.mktemp("run") / "run"
    run_ranks(1, train, configuration(shards, folder, train__steps=10, schedule={"kind": "cosine", "warmup_steps": 2}))
    run_ranks(2, train, configuration(shards, folder, (2, 1, 1), schedule={"kind": "cosine", "warmup_steps": 2}), True)
    return folder


def test_a_data_set_holds_the_very_files(shards: Path, model_directory: Path) -> None:
    assert sorted(path.name for path in (shards / "tokenizer").iterdir()) == NAMES
    assert _files(shards / "tokenizer") == _files(model_directory)
    tokenizer = DataSet.open(shards).open_tokenizer()
    documents_found = 0
    sample = DataSet.open(shards).split("train").sample(0)
    for start in sample.starts:
        documents_found += sample.tokens[start] == tokenizer.bos_id  # the tokenizer's own prefix begins each document
    assert documents_found == len(sample.starts) >= 1


def test_prep_from_a_file_a_directory_and_a_data_set_is_the_same(
    model_directory: Path, shards: Path, text: Path, tmp_path: Path
) -> None:
    for number, source in enumerate((model_directory / "tokenizer.json", shards)):
        prepare([text], tmp_path / str(number), tokenizer=source, sequence_length=32, workers=number + 1)
        for name in ("data.json", "train/index.json"):
            assert (tmp_path / str(number) / name).read_bytes() == (shards / name).read_bytes()


def test_overwriting_leaves_no_other_tokenizer(model_directory: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    prepare([text], out, vocab_size=330, sequence_length=32)
    prepare([text], out, tokenizer=model_directory, sequence_length=32, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["data.json", "tokenizer", "train", "validation"]
    prepare([text], out, vocab_size=330, train_bpe=True, sequence_length=32, overwrite=True)
    assert load_tokenizer(out).vocab_size == 330
    prepare([text], out, vocab_size=330, sequence_length=32, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["data.json", "tokenizer.model", "train", "validation"]


@pytest.mark.parametrize("name", NAMES)
def test_an_altered_file_of_a_data_sets_tokenizer_is_refused(name: str, shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    with (copy / "tokenizer" / name).open("ab") as file:
        file.write(b" ")
    config = DataConfig.model_validate({"sources": [{"path": copy}], "sequence_length": 32})
    with pytest.raises(MegaloopError, match=rf"tokenizer/{name} was altered"):
        open_sources(config)
    (copy / "tokenizer" / name).unlink()
    with pytest.raises(MegaloopError, match=rf"tokenizer/{name} is missing"):
        open_sources(config)


def test_a_file_that_joins_a_tokenizer_is_refused(shards: Path, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    (copy / "tokenizer" / "special_tokens_map.json").write_text("{}")
    with pytest.raises(
        MegaloopError, match=r"special_tokens_map.json lies with the tokenizer, but prep did not write it"
    ):
        DataSet.open(copy).open_tokenizer()
    step = shutil.copytree(resolve_checkpoint(run), tmp_path / "step-00000020")
    (step / "tokenizer" / "special_tokens_map.json").write_text("{}")
    with (
        Checkpoint.open(step) as checkpoint,
        pytest.raises(DamagedCheckpoint, match="was not saved with it; remove it"),
    ):
        checkpoint.open_tokenizer("a test asks")


@pytest.mark.parametrize("name", NAMES)
def test_an_altered_file_of_a_checkpoints_tokenizer_is_refused(name: str, run: Path, tmp_path: Path) -> None:
    step = shutil.copytree(resolve_checkpoint(run), tmp_path / "step-00000020")
    content = bytearray((step / "tokenizer" / name).read_bytes())
    content[-1] ^= 1
    (step / "tokenizer" / name).write_bytes(content)
    with Checkpoint.open(step) as checkpoint, pytest.raises(DamagedCheckpoint, match=rf"tokenizer/{name} is altered"):
        checkpoint.open_tokenizer("a test asks")


def test_a_checkpoint_an_export_and_an_import_hold_the_very_files(
    run: Path, model_directory: Path, tmp_path: Path
) -> None:
    assert _files(resolve_checkpoint(run) / "tokenizer") == _files(model_directory)
    grow_checkpoint(run, tmp_path / "grown", "lidas", DepthSpec.parse("5"), 2)
    for number, source in enumerate((run, tmp_path / "grown")):
        export_huggingface(source, tmp_path / f"out{number}")
        assert _files(tmp_path / f"out{number}") == _files(model_directory)
        import_huggingface(tmp_path / f"out{number}", tmp_path / f"step{number}")
        assert _files(tmp_path / f"step{number}" / "tokenizer") == _files(model_directory)


def test_a_sentencepiece_model_survives_an_export(text: Path, tmp_path: Path) -> None:
    """The tokenizer.json of an export is made from the model beside it, which comes back as what it was."""
    prepare([text], tmp_path / "data", vocab_size=330, sequence_length=32)
    run_ranks(1, train, configuration(tmp_path / "data", tmp_path / "run", train__steps=1))
    export_huggingface(tmp_path / "run", tmp_path / "out")
    import_huggingface(tmp_path / "out", tmp_path / "step")
    assert (tmp_path / "step" / "tokenizer.model").read_bytes() == (tmp_path / "data" / "tokenizer.model").read_bytes()
    assert not (tmp_path / "step" / "tokenizer").exists()


def test_greedy_text_is_that_of_transformers(run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_huggingface(run, tmp_path / "out")
    theirs, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    for prompt in ("The king said", "<|im_start|>user\nThe lord"):
        ids = tokenizer(prompt, return_tensors="pt")
        expected = theirs.generate(**ids, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
        found = generate_text(run, prompt, Generation(20, Sampling()))
        assert found.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_questions_and_held_out_text(run: Path, shards: Path) -> None:
    records = evaluate(run, tasks=["addition", "validation"], data=[shards], examples=25)
    assert {record.subject.task for record in records} == {"addition", "validation"}
    held_out = next(record for record in records if record.subject.task == "validation")
    assert held_out.values["bits_per_byte"] > 0


def test_fine_tuning_takes_the_tokenizer_of_its_beginning(run: Path, tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"<|im_start|>user {number}<|im_end|>", "answer": f" the king {number}"} for number in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    values = configuration(tmp_path / "pairs.jsonl", tmp_path / "tuned", train__steps=3)
    values["data"] |= {"format": "sft", "validation_fraction": 0.1}
    run_ranks(1, train, values | {"init": str(run)})
    assert len(losses(tmp_path / "tuned")) == 3
    assert _files(resolve_checkpoint(tmp_path / "tuned") / "tokenizer") == _files(resolve_checkpoint(run) / "tokenizer")
    tokenizer = load_tokenizer(resolve_checkpoint(run))
    config = DataConfig.model_validate(values["data"] | {"tokenizer": tokenizer.path})
    tokens = open_sources(config).datasets[0].split("train").sample(0).tokens
    chat = tokenizer.encode_prompt("<|im_start|>")
    assert (
        tokens[1 : 1 + len(chat)].tolist() == chat
    )  # after the end that every sample begins with; of a chat's prompt, special tokens are special
    assert torch.tensor(tokens.astype(int)).max() < tokenizer.vocab_size


def test_a_run_does_not_begin_with_a_model_of_another_tokenizer(run: Path, text: Path, tmp_path: Path) -> None:
    prepare([text], tmp_path / "other", vocab_size=330, sequence_length=32)
    values = configuration(tmp_path / "other", tmp_path / "new", train__steps=3)
    values["model"]["vocab_size"] = 384
    checksums = [
        DataSet.open(tmp_path / "other").tokenizer_sha256[:12],
        file_sha256(resolve_checkpoint(run) / "tokenizer" / "tokenizer.json")[:12],
    ]
    with pytest.raises(RankError, match=rf"has another tokenizer .*{checksums[0]}.*{checksums[1]}"):
        run_ranks(1, train, values | {"init": str(run)})


def test_the_tokenizer_of_a_data_set_is_the_one_that_it_names(
    model_directory: Path, text: Path, tmp_path: Path
) -> None:
    """Whatever a prep that was killed left beside it."""
    prepare([text], tmp_path / "data", vocab_size=330, sequence_length=32)
    shutil.copytree(model_directory, tmp_path / "data" / "tokenizer")
    prepare([text], tmp_path / "new", tokenizer=tmp_path / "data", sequence_length=32)
    assert DataSet.open(tmp_path / "new").tokenizer_sha256 == DataSet.open(tmp_path / "data").tokenizer_sha256


def test_a_pipe_in_the_place_of_a_tokenizer_is_not_waited_for(shards: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(shards, tmp_path / "copy")
    (copy / "tokenizer" / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer" / "tokenizer.json")
    with pytest.raises(MegaloopError, match=r"tokenizer/tokenizer.json is missing"):
        DataSet.open(copy).open_tokenizer()
