"""Checkpoints out to Hugging Face's format and in from it, tensor by tensor."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megaloop.checkpoint.reader import Checkpoint
from megaloop.checkpoint.resolve import resolve_checkpoint
from megaloop.checkpoint.run_state import RunState
from megaloop.checkpoint.tensor_file import LazyTensor, Tell, counted
from megaloop.checkpoint.writer import CheckpointInfo, LazyPiece, save_checkpoint
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, LayerCall, Loop, unloop, with_inference_loop
from megaloop.errors import MegaloopError
from megaloop.huggingface.files import OutputDirectory, open_weights, read_json, write_json, write_weights
from megaloop.huggingface.gguf import GgufModel, find_gguf, gguf_metadata
from megaloop.huggingface.gguf_tokenizer import write_gguf_tokenizer
from megaloop.huggingface.llama import (
    DEFAULT_LENGTH,
    LAYER,
    LlamaModel,
    llama_settings,
    model_of_settings,
    tensor_names,
)
from megaloop.huggingface.looped import MODELING, loop_tensor_names, looped_settings
from megaloop.huggingface.tokenizer import export_tokenizer, find_model_tokenizer
from megaloop.layout.pieces import Box, Piece
from megaloop.layout.topology import Topology
from megaloop.model import ParameterSpec, norm_factors, parameter_specs
from megaloop.runtime.dtype import training_dtype
from megaloop.text import printable

__all__ = ["ExportSummary", "ImportSummary", "export_huggingface", "import_huggingface"]


@dataclass(frozen=True)
class ExportSummary:
    """What was written.

    Attributes:
        depth: layers, or layers and the loop that was kept (10-4x3-10).
        left_out: parameters of the checkpoint that are no part of it.
    """

    path: str
    step: int
    depth: str
    parameters: int
    bytes: int
    dtype: str
    files: int
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class ImportSummary:
    """What was read; ``parameters`` count a tied embedding once."""

    path: str
    depth: str
    parameters: int
    dtype: str


def export_huggingface(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    depth: DepthSpec | None = None,
    keep_loop: bool = False,
    on_bytes: Tell | None = None,
) -> ExportSummary:
    """Write a directory that ``transformers.AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    A looped plan is written unrolled, as a Llama: each use of a layer becomes a layer; residuals scaled by 1/k become smaller
    matrices. Or it keeps its loop: each layer is written once, and :mod:`megaloop.huggingface.modeling_megaloop`, which runs
    them, goes along. Either way the factors of LN-scaling (``norm_scaling``) become smaller norm weights.
    Takes the memory of one tensor.

    Args:
        checkpoint: a checkpoint, or a run (its newest).
        out: must not exist, or be empty.
        dtype: ``fp32`` (the masters) or ``bf16``; default: the dtype it was trained in.
        depth: run the layers in this order, such as ``10-4x3-10``; default: as trained.
        keep_loop: write the loop as one.
        on_bytes: told (what is done, bytes done, bytes in all) as it goes on.

    Raises:
        MegaloopError: a damaged checkpoint (the file is named), a parameter that has no place in the output, to be unrolled a
            loop that is more than layers in a row, no loop to keep, an output that is not empty, a full disk.
    """
    with Checkpoint.open(resolve_checkpoint(checkpoint), verify="checksums") as source, OutputDirectory(out) as folder:
        manifest = source.manifest
        model, plan = manifest.model, manifest.plan
        form = _looped(source.path, plan, depth) if keep_loop else _unrolled(source.path, plan, depth)
        name = dtype or manifest.precision
        state_name = "master" if name == "fp32" and source.names("master") else "model"
        length = manifest.data.sequence_length or DEFAULT_LENGTH
        for ours, spec in parameter_specs(model, plan, manifest.vocab_size).items():
            if (found := source.shape(state_name, ours)) != spec.shape:
                raise MegaloopError(
                    f"checkpoint {source.path}: {state_name} of {ours} is {found}, its model makes it {spec.shape}"
                )
        names = [*tensor_names(form.calls, model.tied_embeddings), *form.loop_names]
        left_out = _left_out(source, state_name, {ours for _, ours in names})
        folds = _folds(model, plan, form.calls)
        tensors = [
            LazyTensor(
                theirs,
                source.shape(state_name, ours),
                training_dtype(name),
                partial(_read, source, state_name, ours, name, folds.get(theirs)),
            )
            for theirs, ours in names
        ]
        files, size = write_weights(counted(tensors, on_bytes), folder)
        tokens: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
        if source.tokenizer is not None:
            tokens = export_tokenizer(source.tokenizer, folder, length)
        settings = llama_settings(model, len(form.calls), length, name) | form.loop_settings
        write_json(folder / "config.json", settings | tokens)
        write_json(folder / "generation_config.json", tokens)
        if keep_loop:
            shutil.copyfile(MODELING, folder / MODELING.name)
    count = sum(prod(tensor.shape) for tensor in tensors)
    return ExportSummary(str(out), manifest.step, form.depth, count, size, name, files, left_out)


@dataclass(frozen=True)
class _Form:
    """How the layers of a checkpoint are written.

    Attributes:
        depth: of the model that is written.
        calls: by place in the file, the call that each of its layers stands for.
        loop_names, loop_settings: what a loop that is kept has besides.
    """

    depth: str
    calls: tuple[LayerCall, ...]
    loop_names: tuple[tuple[str, str], ...] = ()
    loop_settings: dict[str, Any] = field(default_factory=dict)


def _unrolled(path: Path, plan: DepthPlan, depth: DepthSpec | None) -> _Form:
    """One layer for each call."""
    if plan.style.injection != "none" or plan.style.norm:
        raise MegaloopError(
            f"checkpoint {path}: its loop has an injection or a norm, which a Llama decoder has no place for; "
            "only loops of plain composition (and residual_scale) can be unrolled; use --keep-loop"
        )
    calls = plan.calls() if depth is None else with_inference_loop(plan, depth).calls
    return _Form(str(len(calls)), calls)


def _looped(path: Path, plan: DepthPlan, depth: DepthSpec | None) -> _Form:
    """Each layer once, and how they loop; a depth that is asked for may have a loop that runs once."""
    if depth is not None:
        with_inference_loop(plan, depth)  # refuses what does not fit
    loop: Loop | None = plan.loop if depth is None else depth.loop
    if loop is None:
        before, after = (plan.layers - 1) // 2, plan.layers // 2
        raise MegaloopError(
            f"checkpoint {path}: {plan.notation if depth is None else depth} is not one loop, which --keep-loop could keep; "
            f"give it one, for example with --depth {before}-1x2-{after}, or leave --keep-loop out"
        )
    settings = looped_settings(plan.layers, loop, plan.style)
    notation = f"{loop.start}-{loop.block}x{loop.iterations}-{plan.layers - loop.start - loop.block}"
    return _Form(notation, unloop(plan).calls(), tuple(loop_tensor_names(plan.style)), settings)


_GATE = "loop.gate."
"""Parameters of a loop's halting gate, which neither a Llama nor the looped form runs."""


