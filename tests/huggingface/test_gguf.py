"""A Llama in a GGUF file comes in with the very weights that transformers reads from it."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from megaloop.checkpoint import Checkpoint
from megaloop.errors import MegaloopError
from megaloop.huggingface.gguf import gguf_metadata
from megaloop.huggingface.gguf_header import QUANTISATIONS
from megaloop.huggingface.llama import tensor_names
from megaloop.huggingface.weights import import_huggingface
from megaloop.inference.load import load_decoder
from megaloop.tokenizer import load_tokenizer
from tests.huggingface.gguf_files import random_llama, settings_of, tensors_of, write_gguf


def _write(path: Path, quantisation: str = "F32", drop: str = "", **changes: Any) -> tuple[Any, Path]:
    """A random Llama and its file; ``changes`` of its settings, or (fields of transformers') of the model."""
    settings = {key: changes.pop(key) for key in [*changes] if "." in key}
    model = random_llama(**changes)
    tensors = {name: values for name, values in tensors_of(model).items() if name != drop}
    return model, write_gguf(path, settings_of(model.config) | settings, tensors, quantisation)


@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_weights_are_those_of_transformers_bit_by_bit(tmp_path: Path, quantisation: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    _, path = _write(tmp_path / "model.gguf", quantisation, tie_word_embeddings=tied)
    assert import_huggingface(tmp_path, tmp_path / "ours").dtype == "fp32"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    expected = theirs.state_dict()
    with Checkpoint.open(tmp_path / "ours", verify="checksums") as checkpoint:
        manifest = checkpoint.manifest
        assert manifest.model.tied_embeddings == tied
        for name, ours in tensor_names(manifest.plan.calls(), tied):
            assert torch.equal(checkpoint.read("model", ours), expected[name]), name
            assert torch.equal(checkpoint.read("master", ours), expected[name]), name


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({"head_dim": 24}, {}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, {"llama.rope.scaling.factor": 4.0}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        ),
        ({}, {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_model_that_was_converted(
    tmp_path: Path, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    model, path = _write(tmp_path / "model.gguf", **changes, **settings)
    import_huggingface(path, tmp_path / "ours")
    ours, checkpoint = load_decoder(tmp_path / "ours")
    tokens = torch.randint(0, 128, (2, 100), generator=torch.Generator().manual_seed(0))
    expected = model(tokens).logits
    assert (ours(tokens) - expected).abs().max() < 1e-5 * expected.abs().max()
    found = checkpoint.manifest.model
    assert (found.norm_eps, found.rope_theta) == (1e-5, 50_000.0)  # the decimals that were meant
    assert checkpoint.manifest.data.sequence_length == 256


def _divisors(theta: float, head_dim: int, factor: float, high: float = 4.0) -> np.ndarray[Any, Any]:
    """``rope_freqs.weight``, as LlamaModel.generate_extra_tensors of convert_hf_to_gguf.py computes it."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    found: list[float] = []
    for frequency in frequencies:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / high:
            found.append(1)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (high - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32).numpy()


@pytest.mark.parametrize(("theta", "head_dim", "factor"), [(50_000.0, 16, 8.0), (500_000.0, 128, 32.0)])
def test_the_divisors_of_llama_3_become_its_scaling(tmp_path: Path, theta: float, head_dim: int, factor: float) -> None:
    model = random_llama(rope_theta=theta, head_dim=head_dim)
    settings, tensors = settings_of(model.config), tensors_of(model)
    for number, values in enumerate([_divisors(theta, head_dim, factor), np.ones(head_dim // 2, dtype=np.float32)]):
        path = write_gguf(tmp_path / f"{number}.gguf", settings, tensors | {"rope_freqs.weight": values})
        import_huggingface(path, tmp_path / f"ours{number}")
    with Checkpoint.open(tmp_path / "ours0") as checkpoint:
        scaling = checkpoint.manifest.model.rope_scaling
    assert scaling is not None
    assert scaling.model_dump() == {
        "kind": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192,
    }  # fmt: skip
    with Checkpoint.open(tmp_path / "ours1") as checkpoint:
        assert checkpoint.manifest.model.rope_scaling is None
    for number, values in enumerate(
        [_divisors(theta, head_dim, factor, 6.0), np.full(head_dim // 2, np.nan, dtype=np.float32)]
    ):
        path = write_gguf(tmp_path / f"bad{number}.gguf", settings, tensors | {"rope_freqs.weight": values})
        with pytest.raises(
            MegaloopError, match=r"rope_freqs.weight scales the rotary embedding otherwise than Llama 3.1"
        ):
            import_huggingface(path, tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture 'qwen2'; only llama can be imported"),
        ({"general.architecture": 3}, "general.architecture 3; only llama"),
        ({"split.count": 2}, "split.count 2; join its parts"),
        ({"llama.expert_count": 8}, "llama.expert_count 8 is not supported; expected 0"),
        ({"llama.attention.sliding_window": 8}, "llama.attention.sliding_window is not known"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn' is not supported"),
        ({"llama.rope.scaling.factor": 0.5}, "not those of a Llama decoder .*factor"),
        ({"llama.rope.scaling.factor": "x"}, "llama.rope.scaling.factor 'x' is not supported; expected a number"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count 8 is not supported; expected 16"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length 8"),
        ({"llama.attention.head_count": [4, 4]}, r"llama.attention.head_count \[4, 4\] is not supported; expected one"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count 0"),
        ({"llama.attention.head_count_kv": 3}, "num_heads 4 is not divisible by model.num_kv_heads 3"),
        ({"llama.block_count": 1}, "unknown tensor blk.1.attn_k.weight"),
        ({"llama.block_count": 3}, "tensor blk.2.attn_norm.weight is missing; the file is not complete"),
        ({"llama.block_count": 4_000_000_000}, "llama.block_count 4000000000 is not supported"),
        ({"llama.embedding_length": 32}, "32"),
        ({"llama.feed_forward_length": 128}, r"ffn_gate.weight is \(96, 64\), its settings make it \(128, 64\)"),
        ({"llama.vocab_size": 256}, r"token_embd.weight is \(128, 64\), its settings make it \(256, 64\)"),
        ({"llama.rope.freq_base": float("inf")}, "not those of a Llama decoder"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "not those of a Llama decoder"),
    ],
)  # fmt: skip
def test_what_the_decoder_lacks_is_refused_by_name(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    _, path = _write(tmp_path / "model.gguf", **settings)
    with pytest.raises(MegaloopError, match=message) as error:
        import_huggingface(path, tmp_path / "ours")
    assert str(error.value).startswith(str(path))
    assert [*tmp_path.iterdir()] == [path]


def test_tensors_that_do_not_belong_or_lack_are_named(tmp_path: Path) -> None:
    model = random_llama()
    settings, tensors = settings_of(model.config), tensors_of(model)
    for number, (change, message) in enumerate(
        [
            ({"blk.0.attn_q.bias": np.zeros(64, dtype=np.float32)}, "unknown tensor blk.0.attn_q.bias"),
            ({"output_norm.weight": np.full(64, np.nan, dtype=np.float32)}, "output_norm.weight holds NaN or infinity"),
        ]
    ):
        path = write_gguf(tmp_path / f"{number}.gguf", settings, tensors | change)
        with pytest.raises(MegaloopError, match=message):
            import_huggingface(path, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
    _, path = _write(tmp_path / "model.gguf", drop="token_embd.weight")
    with pytest.raises(MegaloopError, match=r"tensor token_embd.weight is missing"):
        import_huggingface(path, tmp_path / "ours")


def test_a_quantisation_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    _, path = _write(tmp_path / "model.gguf", "F16")
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    for kind, message in [
        (25, "has the quantisation I16, which cannot be read"),
        (77, "has the quantisation of number 77"),
    ]:
        data[at : at + 4] = kind.to_bytes(4, "little")
        path.write_bytes(data)
        with pytest.raises(MegaloopError, match=f"tensor blk.0.attn_q.weight {message}"):
            import_huggingface(path, tmp_path / "ours")


def test_sizes_of_quantisations_are_those_of_the_package() -> None:
    known = {kind.value: (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: known[kind] for kind in QUANTISATIONS} == QUANTISATIONS


def test_which_file_a_directory_means(tmp_path: Path) -> None:
    _write(tmp_path / "one.gguf")
    (tmp_path / "two.gguf").write_bytes((tmp_path / "one.gguf").read_bytes())
    with pytest.raises(MegaloopError, match=r"2 GGUF files and no config.json; name the file to read"):
        import_huggingface(tmp_path, tmp_path / "ours")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MegaloopError, match="model_type None"):
        import_huggingface(tmp_path, tmp_path / "ours")
    import_huggingface(tmp_path / "two.gguf", tmp_path / "ours")


def test_without_the_package_it_is_said_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = _write(tmp_path / "model.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MegaloopError, match=r"needs gguf .*; pip install 'megaloop\[gguf\]'"):
        import_huggingface(path, tmp_path / "ours")
    assert gguf_metadata(path)["tokenizer.ggml.tokens"] == ["a", "b", "\u0120c"]


def test_metadata_of_every_type_is_read(tmp_path: Path) -> None:
    values = {"a": True, "b": 7, "c": 0.5, "d": "\u65e5", "e": [True, False], "f": [["x"], []], "g": [1, 2]}
    path = write_gguf(tmp_path / "x.gguf", values, {}, version=2)
    assert gguf_metadata(path) == values
    numbers = {"B": 0, "b": 1, "H": 2, "h": 3, "Q": 10, "q": 11, "d": 12}
    more = {code: struct.pack(f"<I{code}", kind, 3) for code, kind in numbers.items()}
    assert gguf_metadata(write_gguf(tmp_path / "y.gguf", more, {})) == dict.fromkeys(numbers, 3)


def test_the_tokenizer_in_it_comes_along_unless_another_is_named(tmp_path: Path) -> None:
    letters = [chr(code) for code in range(33, 127)]
    words = [*letters, *(f"{one}{two}" for one in "abcde" for two in "abcdef")]
    kinds: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": words,
             "tokenizer.ggml.merges": [f"{one} {two}" for one in "abcde" for two in "abcdef"]}  # fmt: skip
    _, path = _write(tmp_path / "model.gguf", **kinds)
    import_huggingface(path, tmp_path / "own")
    assert load_tokenizer(tmp_path / "own").encode("abba") == [words.index("ab"), words.index("ba")]
    import_huggingface(path, tmp_path / "none", without_tokenizer=True)
    with Checkpoint.open(tmp_path / "none") as checkpoint:
        assert checkpoint.manifest.tokenizer is None
    import_huggingface(path, tmp_path / "named", tokenizer=tmp_path / "own")
    assert load_tokenizer(tmp_path / "named").encode("abba") == load_tokenizer(tmp_path / "own").encode("abba")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MegaloopError, match="no tokenizer there"):
        import_huggingface(path, tmp_path / "other", tokenizer=tmp_path / "empty")
    _, path = _write(tmp_path / "other.gguf", **kinds | {"tokenizer.ggml.pre": "magic"})
    with pytest.raises(MegaloopError, match=r"tokenizer.ggml.pre 'magic'; .*--without-tokenizer"):
        import_huggingface(path, tmp_path / "other")
