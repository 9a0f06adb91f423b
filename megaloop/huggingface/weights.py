"""Checkpoints out to Hugging Face's format and in from it, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from megaloop.checkpoint.reader import Checkpoint
from megaloop.checkpoint.resolve import resolve_checkpoint
from megaloop.checkpoint.run_state import RunState
from megaloop.checkpoint.tensor_file import LazyTensor
from megaloop.checkpoint.writer import CheckpointInfo, save_checkpoint
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, LayerCall, with_inference_loop
from megaloop.errors import MegaloopError
from megaloop.huggingface.files import OutputDirectory, open_weights, read_json, write_json, write_weights
from megaloop.huggingface.tokenizer import export_tokenizer, find_model_tokenizer
from megaloop.layout.pieces import Box, Piece, StatePiece
from megaloop.layout.topology import Topology
from megaloop.model import norm_factors, parameter_specs
from megaloop.runtime.dtype import training_dtype

__all__ = ["ExportSummary", "ImportSummary", "export_huggingface", "import_huggingface"]

_LAYER = {
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
_ENDS = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class ExportSummary:
    """What was written."""

    path: str
    step: int
    parameters: int
    bytes: int
    dtype: str
    files: int


@dataclass(frozen=True)
class ImportSummary:
    """What was read; ``parameters`` count a tied embedding once."""

    path: str
    depth: str
    parameters: int
    dtype: str


def export_huggingface(
    checkpoint: Path, out: Path, *, dtype: str | None = None, depth: DepthSpec | None = None
) -> ExportSummary:
    """Write a directory that ``transformers.AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    A looped plan is written unrolled: each use of a layer becomes a layer; residuals scaled by 1/k become smaller matrices,
    and the factors of LN-scaling (``norm_scaling``) smaller norm weights.
    Takes the memory of one tensor.

    Args:
        checkpoint: a checkpoint, or a run (its newest).
        out: must not exist, or be empty.
        dtype: ``fp32`` (the masters) or ``bf16``; default: the dtype it was trained in.
        depth: run the layers in this order, such as ``10-4x3-10``; default: as trained.

    Raises:
        MegaloopError: a damaged checkpoint (the file is named), a loop that is more than layers in a row, an output that is not empty, a full disk.
    """
    with Checkpoint.open(resolve_checkpoint(checkpoint), verify="checksums") as source, OutputDirectory(out) as folder:
        manifest = source.manifest
        model, plan = manifest.model, manifest.plan
        if plan.style.injection != "none" or plan.style.norm:
            raise MegaloopError(
                f"checkpoint {source.path}: its loop has an injection or a norm, which a Llama decoder has no place for; "
                "only loops of plain composition (and residual_scale) can be exported"
            )
        calls = plan.calls() if depth is None else with_inference_loop(plan, depth).calls
        name = dtype or manifest.precision
        state_name = "master" if name == "fp32" and source.names("master") else "model"
        length = manifest.data.sequence_length or _DEFAULT_LENGTH
        for ours, spec in parameter_specs(model, plan, manifest.vocab_size).items():
            if (found := source.shape(state_name, ours)) != spec.shape:
                raise MegaloopError(
                    f"checkpoint {source.path}: {state_name} of {ours} is {found}, its model makes it {spec.shape}"
                )
        folds = _folds(model, plan, calls)
        tensors = [
            LazyTensor(
                theirs,
                source.shape(state_name, ours),
                training_dtype(name),
                partial(_read, source, state_name, ours, name, folds.get(theirs)),
            )
            for theirs, ours in _exported_names(calls, model.tied_embeddings)
        ]
        files, size = write_weights(tensors, folder)
        tokens: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
        if source.tokenizer is not None:
            tokens = export_tokenizer(source.tokenizer, folder, length)
        write_json(folder / "config.json", _their_config(model, len(calls), name, length) | tokens)
        write_json(folder / "generation_config.json", tokens)
    count = sum(prod(tensor.shape) for tensor in tensors)
    return ExportSummary(str(out), manifest.step, count, size, name, files)


_Fold = Callable[[Tensor], Tensor]


def _read(source: Checkpoint, state_name: str, name: str, dtype: str, fold: _Fold | None) -> Tensor:
    values = source.read(state_name, name)
    return (values if fold is None else fold(values)).to(training_dtype(dtype))


def _folds(model: ModelConfig, plan: DepthPlan, calls: Sequence[LayerCall]) -> dict[str, _Fold]:
    """By their names, what is done to tensors so that they hold factors of ours that a Llama has no place for.

    The matrices of looped layers that write to the residual stream take the scale of residuals, and norms that of LN-scaling.
    """
    factors, folds = norm_factors(model, plan), dict[str, _Fold]()
    for position, call in enumerate(calls):
        their = f"model.layers.{position}.{{}}.weight"
        if plan.style.residual_scale != "none" and call.iterations is not None:
            for name in ("attention.wo", "mlp.w_down"):
                folds[their.format(_LAYER[name])] = partial(torch.div, other=call.iterations)
        if factors[call.layer_id] != 1.0:
            for name in ("attention_norm", "mlp_norm"):
                folds[their.format(_LAYER[name])] = partial(torch.mul, other=factors[call.layer_id])
    return folds


def import_huggingface(source: Path, out: Path) -> ImportSummary:
    """Read a Llama-architecture directory (``config.json`` and safetensors) into a checkpoint of step 0.

    The checkpoint holds weights and fp32 masters, and no moments: a run that starts from it (``init:``) begins with
    fresh ones. A ``tokenizer.model`` comes along.

    Raises:
        MegaloopError: pickled weights only, another architecture or a feature that the decoder lacks, a tensor that is
            missing, unknown or of another shape; an output that exists.
    """
    if out.exists():
        raise MegaloopError(f"output {out} already exists; choose another directory")
    settings = read_json(source / "config.json")
    model, plan = _our_config(source, settings)
    with ExitStack() as stack:
        weights = _read_weights(source, open_weights(source, stack), model, plan)
        precision: Literal["fp32", "bf16"] = "fp32"
        if all(values.dtype == torch.bfloat16 for _, values in weights):
            precision = "bf16"
        pieces = []
        for piece, values in weights:
            pieces.append(StatePiece("model", piece, values.to(training_dtype(precision))))
            pieces.append(StatePiece("master", piece, values.float()))
        tokenizer = find_model_tokenizer(source, model.vocab_size or 0)
        info = CheckpointInfo(
            run=RunState.fresh(), plan=plan, model=model, topology=Topology(), precision=precision, growth=None,
            config={"data": {"sequence_length": settings.get("max_position_embeddings", _DEFAULT_LENGTH)}},
        )  # fmt: skip
        save_checkpoint(out, pieces, info, tokenizer=tokenizer)
    return ImportSummary(str(out), str(plan), sum(piece.numel for piece, _ in weights), precision)


def _read_weights(
    source: Path, stored: dict[str, Any], model: ModelConfig, plan: DepthPlan
) -> list[tuple[Piece, Tensor]]:
    """Every parameter with its values, mapped from the files; refuses what does not fit by name."""
    specs = parameter_specs(model, plan, model.vocab_size or 0)
    wanted = dict(_exported_names(plan.calls(), model.tied_embeddings))
    ignored = {"lm_head.weight"} if model.tied_embeddings else set()
    unknown = [name for name in sorted(stored.keys() - wanted.keys() - ignored) if not name.endswith(".inv_freq")]
    if unknown:
        raise MegaloopError(f"{source}: unknown tensor {unknown[0]}; expected a Llama decoder without additions")
    weights = []
    for theirs, ours in wanted.items():
        if theirs not in stored:
            raise MegaloopError(f"{source}: tensor {theirs} is missing; the directory is not complete")
        described = stored[theirs].get_slice(theirs)
        shape, dtype = specs[ours].shape, described.get_dtype()
        if tuple(described.get_shape()) != shape:
            raise MegaloopError(
                f"{source}: tensor {theirs} is {tuple(described.get_shape())}, config.json makes it {shape}; "
                "they do not belong together"
            )
        if dtype not in ("F32", "BF16", "F16"):
            raise MegaloopError(
                f"{source}: tensor {theirs} is of dtype {dtype}; expected F32, BF16 or F16 (no quantized weights)"
            )
        weights.append((Piece(ours, shape, Box.whole(shape)), stored[theirs].get_tensor(theirs)))
    return weights


# --- names and settings ---


def _exported_names(calls: Sequence[LayerCall], tied: bool) -> Iterator[tuple[str, str]]:
    """(their name, our name) of every tensor; a looped layer occurs once per use."""
    yield _ENDS["embedding.weight"], "embedding.weight"
    for position, call in enumerate(calls):
        for ours, theirs in _LAYER.items():
            yield f"model.layers.{position}.{theirs}.weight", f"layers.{call.layer_id}.{ours}.weight"
    yield _ENDS["norm.weight"], "norm.weight"
    if not tied:
        yield _ENDS["head.weight"], "head.weight"


def _their_config(model: ModelConfig, layers: int, dtype: str, length: int) -> dict[str, Any]:
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
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "torch_dtype": str(training_dtype(dtype)).removeprefix("torch."),
    }


def _our_config(source: Path, settings: dict[str, Any]) -> tuple[ModelConfig, DepthPlan]:
    """The decoder that a Llama configuration describes; refuses by name what ours lacks."""
    if settings.get("model_type") != "llama":
        raise MegaloopError(f"{source}: model_type {settings.get('model_type')!r}; only llama can be imported")
    expected = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "quantization_config": None}
    for key, value in expected.items():
        if settings.get(key, value) != value:
            raise MegaloopError(
                f"{source}: {key} {settings[key]!r} in config.json is not supported; expected {value!r}"
            )
    try:
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        if settings.get("head_dim") not in (None, hidden // heads):
            raise MegaloopError(
                f"{source}: head_dim {settings['head_dim']} in config.json is not supported; expected {hidden // heads}"
            )
        model = ModelConfig(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=settings.get("num_key_value_heads") or heads,
            ffn_size=settings["intermediate_size"],
            vocab_size=settings["vocab_size"],
            rope_theta=_rope_theta(source, settings),
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            init_std=settings.get("initializer_range", 0.02),
            tied_embeddings=settings.get("tie_word_embeddings", False),
        )
        lengths = [settings["num_hidden_layers"], settings.get("max_position_embeddings", _DEFAULT_LENGTH)]
        if model.vocab_size is None or any(type(length) is not int or length < 1 for length in lengths):
            raise ValueError("vocab_size, num_hidden_layers and max_position_embeddings are whole numbers")
        plan = DepthSpec.parse(lengths[0]).plan
    except KeyError as error:
        raise MegaloopError(f"{source}: config.json lacks {error.args[0]!r}") from None
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise MegaloopError(
            f"{source}: config.json is not that of a Llama decoder ({' '.join(str(error).split())})"
        ) from None
    model.check()
    return model, plan


def _rope_theta(source: Path, settings: dict[str, Any]) -> Any:
    """Base of the rotary embedding. transformers 5 keeps it in ``rope_parameters``, where earlier ones had two keys."""
    theta = settings.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = settings.get(key) or {}
        plain = isinstance(rope, dict) and rope.keys() <= {"rope_theta", "rope_type", "type"}
        if not plain or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise MegaloopError(
                f"{source}: {key} {rope!r} in config.json is not supported; expected rotary embeddings without scaling"
            )
        theta = rope.get("rope_theta", theta)
    if settings.get("partial_rotary_factor") not in (None, 1.0):
        raise MegaloopError(f"{source}: partial_rotary_factor in config.json is not supported; expected 1.0")
    return theta