def _left_out(source: Checkpoint, state_name: str, written: set[str]) -> tuple[str, ...]:
    """The checkpoint's parameters that are not written; MegaloopError where one is among them that the model would miss."""
    others = [name for name in source.names(state_name) if name not in written]
    unknown = [name for name in others if not name.startswith(_GATE)]
    if unknown:
        raise MegaloopError(
            f"checkpoint {source.path}: {printable(unknown[0])} has no place in a Hugging Face model; "
            "expected the parameters of its plan alone"
        )
    return tuple(map(printable, others))


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
                folds[their.format(LAYER[name])] = partial(torch.div, other=call.iterations)
        if factors[call.layer_id] != 1.0:
            for name in ("attention_norm", "mlp_norm"):
                folds[their.format(LAYER[name])] = partial(torch.mul, other=factors[call.layer_id])
    return folds


def import_huggingface(
    source: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    without_tokenizer: bool = False,
    without_values: bool = False,
    on_bytes: Tell | None = None,
    group: dist.ProcessGroup | None = None,
) -> ImportSummary:
    """Read a model of the Llama architecture, with a loop if it was exported with one, into a checkpoint of step 0.

    The checkpoint holds weights and fp32 masters, and no moments: a run that starts from it (``init:``) begins with
    fresh ones. Takes the memory of one tensor.

    Args:
        source: a Hugging Face directory (``config.json`` and safetensors); a GGUF file, or a directory with one and no
            ``config.json``.
        tokenizer: the tokenizer to keep with it (a file, or a directory that has one); default: the model's own.
        without_tokenizer: keep none.
        without_values: write no tensor: what describes the model, and its tokenizer. Names and shapes of the tensors are looked at all the same.
        on_bytes: told (what is done, bytes done, bytes in all) as it goes on.
        group: where torch.distributed is initialised: the one rank that writes.

    Raises:
        MegaloopError: pickled weights only, another architecture or a feature that the decoder lacks, a tensor that is
            missing, unknown, of another shape or holds NaN; a damaged GGUF file; an output that exists.
    """
    if out.exists():
        raise MegaloopError(f"output {out} already exists; choose another directory")
    with ExitStack() as stack:
        found = _open_source(source, stack)
        specs = parameter_specs(found.model, found.plan, found.model.vocab_size or 0)
        precision: Literal["fp32", "bf16"] = "fp32"
        if all(weight.dtype == torch.bfloat16 for weight in found.weights.values()):
            precision = "bf16"
        pieces = [
            LazyPiece(state_name, _whole_piece(name, specs[name]), dtype, partial(weight.read_as, source, dtype))
            for state_name, dtype in (("model", training_dtype(precision)), ("master", torch.float32))
            for name, weight in ({} if without_values else found.weights).items()
        ]
        rows = found.model.vocab_size or 0
        kept = None if without_tokenizer else _tokenizer_of(source, tokenizer, rows, stack)
        info = CheckpointInfo(
            run=RunState.fresh(), plan=found.plan, model=found.model, topology=Topology(), precision=precision,
            growth=None, config={"data": {"sequence_length": found.length}},
        )  # fmt: skip
        try:
            save_checkpoint(out, counted(pieces, on_bytes), info, tokenizer=kept, group=group)
        except MegaloopError as error:
            if isinstance(error.__cause__, MegaloopError):  # it is the source that is bad, not the disk
                raise error.__cause__ from None
            raise
    count = sum(prod(specs[name].shape) for name in found.weights)
    return ImportSummary(str(out), str(found.plan), count, precision)


