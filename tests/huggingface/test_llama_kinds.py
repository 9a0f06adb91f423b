"""Llamas whose heads are of another width, and whose rotary embedding is scaled: in, out, and the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megaloop.checkpoint import Checkpoint
from megaloop.checkpoint.manifest import encode_manifest
from megaloop.config import ModelConfig, RopeScaling
from megaloop.errors import MegaloopError
from megaloop.evaluation.scoring import Question, score
from megaloop.huggingface.llama import llama_settings, model_of_settings
from megaloop.huggingface.weights import export_huggingface, import_huggingface
from megaloop.inference.load import load_decoder
from megaloop.model import rotary_frequencies

SHAPE: dict[str, Any] = {
    "hidden_size": 50, "head_dim": 12, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SCALINGS = pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3], ids=["none", "linear", "llama3"])


def _theirs(directory: Path, scaling: dict[str, Any] | None) -> Any:
    """A random Llama of transformers, saved."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_scaling=scaling)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # sharper attention than at first, so that positions matter
            parameter.mul_(3.0)
    model.save_pretrained(directory)
    return model


def _tokens() -> torch.Tensor:
    return torch.randint(0, 128, (2, 100), generator=torch.Generator().manual_seed(0))


@SCALINGS
@torch.no_grad()
def test_they_come_in_and_go_out_with_the_same_logits(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    from transformers import AutoModelForCausalLM

    model = _theirs(tmp_path / "theirs", scaling)
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    ours, _ = load_decoder(tmp_path / "ours")
    expected = model(_tokens()).logits
    assert (ours(_tokens()) - expected).abs().max() < 1.3e-5  # twice what was measured; logits go up to 6
    export_huggingface(tmp_path / "ours", tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(back(_tokens()).logits, expected)
    assert back.config.rope_scaling == model.config.rope_scaling


@SCALINGS
@torch.no_grad()
def test_caches_and_scores_turn_by_the_same_tables(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    _theirs(tmp_path / "theirs", scaling)
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    ours, _ = load_decoder(tmp_path / "ours")
    tokens = _tokens()[:1]
    expected = ours(tokens)
    caches = ours.new_caches(1, tokens.shape[1])
    steps = [
        ours(tokens[:, :60], caches=caches),
        *(ours(tokens[:, at : at + 1], caches=caches) for at in range(60, 100)),
    ]
    assert (torch.cat(steps, dim=1) - expected).abs().max() < 1.9e-5  # twice what was measured
    words = tokens[0].tolist()
    likelihoods = expected[0].log_softmax(-1)
    wanted = sum(float(likelihoods[at - 1, words[at]]) for at in range(90, 100))
    (found,) = score(ours, words[:50], [Question(words[50:90], [words[90:], [1, 2]])])
    assert found.log_likelihoods[0] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3], ids=["linear", "llama3"])
@pytest.mark.parametrize(("theta", "head_dim", "original"), [(5e5, 128, 8192), (1e4, 64, 2048), (1e5, 12, 16)])
def test_frequencies_are_those_of_transformers_to_the_last_bit(
    scaling: dict[str, Any], theta: float, head_dim: int, original: int
) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if scaling is LLAMA3:
        scaling = scaling | {"original_max_position_embeddings": original}
    settings = LlamaConfig(**SHAPE | {"head_dim": head_dim}, rope_theta=theta, rope_scaling=scaling)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](settings, torch.device("cpu"))
    assert factor == 1.0
    assert torch.equal(rotary_frequencies(model_of_settings(Path("x"), settings.to_dict()).model), expected)


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3], ids=["linear", "llama3"])
def test_every_spelling_of_the_scaling_is_read(scaling: dict[str, Any]) -> None:
    settings = llama_settings(ModelConfig(vocab_size=128), 2, 64)
    settings.pop("rope_theta")
    kind = scaling["rope_type"]
    rest = {key: value for key, value in scaling.items() if key != "rope_type"}
    spelled: list[dict[str, Any]] = [
        {"rope_theta": 5e4, "rope_scaling": scaling},
        {"rope_theta": 5e4, "rope_scaling": {"type": kind, **rest}},
        {"rope_parameters": {"rope_theta": 5e4, **scaling}},
    ]
    models = [model_of_settings(Path("x"), settings | {"rope_scaling": None} | change).model for change in spelled]
    assert len(set(models)) == 1
    assert (models[0].rope_theta, models[0].rope_scaling and models[0].rope_scaling.kind) == (5e4, kind)
    with pytest.raises(MegaloopError, match=r"rope_scaling and rope_parameters in config.json differ"):
        model_of_settings(Path("x"), settings | {"rope_scaling": scaling, "rope_parameters": {"rope_type": "default"}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "llama3", "factor": 8}, "kind llama3 needs low_freq_factor"),
        ({"kind": "linear", "factor": 2, "original_length": 8}, "original_length applies only to kind llama3"),
        (
            {"kind": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_length": 8},
            "low_freq_factor 4 is not less than high_freq_factor 4",
        ),
    ],
)
def test_a_scaling_that_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(MegaloopError, match=message):
        ModelConfig(rope_scaling=RopeScaling(**values)).check()
    with pytest.raises(MegaloopError, match=r"head size 7 \(head_dim\) is odd"):
        ModelConfig(head_dim=7).check()


