"""A model that is exported with its loop is, in transformers, the model that it is here."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data_prep.tokenizer import train_sentencepiece
from megaloop.checkpoint import Checkpoint, CheckpointInfo, RunState, save_checkpoint
from megaloop.config import ModelConfig, RopeScaling
from megaloop.depth import DepthPlan, DepthSpec, LoopStyle, with_inference_loop
from megaloop.errors import MegaloopError
from megaloop.huggingface.weights import export_huggingface, import_huggingface
from megaloop.inference.generate import Generation, generate_text, generate_tokens
from megaloop.inference.sampling import Sampling
from megaloop.layout.pieces import Box, Piece, StatePiece
from megaloop.layout.topology import Topology
from megaloop.model import Decoder, parameter_specs, vocab_parallel_cross_entropy
from megaloop.tokenizer import load_tokenizer
from tests.analysis.models import CONFIG, VOCAB, decoder, saved
from tests.data.corpus import documents
from tests.loop_styles import STYLES
from tests.processes import run

UNTIED = CONFIG.model_copy(update={"tied_embeddings": False})
SCALED = CONFIG.model_copy(update={"norm_scaling": True})
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=16)
ALL = CONFIG.model_copy(update={"norm_scaling": True, "tied_embeddings": False, "rope_scaling": LLAMA3, "head_dim": 12})
EVERYTHING = STYLES[5]
MODELS = [
    *[("1-2x3-1", style, CONFIG) for style in STYLES],
    ("0-2x4-0", LoopStyle(), CONFIG),
    ("0-2x4-0", EVERYTHING, UNTIED),
    ("2-1x2-0", LoopStyle(injection="add"), SCALED),
    ("(0,4)(1,2)x3(3)", EVERYTHING, ALL),
]
each_model = pytest.mark.parametrize(
    ("depth", "style", "config"), MODELS, ids=[f"{depth} {number}" for number, (depth, *_) in enumerate(MODELS)]
)
PROMPT = [3, 1, 4, 1, 5, 9]
TOLERANCE = 4.5e-6
"""Of logits, as a part of the largest."""
GRADIENT_TOLERANCE = 2.5e-6


class Exports:
    """Models, their exports, and what transformers makes of them; each is made once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self.folder = cache(self._export)

    def _export(self, depth: str, style: LoopStyle = LoopStyle(), config: ModelConfig = CONFIG) -> Path:
        folder = self._folder / f"export{len(list(self._folder.iterdir()))}"
        export_huggingface(saved(decoder(depth, style, config), folder / "checkpoint"), folder / "out", keep_loop=True)
        return folder

    def pair(self, depth: str, style: LoopStyle = LoopStyle(), config: ModelConfig = CONFIG) -> tuple[Decoder, Any]:
        """Ours, theirs."""
        return decoder(depth, style, config), load(self.folder(depth, style, config) / "out")


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    # transformers copies the code of models into a folder of the user's, which tests beside this one use as well
    with pytest.MonkeyPatch.context() as patch:
        modules = tmp_path_factory.mktemp("modules")
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
        yield Exports(tmp_path_factory.mktemp("exports"))


