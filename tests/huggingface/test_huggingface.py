"""Weights, logits, gradients and token ids survive the way to Hugging Face and back."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any, Literal

import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data_prep.tokenizer import train_sentencepiece
from megaloop.checkpoint import Checkpoint, CheckpointInfo, RunState, save_checkpoint
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, LoopStyle, with_inference_loop
from megaloop.errors import MegaloopError
from megaloop.huggingface.tokenizer import export_tokenizer
from megaloop.huggingface.weights import export_huggingface, import_huggingface
from megaloop.inference.load import load_decoder
from megaloop.inference.setting import Setting
from megaloop.layout.pieces import Box, Piece, StatePiece
from megaloop.layout.topology import Topology
from megaloop.model import initial_values, parameter_specs, vocab_parallel_cross_entropy

SHAPE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "rms_norm_eps": 1e-5,
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A random Llama of transformers, and the directory that it was saved to."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=request.param))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # not ones, so that a norm that gets lost shows
                parameter.normal_(1.0, 0.1)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


def _tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2, 20), generator=torch.Generator().manual_seed(0))


def test_an_imported_llama_gives_its_logits_loss_and_gradients(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    model, directory = theirs
    import_huggingface(directory, tmp_path / "ours")
    ours, _ = load_decoder(tmp_path / "ours")
    tokens = _tokens()
    expected = model(tokens, labels=tokens)
    logits = ours(tokens)
    assert torch.allclose(logits, expected.logits, atol=1e-4)
    loss = vocab_parallel_cross_entropy(logits[:, :-1], tokens[:, 1:], ours.tp)
    assert float(loss.detach()) == pytest.approx(float(expected.loss.detach()), rel=1e-6)
    loss.backward()
    expected.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    pairs = [
        ("embedding.weight", model.model.embed_tokens.weight),
        ("layers.1.attention.wk.weight", model.model.layers[1].self_attn.k_proj.weight),
        ("layers.0.attention_norm.weight", model.model.layers[0].input_layernorm.weight),
        ("layers.2.mlp.w_down.weight", model.model.layers[2].mlp.down_proj.weight),
        ("norm.weight", model.model.norm.weight),
    ]
    for name, other in pairs:
        mine = gradients[name]
        assert mine is not None
        assert torch.allclose(mine, other.grad, atol=1e-6, rtol=1e-4), name


def test_export_gives_back_what_import_read(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, directory = theirs
    import_huggingface(directory, tmp_path / "ours")
    export_huggingface(tmp_path / "ours", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    expected, found = model.state_dict(), back.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(model(_tokens()).logits, back(_tokens()).logits)


def test_a_large_model_is_exported_in_several_files(
    theirs: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    model, directory = theirs
    monkeypatch.setattr("megaloop.huggingface.files.FILE_BYTES", 40_000)
    import_huggingface(directory, tmp_path / "ours")
    assert export_huggingface(tmp_path / "ours", tmp_path / "back").files > 2
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(model(_tokens()).logits, back(_tokens()).logits)
    import_huggingface(tmp_path / "back", tmp_path / "again")
    assert Checkpoint.open(tmp_path / "again").names("model") == Checkpoint.open(tmp_path / "ours").names("model")


def _checkpoint(
    directory: Path,
    depth: str,
    tokenizer: Path | None = None,
    vocab_size: int = 128,
    style: LoopStyle = LoopStyle(),
    **changes: Any,
) -> Path:
    """A checkpoint of initial values; ``changes`` are of the model."""
    model = ModelConfig(hidden_size=48, num_heads=6, num_kv_heads=2, ffn_size=80, vocab_size=vocab_size, **changes)
    plan = DepthPlan(DepthPlan.parse(depth).order, style=style)
    pieces = []
    for name, spec in parameter_specs(model, plan, vocab_size).items():
        piece = Piece(name, spec.shape, Box.whole(spec.shape))
        values = initial_values(name, spec, 0, piece.box.offset, piece.box.shape)
        if "norm" in name:  # not all ones
            values = values + 0.1 * torch.arange(values.numel()).sin()
        pieces += [StatePiece("model", piece, values.bfloat16()), StatePiece("master", piece, values)]
    info = CheckpointInfo(
        run=RunState.fresh(), plan=plan, model=model,
        topology=Topology(), precision="bf16", config={}, growth=None,
    )  # fmt: skip
    save_checkpoint(directory, pieces, info, tokenizer=tokenizer)
    return directory


@pytest.mark.parametrize(
    ("depth", "style", "layers"),
    [
        (None, LoopStyle(), 8),
        ("1-2x5-1", LoopStyle(), 12),
        ("0-4x2-0", LoopStyle(), 8),
        ("4", LoopStyle(), 4),
        (None, LoopStyle(residual_scale="1/k"), 8),
        ("1-2x5-1", LoopStyle(residual_scale="1/k"), 12),
    ],
)
def test_a_looped_checkpoint_exports_unrolled(tmp_path: Path, depth: str | None, style: LoopStyle, layers: int) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = _checkpoint(tmp_path / "looped", "1-2x3-1", style=style)
    spec = None if depth is None else DepthSpec.parse(depth)
    export_huggingface(checkpoint, tmp_path / "out", dtype="fp32", depth=spec)
    unrolled = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert unrolled.config.num_hidden_layers == layers
    ours, _ = load_decoder(checkpoint)
    calls = None if spec is None else with_inference_loop(ours.plan, spec).calls
    assert torch.allclose(ours(_tokens(), calls=calls), unrolled(_tokens()).logits, atol=1e-4)


@pytest.mark.parametrize("depth", [None, "6", "1-4x2-1"])
@pytest.mark.parametrize("order", ["6", "(0,1,4,5)(2,3)", "1-4x3-1"])
def test_factors_of_scaled_norms_are_folded_into_the_weights(tmp_path: Path, order: str, depth: str | None) -> None:
    """Of a grown order and of loops; what comes back is a plain Llama with the same logits, to the bit."""
    from transformers import AutoModelForCausalLM

    checkpoint = _checkpoint(tmp_path / "scaled", order, norm_scaling=True)
    spec = None if depth is None else DepthSpec.parse(depth)
    export_huggingface(checkpoint, tmp_path / "out", dtype="fp32", depth=spec)
    export_huggingface(checkpoint, tmp_path / "bf16", depth=spec)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, _ = load_decoder(checkpoint)
    calls = None if spec is None else with_inference_loop(ours.plan, spec).calls
    with torch.no_grad():
        logits = ours(_tokens(), calls=calls)
        found = theirs(_tokens()).logits
        assert torch.allclose(logits, found, atol=4e-7, rtol=0)
        dtypes: list[tuple[Literal["fp32", "bf16"], str]] = [("fp32", "out"), ("bf16", "bf16")]
        for dtype, name in dtypes:
            import_huggingface(tmp_path / name, tmp_path / f"{name}-again")
            again, opened = load_decoder(tmp_path / f"{name}-again", precision=dtype)
            mine, _ = load_decoder(checkpoint, precision=dtype)
            assert not opened.manifest.model.norm_scaling
            assert torch.equal(again(_tokens()), mine(_tokens(), calls=calls))


def test_a_loop_that_llama_has_no_place_for_is_not_exported(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "looped", "1-2x3-1", style=LoopStyle(norm=True))
    with pytest.raises(
        MegaloopError, match="its loop has an injection or a norm, which a Llama decoder has no place for"
    ):
        export_huggingface(checkpoint, tmp_path / "out")
    model, _ = load_decoder(_checkpoint(tmp_path / "same", "1-2x3-1", style=LoopStyle(norm=True)))
    with pytest.raises(MegaloopError, match="stays where it is; choose 1-2xTIMES-1"):
        Setting(DepthSpec.parse("4")).passes(model)


def test_bf16_exports_the_training_copy_and_fp32_the_masters(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "step", "1")
    export_huggingface(checkpoint, tmp_path / "bf16")
    export_huggingface(checkpoint, tmp_path / "fp32", dtype="fp32")
    half, full = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "fp32"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert half[name].dtype == torch.bfloat16
    assert full[name].dtype == torch.float32
    assert torch.equal(full[name].bfloat16(), half[name])
    assert not torch.equal(full[name], half[name].float())


TEXTS = [
    "In the beginning God created the heaven and the earth.\nAnd the earth was without form, and void.",
    "  two  spaces   three ", "line\n\nbreaks\r\n\ttabs", "", " ", "caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \u0416 \U0001f600\U0001f468\u200d\U0001f469",
    "\ufb01 ligature e\u0301 combining \u00a0 nbsp", "<s>markup</s> <unk>", "1234567890 12 3", "supercalifragilistic" * 5, "\x00\x7f",
]  # fmt: skip


def test_the_exported_tokenizer_gives_sentencepieces_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "tokenizer.model"
    corpus = [
        f"{text} {word}s the {word}ing of {word}"
        for text in TEXTS[:1]
        for word in ["create", "begin", "earth", "void", "form"]
    ]
    model.write_bytes(train_sentencepiece(corpus * 20, 330))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    rows = processor.get_piece_size()
    export_huggingface(_checkpoint(tmp_path / "step", "1", model, rows), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == processor.encode(text), text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tokenizer with many pieces that can be made in several ways: of sentencepiece, and exported."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    corpus = ["a" * n + " " * m + "ab" * n + " the ease of these" for n in range(20) for m in range(9)]
    (directory / "source.model").write_bytes(train_sentencepiece(corpus, 320))
    export_tokenizer(directory / "source.model", directory, 10_000)
    ours = sentencepiece.SentencePieceProcessor(model_file=str(directory / "source.model"))
    return ours, AutoTokenizer.from_pretrained(directory)


@given(
    st.one_of(st.text(), st.text(alphabet="ab "), st.lists(st.sampled_from(["the", "e", "ea", " ", "▁"])).map("".join))
)
@settings(max_examples=300, deadline=None)
def test_any_text_has_sentencepieces_ids(tokenizers: tuple[Any, Any], text: str) -> None:
    ours, theirs = tokenizers
    assert theirs(text)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; only llama"),
        ({"attention_bias": True}, "attention_bias True in config.json is not supported"),
        ({"mlp_bias": True}, "mlp_bias True"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_scaling of kind 'yarn'.* expected default, linear or llama3",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling \(kind linear\) in config.json lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope_scaling in config.json makes no sense"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1}}, "mscale under rope_scaling"),
        ({"rope_scaling": "llama3"}, "rope_scaling 'llama3' in config.json is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"head_dim": 16}, r"q_proj.weight is \(48, 48\), config.json makes it \(96, 48\)"),
        ({"intermediate_size": 96}, r"is \(80, 48\), config.json makes it \(96, 48\)"),
        ({"num_hidden_layers": 4}, "model.layers.3.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 2}, "unknown tensor model.layers.2"),
        ({"num_hidden_layers": 10**9}, "is not that of a Llama decoder .depth: cannot read"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers and max_position_embeddings are whole numbers"),
        ({"max_position_embeddings": None}, "whole numbers"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            r"rope_parameters \(kind llama3\) in config.json lacks high_freq_factor",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_what_the_decoder_lacks_is_refused_by_name(
    theirs: tuple[Any, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    config = theirs[1] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(MegaloopError, match=message):
        import_huggingface(theirs[1], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 50_000.0, "rope_scaling": None},
        {"rope_theta": 50_000.0, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 50_000.0, "rope_type": "default"}},
    ],
    ids=["theta", "default scaling", "as transformers 5 writes it"],
)
def test_the_rotary_base_is_found_where_each_transformers_keeps_it(
    theirs: tuple[Any, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    config = theirs[1] / "config.json"
    kept = {key: value for key, value in json.loads(config.read_text()).items() if not key.startswith("rope")}
    config.write_text(json.dumps(kept | {key: value for key, value in change.items() if value is not None}))
    import_huggingface(theirs[1], tmp_path / "ours")
    with Checkpoint.open(tmp_path / "ours") as checkpoint:
        assert checkpoint.manifest.model.rope_theta == 50_000.0


def test_quantized_weights_are_refused(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    weights = theirs[1] / "model.safetensors"
    save_file({name: (values * 100).to(torch.int8) for name, values in load_file(weights).items()}, weights)
    with pytest.raises(MegaloopError, match=r"embed_tokens.weight is of dtype I8; expected F32, BF16 or F16"):
        import_huggingface(theirs[1], tmp_path / "ours")


def test_weights_lying_about_are_not_taken_for_the_models(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    model, directory = theirs
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: torch.zeros_like(values) for name, values in tensors.items()}, directory / "old.safetensors")
    save_file({"tok_embeddings.weight": torch.zeros(1)}, directory / "consolidated.00.safetensors")
    import_huggingface(directory, tmp_path / "ours")
    with Checkpoint.open(tmp_path / "ours") as checkpoint:
        assert torch.equal(checkpoint.read("model", "embedding.weight"), model.model.embed_tokens.weight)
    (directory / "consolidated.00.safetensors").unlink()
    weights.rename(directory / "new.safetensors")
    with pytest.raises(MegaloopError, match=r"tensor .* is in several files; remove those that do not belong"):
        import_huggingface(directory, tmp_path / "other")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"model.norm.weight": "model-00002-of-00002.safetensors"}, "model-00002-of-00002.safetensors is missing"),
        ({"model.norm.weight": "../secret.safetensors"}, "does not map tensors to files of the directory"),
        ({"model.norm.weight": 3}, "does not map tensors to files of the directory"),
        ({}, "does not map tensors"),
    ],
)
def test_an_index_that_names_no_files_of_the_directory(
    theirs: tuple[Any, Path], tmp_path: Path, weight_map: dict[str, Any], message: str
) -> None:
    (theirs[1] / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MegaloopError, match=message):
        import_huggingface(theirs[1], tmp_path / "ours")


def test_places_that_cannot_be_written(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    import_huggingface(theirs[1], tmp_path / "ours")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(MegaloopError, match=r"not saved: .*\(rank 0\)"):
        import_huggingface(theirs[1], tmp_path / "file" / "out")
    with pytest.raises(MegaloopError, match=r"file/out cannot be written \(Not a directory\)"):
        export_huggingface(tmp_path / "ours", tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "ours", "theirs"]


def test_a_disk_that_is_full_gets_no_half_an_export(theirs: tuple[Any, Path], tmp_path: Path, small_disk: Path) -> None:
    import_huggingface(theirs[1], tmp_path / "ours")
    with pytest.raises(MegaloopError, match=r"cannot be written \(No space left on device\)"):
        export_huggingface(tmp_path / "ours", small_disk / "out")
    with pytest.raises(MegaloopError, match="No space left on device"):
        import_huggingface(theirs[1], small_disk / "ours")
    assert list(small_disk.iterdir()) == []


def test_an_export_holds_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    read = Checkpoint.read

    def watched(self: Checkpoint, state_name: str, name: str, box: Box | None = None) -> torch.Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        values = read(self, state_name, name, box)
        alive.append(weakref.ref(values))
        return values

    checkpoint = _checkpoint(tmp_path / "step", "4")
    monkeypatch.setattr(Checkpoint, "read", watched)
    export_huggingface(checkpoint, tmp_path / "out")
    assert len(alive) == 2 + 4 * 9


def test_pickled_weights_are_never_loaded(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    weights = theirs[1] / "model.safetensors"
    weights.rename(theirs[1] / "pytorch_model.bin")
    with pytest.raises(MegaloopError, match=r"only pickled weights .pytorch_model.bin., which are never loaded"):
        import_huggingface(theirs[1], tmp_path / "ours")


def test_damaged_weights_and_full_outputs_are_named(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    import_huggingface(theirs[1], tmp_path / "ours")
    with pytest.raises(MegaloopError, match="already exists"):
        import_huggingface(theirs[1], tmp_path / "ours")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(MegaloopError, match="is not empty"):
        export_huggingface(tmp_path / "ours", tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    save_file({"x": torch.zeros(1)}, theirs[1] / "model.safetensors")
    (theirs[1] / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(MegaloopError, match=r"model.safetensors: damaged"):
        import_huggingface(theirs[1], tmp_path / "other")


def test_export_and_import_tell_how_far_they_are(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        told.append((what, done, total))

    import_huggingface(theirs[1], tmp_path / "ours", on_bytes=tell)
    with Checkpoint.open(tmp_path / "ours") as checkpoint:
        size = sum(file.bytes for file in checkpoint.manifest.files)
    assert told[-1][1] == told[-1][2] == pytest.approx(size, rel=0.2)  # headers are not counted
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    told.clear()
    summary = export_huggingface(tmp_path / "ours", tmp_path / "out", on_bytes=tell)
    assert told[-1] == ("writing", summary.bytes, summary.bytes)
