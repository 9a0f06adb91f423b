"""Llama's names and settings, as transformers and as we have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaloop.config import ModelConfig, RopeScaling
from megaloop.depth import DepthPlan, DepthSpec, LayerCall
from megaloop.errors import MegaloopError
from megaloop.huggingface.looped import MODEL_TYPE, looped_plan
from megaloop.runtime.dtype import training_dtype
from megaloop.text import printable, quoted

__all__ = ["DEFAULT_LENGTH", "LAYER", "LlamaModel", "llama_settings", "model_of_settings", "plain_plan", "tensor_names"]

LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.w_gate": "mlp.gate_proj",
    "mlp.w_up": "mlp.up_proj",
    "mlp.w_down": "mlp.down_proj",
}
"""A layer's modules: ours, theirs."""
_ENDS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
DEFAULT_LENGTH = 2048
"""Tokens of the longest text, where nothing says it."""
_ROPE_KEYS = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_length",
    },
}
"""By kind of scaling, what their settings are called here."""


@dataclass(frozen=True)
class LlamaModel:
    """What settings say of a decoder.

    Attributes:
        length: tokens of the longest text that it is made for.
    """

    model: ModelConfig
    plan: DepthPlan
    length: int


def tensor_names(calls: Sequence[LayerCall], tied: bool) -> Iterator[tuple[str, str]]:
    """(their name, our name) of every tensor; a looped layer occurs once per use."""
    yield _ENDS["embedding.weight"], "embedding.weight"
    for position, call in enumerate(calls):
        for ours, theirs in LAYER.items():
            yield f"model.layers.{position}.{theirs}.weight", f"layers.{call.layer_id}.{ours}.weight"
    yield _ENDS["norm.weight"], "norm.weight"
    if not tied:
        yield _ENDS["head.weight"], "head.weight"


def llama_settings(model: ModelConfig, layers: int, length: int, dtype: str = "fp32") -> dict[str, Any]:
    """The content of ``config.json``, which is also what ``transformers.LlamaConfig`` takes."""
    scaling = model.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": length,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {
            "rope_type": scaling.kind,
            **{theirs: getattr(scaling, ours) for theirs, ours in _ROPE_KEYS[scaling.kind].items()},
        },
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "torch_dtype": str(training_dtype(dtype)).removeprefix("torch."),
    }


def model_of_settings(source: Path, settings: dict[str, Any]) -> LlamaModel:
    """The decoder that a ``config.json`` describes: a Llama, or one that was exported with its loop.

    Raises:
        MegaloopError: another architecture, or a feature that our decoder lacks, by its name; settings that make no sense.
    """
    is_looped = settings.get("model_type") == MODEL_TYPE
    if not is_looped and settings.get("model_type") != "llama":
        raise MegaloopError(f"{source}: model_type {quoted(settings.get('model_type'))}; only llama can be imported")
    plan = looped_plan(source, settings) if is_looped else None
    expected = {
        "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None,
        "partial_rotary_factor": 1.0,
    }  # fmt: skip
    for key, value in expected.items():
        if settings.get(key) not in (None, value):
            raise MegaloopError(
                f"{source}: {key} {quoted(settings[key])} in config.json is not supported; expected {value!r}"
            )
    theta, scaling = _rope(source, settings)
    try:
        heads, hidden, head_dim = settings["num_attention_heads"], settings["hidden_size"], settings.get("head_dim")
        if all(type(value) is int for value in (heads, hidden, head_dim)) and hidden == head_dim * heads:
            head_dim = None  # as it would be without
        model = ModelConfig(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            ffn_size=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            init_std=settings.get("initializer_range", 0.02),
            tied_embeddings=settings.get("tie_word_embeddings", False),
        )
        lengths = [
            plan.layers if plan else settings["num_hidden_layers"],
            settings.get("max_position_embeddings", DEFAULT_LENGTH),
        ]
        if model.vocab_size is None or any(type(length) is not int or length < 1 for length in lengths):
            raise ValueError("vocab_size, num_hidden_layers and max_position_embeddings are whole numbers")
        model.check()
        return LlamaModel(model, plan or plain_plan(lengths[0]), lengths[1])
    except KeyError as error:
        raise MegaloopError(f"{source}: config.json lacks {error.args[0]!r}") from None
    except (ValueError, TypeError, ArithmeticError, MegaloopError) as error:
        raise MegaloopError(
            f"{source}: config.json is not that of a Llama decoder ({printable(' '.join(str(error).split()), 500)})"
        ) from None


def plain_plan(layers: int) -> DepthPlan:
    """So many layers, one after the other; MegaloopError where no decoder has as many."""
    return DepthSpec.parse(layers).plan


def _rope(source: Path, settings: dict[str, Any]) -> tuple[Any, RopeScaling | None]:
    """Base and scaling of the rotary embedding.

    transformers 5 keeps both in ``rope_parameters``, where earlier ones had ``rope_theta`` and ``rope_scaling``.
    """
    theta = settings.get("rope_theta", 10000.0)
    found: dict[str, RopeScaling | None] = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise MegaloopError(f"{source}: {key} {quoted(rope)} in config.json is not supported; expected an object")
        theta = rope.get("rope_theta", theta)
        found[key] = _scaling(source, key, rope)
    if len(set(found.values())) > 1:
        raise MegaloopError(f"{source}: rope_scaling and rope_parameters in config.json differ; remove one of them")
    return theta, next(iter(found.values()), None)


def _scaling(source: Path, key: str, rope: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = _ROPE_KEYS.get(kind) if isinstance(kind, str) else None
    if names is None:
        raise MegaloopError(
            f"{source}: {key} of kind {quoted(kind)} in config.json is not supported; expected default, linear or llama3"
        )
    values = {name: value for name, value in rope.items() if name not in ("rope_type", "type", "rope_theta")}
    if values.get("partial_rotary_factor") in (None, 1.0):
        values.pop("partial_rotary_factor", None)
    if unknown := sorted(values.keys() - names.keys(), key=str):
        raise MegaloopError(
            f"{source}: {printable(unknown[0])} under {key} (kind {kind}) in config.json is not supported; remove it"
        )
    if missing := sorted(names.keys() - values.keys()):
        raise MegaloopError(f"{source}: {key} (kind {kind}) in config.json lacks {missing[0]}")
    if kind == "default":
        return None
    try:
        return RopeScaling(kind=kind, **{names[name]: value for name, value in values.items()})
    except ValueError as error:
        problem = printable(" ".join(str(error).split()), 300)
        raise MegaloopError(f"{source}: {key} in config.json makes no sense ({problem})") from None
