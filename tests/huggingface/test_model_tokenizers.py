"""The tokenizer that comes with a model: that of a GGUF as its own rules say, and none that is not the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.tokenizer import train_byte_level, train_sentencepiece
from megaloop.errors import MegaloopError
from megaloop.huggingface.gguf_tokenizer import write_gguf_tokenizer
from megaloop.huggingface.tokenizer import find_model_tokenizer
from megaloop.tokenizer import load_tokenizer
from tests.data.corpus import documents
from tests.tokenizer.nasty import nasty_texts


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a GGUF says of a byte-level BPE with special and added tokens."""
    trained = json.loads(train_byte_level(documents(120), 340, tmp_path_factory.mktemp("bpe")).read_bytes())["model"]
    tokens = [*sorted(trained["vocab"], key=trained["vocab"].__getitem__), "<|im_start|>", "<|im_end|>", "-----"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, *[1] * (len(tokens) - 4), 3, 3, 4],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in trained["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens) - 3,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


def _written(metadata: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = write_gguf_tokenizer(Path("m.gguf"), metadata, folder)
    assert path is not None
    return path


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe"])
@pytest.mark.parametrize("add_bos", [False, True, None])
def test_transformers_opens_what_is_written_and_gives_the_same_ids(
    metadata: dict[str, Any], pre: str, add_bos: bool | None, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    values = metadata | {"tokenizer.ggml.pre": pre}
    if add_bos is None:
        add_bos = pre == "llama-bpe"  # where the file does not say, llama.cpp adds it for Llama 3 alone
    else:
        values["tokenizer.ggml.add_bos_token"] = add_bos
    ours = load_tokenizer(_written(values, tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in nasty_texts(300):
        assert ours.encode_prompt(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.prefix_ids == ((ours.bos_id,) if add_bos else ())
    assert theirs.chat_template == "{{ messages }}"


def test_text_is_split_as_the_file_says(metadata: dict[str, Any], tmp_path: Path) -> None:
    """Digits, of which the vocabulary gets a pair: alone in SmolLM's, up to three in Llama 3's, as many as there are in GPT-2's."""
    tokens = [*metadata["tokenizer.ggml.tokens"], "12", "1212"]
    merges = [*metadata["tokenizer.ggml.merges"], "1 2", "12 12"]
    kinds = [*metadata["tokenizer.ggml.token_type"], 1, 1]
    changed = {"tokens": tokens, "merges": merges, "token_type": kinds}
    values = metadata | {f"tokenizer.ggml.{name}": value for name, value in changed.items()}
    counts = {
        pre: len(load_tokenizer(_written(values | {"tokenizer.ggml.pre": pre}, tmp_path / pre)).encode("1212"))
        for pre in ("smollm", "gpt-2", "llama-bpe")
    }
    assert counts == {"smollm": 4, "gpt-2": 1, "llama-bpe": 3}


def test_a_gguf_without_tokenizer_has_none(tmp_path: Path) -> None:
    assert write_gguf_tokenizer(Path("m.gguf"), {}, tmp_path) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, r"tokenizer.ggml.model 'llama'; expected gpt2"),
        ({"tokenizer.ggml.model": 5}, r"tokenizer.ggml.model '5'; expected gpt2"),
        (
            {"tokenizer.ggml.pre": "deepseek-llm"},
            r"tokenizer.ggml.pre 'deepseek-llm'; expected smollm, gpt-2, llama-bpe, llama3, llama-v3",
        ),
        ({"tokenizer.ggml.pre": None}, r"tokenizer.ggml.pre 'None'; expected smollm"),
        ({"tokenizer.ggml.tokens": None}, "no list of texts as tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "no list of texts as tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "2 tokens; expected them to be unique"),
        ({"tokenizer.ggml.tokens": []}, "0 tokens; expected them to be unique"),
        ({"tokenizer.ggml.merges": ["no such pair"]}, "merges that do not fit its tokens"),
        ({"tokenizer.ggml.merges": ["\u4f60 \u597d"]}, "merges that do not fit its tokens"),
        ({"tokenizer.ggml.merges": None}, "no list of texts as tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": "x" * 10}, "token_type"),
        ({"tokenizer.ggml.token_type": 5}, "token_type"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type is no list of"),
        ({"tokenizer.ggml.eos_token_id": 10**9}, r"tokenizer.ggml.eos_token_id 1000000000, and \d+ tokens"),
        ({"tokenizer.ggml.eos_token_id": "1"}, r"tokenizer.ggml.eos_token_id 1, and \d+ tokens"),
    ],
)
def test_a_tokenizer_that_makes_no_sense_is_refused_in_one_line(
    metadata: dict[str, Any], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MegaloopError, match=rf"m.gguf: its tokenizer cannot be read: .*{message}.*--without-tokenizer"):
        write_gguf_tokenizer(Path("m.gguf"), metadata | changed, tmp_path)


@pytest.mark.parametrize("rows", [340, 341, 1024])
def test_a_tokenizer_of_as_many_tokens_as_the_model_has_rows_or_some_fewer(rows: int, tmp_path: Path) -> None:
    path = train_byte_level(documents(120), 340, tmp_path)
    assert find_model_tokenizer(tmp_path, rows) == path


@pytest.mark.parametrize("rows", [339, 1025, 49_152])
def test_a_tokenizer_that_is_not_the_models_is_refused(rows: int, tmp_path: Path) -> None:
    train_byte_level(documents(120), 340, tmp_path)
    with pytest.raises(MegaloopError, match=rf"has 340 tokens and the model {rows} rows .*--without-tokenizer"):
        find_model_tokenizer(tmp_path, rows)


def test_a_damaged_tokenizer_of_a_model_is_refused(tmp_path: Path) -> None:
    path = train_byte_level(documents(120), 340, tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MegaloopError, match=r"damaged, or no tokenizer.json"):
        find_model_tokenizer(tmp_path, 340)


def test_a_model_with_a_sentencepiece_model_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(documents(120), 340))
    assert find_model_tokenizer(tmp_path, 340) == tmp_path / "tokenizer.model"
    assert find_model_tokenizer(tmp_path / "tokenizer.model", 340) == tmp_path / "tokenizer.model"


@pytest.mark.parametrize(
    "settings",
    [{"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, {"additional_special_tokens": ["the"]}],
    ids=str,
)
def test_settings_that_make_transformers_give_other_ids_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    path = train_byte_level(documents(120), 340, tmp_path)
    made = json.loads(path.read_bytes())
    path.write_text(json.dumps(made | {"pre_tokenizer": made["pre_tokenizer"]["pretokenizers"][1]}))
    assert find_model_tokenizer(tmp_path, 340) == path
    values = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values | settings))
    with pytest.raises(MegaloopError, match=r"of transformers gives .* other tokens than the file alone does"):
        find_model_tokenizer(tmp_path, 340)