def _tokens(batch: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def _ours(model: Decoder, depth: str | None = None, prompt: list[int] = PROMPT) -> list[int]:
    calls = None if depth is None else with_inference_loop(model.plan, DepthSpec.parse(depth)).calls
    return list(generate_tokens(model, prompt, 12, Sampling(temperature=0.0), calls=calls))


def _theirs(model: Any, prompt: list[int] = PROMPT, **options: Any) -> list[int]:
    tokens = torch.tensor([prompt])
    done = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, do_sample=False, pad_token_id=0, **options
    )
    return done[0, len(prompt) :].tolist()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """As a part of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


@each_model
def test_logits_and_greedy_text_are_ours(exports: Exports, depth: str, style: LoopStyle, config: ModelConfig) -> None:
    ours, theirs = exports.pair(depth, style, config)
    with torch.no_grad():
        assert _difference(theirs(_tokens()).logits, ours(_tokens())) < TOLERANCE
    assert _theirs(theirs) == _ours(ours)
    assert _theirs(theirs, use_cache=False) == _ours(ours)


@pytest.mark.parametrize("style", STYLES, ids=range(len(STYLES)))
def test_another_number_of_loops_is_that_depth(exports: Exports, style: LoopStyle) -> None:
    """At load and later; residuals scaled by 1/k follow the number."""
    ours, theirs = exports.pair("1-2x3-1", style)
    for number in (1, 5):
        spec = DepthSpec.parse(f"1-2x{number}-1")
        theirs.config.num_loops = number
        again = load(exports.folder("1-2x3-1", style, CONFIG) / "out", num_loops=number)
        assert again.config.num_hidden_layers == 2 + 2 * number
        with torch.no_grad():
            expected = ours(_tokens(), calls=with_inference_loop(ours.plan, spec).calls)
            assert _difference(again(_tokens()).logits, expected) < TOLERANCE
            assert torch.equal(theirs(_tokens()).logits, again(_tokens()).logits)
        assert _theirs(again) == _ours(ours, spec.text)


def test_a_batch_that_is_padded_on_the_left_is_its_prompts(exports: Exports) -> None:
    ours, theirs = exports.pair("1-2x3-1", EVERYTHING)
    prompts = [PROMPT, [7], [11, 12, 13, 14, 15, 16, 17, 18, 19]]
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        done = theirs.generate(
            padded, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, **options
        )
        assert done[:, longest:].tolist() == [_ours(ours, prompt=prompt) for prompt in prompts]


def test_a_cache_has_an_entry_for_each_call(exports: Exports) -> None:
    _, theirs = exports.pair("1-2x3-1")
    tokens = _tokens()
    with torch.no_grad():
        whole = theirs(tokens, output_hidden_states=True)
        begun = theirs(tokens[:, :13])
        rest = theirs(tokens[:, 13:], past_key_values=begun.past_key_values)
    assert _difference(torch.cat([begun.logits, rest.logits], dim=1), whole.logits) < TOLERANCE
    assert len(rest.past_key_values) == 8
    assert len(whole.hidden_states) == 8 + 1


def test_each_layer_is_stored_once(exports: Exports) -> None:
    folder = exports.folder("1-2x3-1", EVERYTHING, UNTIED)
    specs = parameter_specs(UNTIED, decoder("1-2x3-1", EVERYTHING, UNTIED).plan, VOCAB)
    stored = load_file(folder / "out" / "model.safetensors")
    assert sorted(map(tuple, (values.shape for values in stored.values()))) == sorted(
        spec.shape for spec in specs.values()
    )
    size = sum(values.numel() * 4 for values in stored.values())
    assert 0 < (folder / "out" / "model.safetensors").stat().st_size - size < 8192  # a header
    (folder / "again").mkdir()
    summary = export_huggingface(folder / "checkpoint", folder / "again", dtype="bf16", keep_loop=True)
    assert (summary.depth, summary.bytes, summary.parameters) == ("1-2x3-1", size // 2, size // 4)


@pytest.mark.parametrize("style", [LoopStyle(), EVERYTHING], ids=["plain", "everything"])
def test_transformers_loads_it_without_a_word_and_saves_it_as_it_was(
    exports: Exports, style: LoopStyle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = exports.folder("1-2x3-1", style, CONFIG) / "out"
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        model, told = load(folder, output_loading_info=True)
        model.save_pretrained(tmp_path / "saved")
        again = load(tmp_path / "saved")
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(told.values())
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    with torch.no_grad():
        assert torch.equal(model(_tokens()).logits, again(_tokens()).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_ours(exports: Exports, checkpointing: bool) -> None:
    ours, theirs = exports.pair("1-2x3-1", EVERYTHING, SCALED)
    theirs.train()
    if checkpointing:
        theirs.gradient_checkpointing_enable()
    tokens = _tokens()
    loss = theirs(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    expected = vocab_parallel_cross_entropy(ours(tokens)[:, :-1], tokens[:, 1:], ours.tp)
    expected.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    found = dict(theirs.named_parameters())
    pairs = {
        "embedding.weight": "model.embed_tokens.weight",
        "layers.1.attention.wk.weight": "model.layers.1.self_attn.k_proj.weight",
        "layers.2.mlp.w_down.weight": "model.layers.2.mlp.down_proj.weight",
        "loop.adapter.weight": "model.loop_adapter.weight",
        "loop.norm.weight": "model.loop_norm.weight",
        "norm.weight": "model.norm.weight",
    }
    for mine, other in pairs.items():
        gradient = ours.get_parameter(mine).grad
        assert gradient is not None
        assert _difference(found[other].grad, gradient) < GRADIENT_TOLERANCE, mine
    assert all(parameter.grad is not None for parameter in found.values())


@each_model
def test_import_brings_it_back(
    exports: Exports, tmp_path: Path, depth: str, style: LoopStyle, config: ModelConfig
) -> None:
    """Plan and weights; what LN-scaling multiplied by has become part of the weights."""
    folder = exports.folder(depth, style, config)
    import_huggingface(folder / "out", tmp_path / "ours")
    with Checkpoint.open(tmp_path / "ours") as found, Checkpoint.open(folder / "checkpoint") as expected:
        assert found.manifest.plan.notation == expected.manifest.plan.notation
        assert found.manifest.plan.style == replace(style, gate=False)  # which an export leaves out
        assert found.manifest.model == config.model_copy(update={"norm_scaling": False})
        places = {layer_id: place for place, layer_id in enumerate(expected.manifest.plan.ids)}
        for name in expected.names("model"):
            if name.startswith("loop.gate."):
                continue
            if name.startswith("layers."):
                _, layer_id, rest = name.split(".", 2)
                if config.norm_scaling and rest.endswith("_norm.weight"):
                    continue
                place = f"layers.{places[int(layer_id)]}.{rest}"
            else:
                place = name
            assert torch.equal(found.read("model", place), expected.read("model", name)), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_loops": 1}, "num_loops 1 in config.json, of a loop with an injection"),
        ({"num_loops": "3"}, "num_loops in config.json are whole numbers"),
        ({"num_recurrent_layers": 0}, "config.json describes no loop .*both must be at least 1"),
        ({"num_coda_layers": 2}, "model.layers.4.input_layernorm.weight is missing"),
        ({"loop_injection": "mul"}, "config.json describes no loop .*'mul' is none of none, add, concat"),
        ({"loop_injection": "none"}, "unknown tensor model.loop_adapter.weight"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_import(
    exports: Exports, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = exports.folder("1-2x3-1", EVERYTHING, CONFIG) / "out"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.safetensors").symlink_to(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(MegaloopError, match=message):
        import_huggingface(tmp_path / "theirs", tmp_path / "ours")


def test_depth_gives_a_plain_model_a_loop(exports: Exports, tmp_path: Path) -> None:
    ours = decoder("5")
    checkpoint = saved(ours, tmp_path / "checkpoint")
    summary = export_huggingface(checkpoint, tmp_path / "out", depth=DepthSpec.parse("1-2x1-2"), keep_loop=True)
    assert summary.depth == "1-2x1-2"
    for number in (1, 3):
        assert _theirs(load(tmp_path / "out", num_loops=number)) == _ours(ours, f"1-2x{number}-2")


def test_a_model_without_one_loop_is_refused(tmp_path: Path) -> None:
    plain = saved(decoder("4"), tmp_path / "plain")
    done = run("export", plain, "--out", tmp_path / "out", "--keep-loop")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "4 is not one loop, which --keep-loop could keep" in done.stderr
    assert "with --depth 1-1x2-2, or leave --keep-loop out" in done.stderr
    looped = saved(decoder("1-2x3-1"), tmp_path / "looped")
    for checkpoint, depth in ((saved(decoder("(0,1)x2(2,3)x2"), tmp_path / "two"), None), (looped, "4")):
        spec = None if depth is None else DepthSpec.parse(depth)
        with pytest.raises(MegaloopError, match="is not one loop"):
            export_huggingface(checkpoint, tmp_path / "out", depth=spec, keep_loop=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep_loop", [False, True])
def test_parameters_that_no_export_knows(tmp_path: Path, keep_loop: bool) -> None:
    """A gate is left out, and that is said; anything else would be missed by the model."""
    model = decoder("1-2x3-1")

    def checkpoint(name: str) -> Path:
        pieces = [
            StatePiece("model", Piece(key, tuple(values.shape), Box.whole(tuple(values.shape))), values.detach())
            for key, values in [*model.named_parameters(), (name, torch.ones(3))]
        ]
        info = CheckpointInfo(
            run=RunState.fresh(), plan=model.plan, model=CONFIG,
            topology=Topology(), precision="fp32", config={}, growth=None,
        )  # fmt: skip
        save_checkpoint(tmp_path / name, pieces, info)
        return tmp_path / name

    summary = export_huggingface(checkpoint("loop.gate.weight"), tmp_path / "out", keep_loop=keep_loop)
    assert summary.left_out == ("loop.gate.weight",)
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "gate." in name]
    with pytest.raises(MegaloopError, match=r"loop\.router has no place in a Hugging Face model"):
        export_huggingface(checkpoint("loop.router"), tmp_path / "other", keep_loop=keep_loop)


def test_text_is_ours_with_the_tokenizer_that_goes_along(exports: Exports, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(documents(40), 330))
    config = CONFIG.model_copy(update={"vocab_size": 330, "init_std": 0.3})
    model = Decoder(config, 330, DepthPlan(DepthPlan.parse("1-2x3-1").order, style=EVERYTHING))
    model.initialise(0)
    checkpoint = saved(model, tmp_path / "checkpoint", tokenizer=tmp_path / "tokenizer.model")
    export_huggingface(checkpoint, tmp_path / "out", keep_loop=True)
    tokenizer, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), load(tmp_path / "out")
    prompt = tokenizer("The king said", return_tensors="pt")
    done = theirs.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0]
    found = generate_text(checkpoint, "The king said", Generation(max_tokens=12, sampling=Sampling(temperature=0.0)))
    # by our tokenizer: theirs shows bytes that are no UTF-8, such as a random model's, another way
    assert found.text == load_tokenizer(tmp_path / "tokenizer.model").decode(done.tolist())