def test_manifests_name_what_is_new_only_where_it_is_used(tmp_path: Path) -> None:
    _theirs(tmp_path / "theirs", LLAMA3)
    import_huggingface(tmp_path / "theirs", tmp_path / "ours")
    with Checkpoint.open(tmp_path / "ours") as checkpoint:
        manifest = checkpoint.manifest
    assert json.loads((tmp_path / "ours/manifest.json").read_text())["model"]["head_dim"] == 12
    assert manifest.model.head_size == 12
    assert encode_manifest(manifest) == (tmp_path / "ours/manifest.json").read_bytes()
    plain = manifest.model_copy(update={"model": ModelConfig(vocab_size=128)})
    assert set(json.loads(encode_manifest(plain))["model"]) == {
        "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "vocab_size", "rope_theta", "norm_eps", "init_std",
        "tied_embeddings", "document_masking",
    }  # fmt: skip


NONSENSE = [
    None, True, -1, 0, 3, 10**30, 0.5, float("inf"), float("nan"), "x", "%99999999999d", "llama3", [], [[1]], {}, {"x": 1},
    {"rope_type": ["linear"]}, {"rope_type": "linear", "factor": [2]}, {"rope_type": "linear", "factor": 10**400},
    {"rope_type": "llama3", "factor": -1, "low_freq_factor": 0, "high_freq_factor": "", "original_max_position_embeddings": 0},
]  # fmt: skip


@pytest.mark.parametrize(
    "key", [*llama_settings(ModelConfig(vocab_size=128), 2, 64), "rope_parameters", "quantization_config"]
)
def test_a_config_of_nonsense_is_refused_in_a_line_or_read(key: str) -> None:
    settings = llama_settings(ModelConfig(vocab_size=128), 2, 64)
    for value in NONSENSE:
        try:
            model_of_settings(Path("source"), settings | {key: value})
        except MegaloopError as error:
            problem = str(error)
        else:
            continue
        assert problem.startswith("source: ")
        assert len(problem) < 1000
        assert "\n" not in problem


@pytest.mark.parametrize("depth", [3000, 100_000])
def test_a_config_that_is_nested_too_deep_is_refused(tmp_path: Path, depth: int) -> None:
    (tmp_path / "config.json").write_text('{"rope_scaling":' + "[" * depth + "]" * depth + "}")
    with pytest.raises(MegaloopError, match=r"config.json|model_type") as error:
        import_huggingface(tmp_path, tmp_path / "out")
    assert len(str(error.value)) < 1000
