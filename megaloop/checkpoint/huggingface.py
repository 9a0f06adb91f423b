"""Checkpoints out to Hugging Face's format and in from it, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megaloop.checkpoint.huggingface_tokenizer import write_tokenizer
from megaloop.checkpoint.reader import Checkpoint
from megaloop.checkpoint.resolve import resolve_checkpoint
from megaloop.checkpoint.writer import CheckpointInfo, save_checkpoint
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError
from megaloop.model import parameter_specs
from megaloop.parallel.placement import Box, Piece, StatePiece

__all__ = ["ExportSummary", "ImportSummary", "export_huggingface", "import_huggingface"]

FILE_BYTES = 5_000_000_000
"""Largest file of weights."""
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
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def export_huggingface(checkpoint: Path, out: Path, *, dtype: str | None = None) -> ExportSummary:
    """Write a directory that ``transformers.AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    A looped plan is written unrolled: each use of a layer becomes a layer. Memory stays within one file of weights.

    Args:
        checkpoint: a checkpoint, or a run (its newest).
        out: must not exist, or be empty.
        dtype: ``fp32`` (the masters) or ``bf16``; default: the dtype it was trained in.

    Raises:
        MegaloopError: a damaged checkpoint (the file is named), an output that is not empty, a full disk.
    """
    with Checkpoint.open(resolve_checkpoint(checkpoint), verify="checksums") as source, _Partial(out) as partial:
        manifest = source.manifest
        model = ModelConfig.model_validate(manifest.model)
        plan = DepthPlan.from_json(manifest.plan)
        name = dtype or manifest.precision
        kind = "master" if name == "fp32" and source.names("master") else "model"
        length = int(manifest.config.get("data", {}).get("sequence_length", 2048))
        tensors = (
            (theirs, source.read(kind, ours).to(_DTYPES[name]).contiguous())
            for theirs, ours in _exported_names(plan, model.tied_embeddings)
        )
        files, size, count = _write_weights(tensors, partial)
        tokens: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
        if source.tokenizer is not None:
            write_tokenizer(source.tokenizer, partial, length)
            from megaloop.data.tokenizer import Tokenizer

            tokenizer = Tokenizer.load(source.tokenizer)
            tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
        config = _their_config(model, plan, name, length) | tokens
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", tokens)
        _publish(partial, out)
    return ExportSummary(str(out), manifest.step, count, size, name, files)


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
    settings = _read_settings(source)
    model, plan = _our_config(source, settings)
    specs = parameter_specs(model, plan, model.vocab_size or 0)
    wanted = dict(_exported_names(plan, model.tied_embeddings))
    pieces: list[StatePiece] = []
    with ExitStack() as stack:
        stored = _open_weights(source, stack)
        unknown = sorted(set(stored) - set(wanted) - ({"lm_head.weight"} if model.tied_embeddings else set()))
        unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise MegaloopError(f"{source}: unknown tensor {unknown[0]}; expected a Llama decoder without additions")
        for theirs, ours in wanted.items():
            if theirs not in stored:
                raise MegaloopError(f"{source}: tensor {theirs} is missing; the directory is not whole")
            values = stored[theirs].get_tensor(theirs)
            shape = specs[ours].shape
            if tuple(values.shape) != shape:
                raise MegaloopError(
                    f"{source}: tensor {theirs} is {tuple(values.shape)}, config.json makes it {shape}; they do not belong together"
                )
            if values.dtype != torch.bfloat16:
                values = values.float()
            piece = Piece(ours, shape, Box.whole(shape))
            pieces += [StatePiece("model", piece, values), StatePiece("master", piece, values.float())]
    bf16 = all(piece.data.dtype == torch.bfloat16 for piece in pieces if piece.kind == "model")
    if not bf16:
        pieces = [StatePiece(each.kind, each.piece, each.data.float()) for each in pieces]
    tokenizer = source / "tokenizer.model"
    info = CheckpointInfo(
        step=0, tokens=0, samples=0, flops=0, plan=plan, model=model, seed=0,
        topology={"pp": 1, "tp": 1, "dp": 1}, precision="bf16" if bf16 else "fp32",
        config={"data": {"sequence_length": settings.get("max_position_embeddings", 2048)}},
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(out, pieces, info, tokenizer=tokenizer if tokenizer.is_file() else None)
    count = sum(each.piece.numel for each in pieces if each.kind == "model")
    return ImportSummary(str(out), str(plan), count, info.precision)


# --- names and settings ---


def _exported_names(plan: DepthPlan, tied: bool) -> Iterator[tuple[str, str]]:
    """(their name, our name) of every tensor; a looped layer occurs once per use."""
    yield _ENDS["embedding.weight"], "embedding.weight"
    for position, layer_id in enumerate(plan.order):
        for ours, theirs in _LAYER.items():
            yield f"model.layers.{position}.{theirs}.weight", f"layers.{layer_id}.{ours}.weight"
    yield _ENDS["norm.weight"], "norm.weight"
    if not tied:
        yield _ENDS["head.weight"], "head.weight"


def _their_config(model: ModelConfig, plan: DepthPlan, dtype: str, length: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": plan.depth,
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
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
    }


def _read_settings(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    try:
        settings = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MegaloopError(f"{source}: no config.json; expected a directory in Hugging Face format") from None
    except (OSError, ValueError) as error:
        raise MegaloopError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise MegaloopError(f"{path}: expected an object")
    return settings


def _our_config(source: Path, settings: dict[str, Any]) -> tuple[ModelConfig, DepthPlan]:
    """The decoder that a Llama configuration describes; refuses by name what ours lacks."""
    if settings.get("model_type") != "llama":
        raise MegaloopError(f"{source}: model_type {settings.get('model_type')!r}; only llama can be imported")
    expected = {"attention_bias": False, "mlp_bias": False, "rope_scaling": None, "hidden_act": "silu"}
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
            rope_theta=settings.get("rope_theta", 10000.0),
            norm_eps=settings.get("rms_norm_eps", 1e-6),
            init_std=settings.get("initializer_range", 0.02),
            tied_embeddings=settings.get("tie_word_embeddings", False),
        )
        plan = DepthPlan.plain(settings["num_hidden_layers"])
    except KeyError as error:
        raise MegaloopError(f"{source}: config.json lacks {error.args[0]!r}") from None
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise MegaloopError(
            f"{source}: config.json is not that of a Llama decoder ({' '.join(str(error).split())})"
        ) from None
    model.check()
    return model, plan


# --- files ---


def _open_weights(source: Path, stack: ExitStack) -> dict[str, Any]:
    """Opened safetensors file of each tensor."""
    files = sorted(source.glob("*.safetensors"))
    if not files:
        pickled = sorted([*source.glob("*.bin"), *source.glob("*.pt"), *source.glob("*.pth")])
        if pickled:
            raise MegaloopError(
                f"{source}: only pickled weights ({pickled[0].name}), which are never loaded; convert them to safetensors"
            )
        raise MegaloopError(f"{source}: no *.safetensors files")
    stored: dict[str, Any] = {}
    for path in files:
        try:
            opened = stack.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise MegaloopError(f"{path}: damaged, or no safetensors file ({error})") from None
        stored |= dict.fromkeys(opened.keys(), opened)
    return stored


def _write_weights(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> tuple[int, int, int]:
    """Write tensors as one file, or as several with an index; returns (files, bytes, parameters)."""
    held: dict[str, Tensor] = {}
    held_bytes = total = count = 0
    files: list[list[str]] = []

    def flush() -> None:
        nonlocal held, held_bytes
        save_file(held, folder / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(held))
        held, held_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > FILE_BYTES:
            flush()
        held[name] = tensor
        held_bytes, total, count = held_bytes + size, total + size, count + tensor.numel()
    flush()
    if len(files) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return 1, total, count
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return len(files), total, count


class _Partial:
    """A directory beside ``out`` that becomes it; errors of the disk are the user's, and leave nothing behind."""

    def __init__(self, out: Path):
        self._out = out.absolute()
        self._path = self._out.with_name(f".{self._out.name}.partial-{os.getpid()}")

    def __enter__(self) -> Path:
        if self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise MegaloopError(f"output {self._out} is not empty; choose another directory")
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir(parents=True)
        return self._path

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise MegaloopError(f"output {self._out}: cannot be written ({error}); nothing was left behind") from None


def _publish(partial: Path, out: Path) -> None:
    for file in partial.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    if out.exists():
        out.rmdir()
    partial.rename(out.absolute())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
