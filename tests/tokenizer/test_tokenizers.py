"""Both kinds of tokenizers: what they give is what their libraries and transformers give, and no file fools them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from data_prep.tokenizer import END_OF_TEXT, train_byte_level, train_sentencepiece
from megaloop.errors import MegaloopError
from megaloop.tokenizer import Tokenizer, copy_tokenizer, find_tokenizer, load_tokenizer, tokenizer_files
from tests.data.corpus import documents
from tests.tokenizer.nasty import nasty_texts

TEXTS = [*documents(120), "café naïve 你好 1234567890 {}[]<>|_\n\t!?"]
NASTY = nasty_texts(2000)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(train_byte_level(TEXTS, 350, tmp_path_factory.mktemp("bpe")))


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    path.write_bytes(train_sentencepiece(TEXTS, 350))
    return load_tokenizer(path)


@pytest.fixture(params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def chat_tokenizer(folder: Path, **settings: Any) -> Path:
    """A tokenizer with what those of chat models have: a beginning, special tokens, added text, settings, a template."""
    path = train_byte_level(TEXTS, 350, folder)
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_special_tokens(["<|begin_of_text|>", "<|im_start|>", "<|im_end|>"])
    library.add_tokens(["-----"])
    begin = library.token_to_id("<|begin_of_text|>")
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    library.enable_truncation(7)  # as some files were saved; of no concern to us
    library.save(str(path))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": {"content": "<|begin_of_text|>", "__type": "AddedToken"},
        "eos_token": "<|im_end|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values | settings))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return path


def _is_lost(tokenizer: Tokenizer, text: str) -> bool:
    """sentencepiece has a character of its own for a space, and ends a text at a NUL."""
    return tokenizer.path.suffix == ".model" and ("\x00" in text or "\u2581" in text)


def test_text_comes_back_whole(tokenizer: Tokenizer) -> None:
    for text in NASTY:
        if not _is_lost(tokenizer, text):
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_gives_what_single_texts_give(tokenizer: Tokenizer) -> None:
    batch = tokenizer.encode_batch(NASTY)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in NASTY]


def test_a_document_cannot_end_itself(tokenizer: Tokenizer) -> None:
    for text in (END_OF_TEXT, "</s>", f"a{END_OF_TEXT}b", "<s>"):
        assert not {tokenizer.eos_id, tokenizer.bos_id} & set(tokenizer.encode(text))


def test_bytes_of_tokens_add_up_to_those_of_the_text(tokenizer: Tokenizer) -> None:
    sizes = tokenizer.token_bytes()
    assert sizes[tokenizer.eos_id] == 0
    for text in NASTY:
        if not _is_lost(tokenizer, text):
            assert sizes[np.array(tokenizer.encode(text), dtype=int)].sum() == len(text.encode())


def test_ids_of_prompts_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = load_tokenizer(chat_tokenizer(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in NASTY:
        assert ours.encode_prompt(text) == theirs(text).input_ids
        assert ours.encode(text) == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert ours.prefix_ids == (theirs.bos_token_id,) == (ours.bos_id,)
    assert ours.eos_id == theirs.eos_token_id
    assert ours.decode(ours.encode_prompt("a <|im_end|>b")) == "a b"


def test_special_tokens_are_named_where_older_models_name_them(tmp_path: Path) -> None:
    path = chat_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "special_tokens_map.json")
    assert load_tokenizer(path).eos_id == load_tokenizer(path).encode_prompt("<|im_end|>")[1]


def test_a_lone_file_ends_as_published_models_do(byte_level: Tokenizer, tmp_path: Path) -> None:
    alone = tmp_path / "some_name.json"
    alone.write_bytes(byte_level.path.read_bytes())
    assert load_tokenizer(alone).eos_id == byte_level.eos_id == 0


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer/tokenizer.json", "tokenizer.model"])
def test_a_directory_is_searched(name: str, byte_level: Tokenizer, sentencepiece: Tokenizer, tmp_path: Path) -> None:
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    place.write_bytes((sentencepiece if name.endswith("model") else byte_level).path.read_bytes())
    assert find_tokenizer(tmp_path) == place
    assert load_tokenizer(tmp_path).path == place


def test_all_files_are_copied_byte_by_byte(tmp_path: Path) -> None:
    path = chat_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a file of the tokenizer")
    (tmp_path / "tokenizer.model").write_bytes(
        b"GGUF: transformers saves the file that a tokenizer came from under this name"
    )
    (tmp_path / "out").mkdir()
    copies = copy_tokenizer(path, tmp_path / "out")
    assert [copy.name for copy in copies] == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert all(copy.parent == tmp_path / "out" / "tokenizer" for copy in copies)
    assert [copy.read_bytes() for copy in copies] == [file.read_bytes() for file in tokenizer_files(path)]


# --- training


def test_training_does_not_depend_on_threads(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from data_prep.tokenizer import train_byte_level; from tests.data.corpus import documents;"
        "train_byte_level(documents(400), 345, Path(sys.argv[1]))"
    )
    found = set()
    for number, parallel in enumerate(("true", "false", "true")):
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            check=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": parallel},
        )
        found.add((folder / "tokenizer.json").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (256, "smaller than 256 bytes and .* need; use 257 or more"),
        (10**6, r"larger than the text supports; use \d+ or less"),
    ],
)
def test_a_vocabulary_that_cannot_be_trained(size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(MegaloopError, match=message):
        train_byte_level(TEXTS, size, tmp_path)


def test_the_largest_vocabulary_that_is_named_can_be_trained(tmp_path: Path) -> None:
    with pytest.raises(MegaloopError) as caught:
        train_byte_level(TEXTS, 10**6, tmp_path)
    largest = int(str(caught.value).split("use ")[1].split()[0])
    assert load_tokenizer(train_byte_level(TEXTS, largest, tmp_path)).vocab_size == largest


def test_digits_stand_alone(byte_level: Tokenizer) -> None:
    assert len(byte_level.encode("2024")) == 4


# --- files that are damaged or lie


def _damaged(path: Path) -> dict[str, bytes]:
    whole = path.read_bytes()
    values = json.loads(whole)
    far = json.loads(whole)
    far["model"]["vocab"]["far"] = 2**32 - 1
    unknown = values | {"model": values["model"] | {"type": "Other"}}
    merges = values | {"model": values["model"] | {"merges": [["no", "such"]]}}
    return {
        "nothing": b"",
        "no JSON": b"{" * 40,
        "truncated": whole[: len(whole) // 2],
        "not UTF-8": whole[:-1] + b"\xff}",
        "another object": b"{}",
        "a list": b"[1, 2]",
        "deep": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "far": json.dumps(far).encode(),
        "unknown": json.dumps(unknown).encode(),
        "merges": json.dumps(merges).encode(),
        "no tokens": json.dumps(
            values | {"added_tokens": [], "model": values["model"] | {"vocab": {}, "merges": []}}
        ).encode(),
    }


@pytest.mark.parametrize("how", ["nothing", "no JSON", "truncated", "not UTF-8", "another object", "a list", "deep", "far", "unknown", "merges", "no tokens"])  # fmt: skip
def test_a_damaged_tokenizer_json_is_refused_in_one_line(how: str, byte_level: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(_damaged(byte_level.path)[how])
    with pytest.raises(MegaloopError, match=str(path)) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_any_flipped_byte_gives_a_tokenizer_or_one_line(byte_level: Tokenizer, tmp_path: Path) -> None:
    path, whole = tmp_path / "tokenizer.json", byte_level.path.read_bytes()
    chance = np.random.default_rng(0)
    for _ in range(300):
        altered = bytearray(whole)
        altered[chance.integers(len(whole))] = chance.integers(256)
        path.write_bytes(altered)
        with contextlib.suppress(MegaloopError):
            load_tokenizer(path).encode_prompt("The king said 12")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "tokenizer_config.json: cannot be read as JSON"),
        (b"[" * 100_000, "tokenizer_config.json: cannot be read as JSON"),
        (b"[]", "tokenizer_config.json: expected a JSON object"),
        (b'{"eos_token": "<|nowhere|>"}', r"eos_token <\|nowhere\|> in tokenizer_config.json is none of its tokens"),
        (b'{"eos_token": 5}', "eos_token 5 in tokenizer_config.json is none of its tokens"),
    ],
)
def test_damaged_settings_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = chat_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(MegaloopError, match=message):
        load_tokenizer(path)


def test_what_is_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(MegaloopError, match=r"neither tokenizer.json nor tokenizer.model is in that directory"):
        load_tokenizer(tmp_path)
    with pytest.raises(MegaloopError, match=r"no such file; expected a sentencepiece model or a tokenizer.json"):
        load_tokenizer(tmp_path / "missing.model")
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    with pytest.raises(MegaloopError, match=r"neither a sentencepiece model nor a tokenizer.json"):
        load_tokenizer(tmp_path / "noise")


def _altered(path: Path, change: Any) -> Path:
    values = json.loads(path.read_bytes())
    change(values)
    path.write_text(json.dumps(values))
    return path


def test_a_prefix_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["post_processor"]["special_tokens"]["<|begin_of_text|>"]["ids"] = [5000]

    path = chat_tokenizer(tmp_path)
    with pytest.raises(MegaloopError, match="its post-processor does more than to put a few of its tokens"):
        load_tokenizer(_altered(path, change))


def test_noise_of_training_does_not_reach_the_tokens(byte_level: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(byte_level.path.read_bytes())
    noisy = load_tokenizer(_altered(tmp_path / "tokenizer.json", lambda values: values["model"].update(dropout=0.5)))
    for text in NASTY[:200]:
        assert noisy.encode(text) == byte_level.encode(text)
        assert noisy.encode_prompt(text) == byte_level.encode_prompt(text)


def test_a_text_that_a_tokenizer_cannot_encode_is_one_line(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="[UNK]"))
    library.save(str(tmp_path / "tokenizer.json"))
    for encode in ("encode", "encode_prompt"):
        with pytest.raises(MegaloopError, match="it cannot encode a text"):
            getattr(load_tokenizer(tmp_path), encode)("b")


def test_holes_in_a_vocabulary_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def change(values: dict[str, Any]) -> None:
        values["model"]["vocab"]["far"] = 9000

    sparse = load_tokenizer(_altered(chat_tokenizer(tmp_path), change))
    capfd.readouterr()
    sparse.encode("a")
    assert len(sparse.token_bytes()) == sparse.vocab_size == 9001
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_what_is_no_file_is_not_waited_for(name: str, tmp_path: Path) -> None:
    path = chat_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(MegaloopError, match="expected a file of at most"):
        load_tokenizer(path)


def test_half_a_character_names_no_token(tmp_path: Path) -> None:
    path = chat_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    with pytest.raises(MegaloopError, match="is none of its tokens"):
        load_tokenizer(path)


@pytest.mark.parametrize("adds", [True, False, None])
def test_transformers_class_for_llama_decides_what_begins_a_text(adds: bool | None, tmp_path: Path) -> None:
    """Whatever the post-processor in the file does."""
    from transformers import AutoTokenizer

    settings = {"tokenizer_class": "LlamaTokenizerFast"} | ({} if adds is None else {"add_bos_token": adds})
    path = chat_tokenizer(tmp_path, **settings)
    for post_processor in (True, False):
        if not post_processor:
            _altered(path, lambda values: values.update(post_processor=None))
        ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(tmp_path)
        assert ours.prefix_ids == (() if adds is False else (ours.bos_id,))
        for text in NASTY[:200]:
            if "<unk>" not in text:  # a token that the class adds, though the vocabulary has none
                assert ours.encode_prompt(text) == theirs(text).input_ids