@dataclass(frozen=True)
class _Weight:
    """A parameter in the source: what it is called there, its dtype, and its values when they are asked for."""

    theirs: str
    dtype: torch.dtype | None
    read: Callable[[], Tensor]

    def read_as(self, source: Path, dtype: torch.dtype) -> Tensor:
        values = self.read().to(dtype)
        if not torch.isfinite(values).all():
            raise MegaloopError(f"{source}: tensor {printable(self.theirs)} holds NaN or infinity; use another model")
        return values


@dataclass(frozen=True)
class _Source:
    """A model to import: its shape, and its parameters by our names."""

    model: ModelConfig
    plan: DepthPlan
    length: int
    weights: dict[str, _Weight]


def _open_source(source: Path, stack: ExitStack) -> _Source:
    gguf = find_gguf(source)
    if gguf is not None:
        opened = stack.enter_context(GgufModel.open(gguf))
        llama = opened.llama
        weights = {ours: _Weight(theirs, None, partial(opened.read, ours)) for ours, theirs in opened.names.items()}
        return _Source(llama.model, llama.plan, llama.length, weights)
    llama = model_of_settings(source, read_json(source / "config.json"))
    weights = _safetensors(source, open_weights(source, stack), llama)
    return _Source(llama.model, llama.plan, llama.length, weights)


def _tokenizer_of(source: Path, chosen: Path | None, rows: int, stack: ExitStack) -> Path | None:
    """The tokenizer to keep with an imported model of so many rows; that in a GGUF file is written out until ``stack`` ends."""
    if chosen is not None:
        if (path := find_model_tokenizer(chosen, rows)) is None:
            raise MegaloopError(f"tokenizer {chosen}: no tokenizer there; name a file, or a directory that has one")
        return path
    gguf = find_gguf(source)
    if gguf is None:
        return find_model_tokenizer(source, rows)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    written = write_gguf_tokenizer(gguf, gguf_metadata(gguf), folder)
    try:
        return None if written is None else find_model_tokenizer(written, rows)
    except MegaloopError as error:
        raise MegaloopError(str(error).replace(f"tokenizer {written}", f"the tokenizer in {gguf}")) from None


def _whole_piece(name: str, spec: ParameterSpec) -> Piece:
    return Piece(name, spec.shape, Box.whole(spec.shape))


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _safetensors(source: Path, stored: dict[str, Any], llama: LlamaModel) -> dict[str, _Weight]:
    """Every parameter, mapped from the files; refuses what does not fit by name."""
    specs = parameter_specs(llama.model, llama.plan, llama.model.vocab_size or 0)
    wanted = dict(tensor_names(unloop(llama.plan).calls(), llama.model.tied_embeddings))
    wanted |= loop_tensor_names(llama.plan.style)
    ignored = {"lm_head.weight"} if llama.model.tied_embeddings else set()
    unknown = [name for name in sorted(stored.keys() - wanted.keys() - ignored) if not name.endswith(".inv_freq")]
    if unknown:
        raise MegaloopError(
            f"{source}: unknown tensor {printable(unknown[0])}; expected a Llama decoder without additions"
        )
    weights = {}
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
        if dtype not in _DTYPES:
            raise MegaloopError(
                f"{source}: tensor {theirs} is of dtype {dtype}; expected F32, BF16 or F16 (no quantized weights)"
            )
        weights[ours] = _Weight(theirs, _DTYPES[dtype], partial(stored[theirs].get_tensor, theirs))
    return weights
