"""Llama models in GGUF files (llama.cpp's format): settings, tensors, and the way that they are written there.

The header is checked by :mod:`megaloop.huggingface.gguf_header`; quantised values are made numbers by the package
``gguf``, block by block, which gets nothing but arrays of bytes of the right size.
"""

from __future__ import annotations

from functools import partial
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megaloop.config import ModelConfig, RopeScaling
from megaloop.errors import MegaloopError
from megaloop.huggingface.gguf_header import QUANTISATIONS, GgufHeader, GgufTensor, read_header
from megaloop.huggingface.llama import DEFAULT_LENGTH, LlamaModel, plain_plan
from megaloop.model import parameter_specs, rotary_frequencies
from megaloop.text import printable, quoted

__all__ = ["GgufModel", "find_gguf", "gguf_metadata"]

_LAYER = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.w_gate": "ffn_gate",
    "mlp.w_up": "ffn_up",
    "mlp.w_down": "ffn_down",
}
_ENDS = {"embedding.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "head.weight": "output.weight"}
_ROPE_FREQUENCIES = "rope_freqs.weight"
_MUST_BE = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "use_parallel_residual": False,
            "rope.scaling.attn_factor": 1.0}  # fmt: skip
"""Settings under ``llama.`` that our decoder has one value of."""
_KNOWN = {
    "vocab_size", "context_length", "embedding_length", "block_count", "feed_forward_length", "tensor_data_layout",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length",
    "attention.value_length", "rope.dimension_count", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear", *_MUST_BE,
}  # fmt: skip
"""All that may be set there; another setting might change what the model computes."""
_LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
"""Of Llama 3.1, 3.2 and 3.3: a file has the frequencies' divisors, and not what they were computed from."""


def find_gguf(source: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a directory without ``config.json``; None: none.

    Raises:
        MegaloopError: a directory with several.
    """
    if source.is_file():
        return source
    if not source.is_dir() or (source / "config.json").exists():
        return None
    files = sorted(path for path in source.iterdir() if path.suffix == ".gguf" and path.is_file())
    if len(files) > 1:
        raise MegaloopError(f"{source}: {len(files)} GGUF files and no config.json; name the file to read")
    return files[0] if files else None


def gguf_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs of a GGUF file, checked: numbers, bools, texts, and lists of these.

    A tokenizer's are under ``tokenizer.ggml.`` (model, pre, tokens, token_type, merges, bos_token_id, ...) and
    ``tokenizer.chat_template``. The package ``gguf`` is not needed.

    Raises:
        MegaloopError: as :func:`megaloop.huggingface.gguf_header.read_header`.
    """
    return read_header(path).metadata


class GgufModel:
    """An opened GGUF file that holds a Llama decoder.

    Attributes:
        llama: its shape.
        names: what the file calls each parameter, by our names.
    """

    def __init__(self, path: Path, header: GgufHeader, file: BufferedReader):
        self._path = path
        self._header = header
        self._file = file
        self.llama = _read_settings(path, header, partial(_values, path, file))
        self.names = _names(self.llama)
        self._check_tensors()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Check a file and open it.

        Raises:
            MegaloopError: the package ``gguf`` is missing, the file is damaged, or holds something else than a Llama
                decoder that ours can be; what is the matter is named.
        """
        header = read_header(path)
        try:
            file = path.open("rb")
        except OSError as error:
            raise MegaloopError(f"{path}: cannot be read ({error.strerror})") from None
        try:
            return cls(path, header, file)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, ours: str) -> Tensor:
        """A parameter's values, fp32, in our order: what is one tensor in memory, and a copy of queries' and keys'."""
        values = _values(self._path, self._file, self._header.tensors[self.names[ours]])
        model = self.llama.model
        if ours.endswith(".attention.wq.weight"):
            values = _unpermuted(values, model.num_heads)
        elif ours.endswith(".attention.wk.weight"):
            values = _unpermuted(values, model.num_kv_heads)
        return torch.from_numpy(values)

    def _check_tensors(self) -> None:
        model, stored = self.llama.model, self._header.tensors
        known = {*self.names.values(), _ROPE_FREQUENCIES}
        if unknown := sorted(stored.keys() - known):
            raise MegaloopError(
                f"{self._path}: unknown tensor {printable(unknown[0])}; expected a Llama decoder without additions"
            )
        specs = parameter_specs(model, self.llama.plan, model.vocab_size or 0)
        for ours, theirs in self.names.items():
            if theirs not in stored:
                raise MegaloopError(f"{self._path}: tensor {theirs} is missing; the file is not complete")
            if (found := stored[theirs].shape) != specs[ours].shape:
                raise MegaloopError(
                    f"{self._path}: tensor {theirs} is {found}, its settings make it {specs[ours].shape}; "
                    "they do not belong together"
                )
            _quantisation(self._path, stored[theirs])


def _names(llama: LlamaModel) -> dict[str, str]:
    """Their name by our name, in order of execution."""
    names = {"embedding.weight": _ENDS["embedding.weight"]}
    for layer_id in llama.plan.ids:
        names |= {
            f"layers.{layer_id}.{ours}.weight": f"blk.{layer_id}.{theirs}.weight" for ours, theirs in _LAYER.items()
        }
    names["norm.weight"] = _ENDS["norm.weight"]
    if not llama.model.tied_embeddings:
        names["head.weight"] = _ENDS["head.weight"]
    return names


# --- values ---


def _quantisation(path: Path, tensor: GgufTensor) -> Any:
    """The package's name of a tensor's quantisation; refuses by name what it cannot read."""
    label = QUANTISATIONS[tensor.kind][0]
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError as error:
        raise MegaloopError(f"reading {path} needs gguf ({error}); pip install 'megaloop[gguf]'") from None
    readable = {"F32", "F16"} | {kind.name for kind in getattr(quants, "_type_traits", {})}
    if label not in readable:
        raise MegaloopError(
            f"{path}: tensor {printable(tensor.name)} has the quantisation {label}, which cannot be read; "
            "use a file with another (F16, Q8_0, Q4_K, ...)"
        )
    return GGMLQuantizationType[label]


def _values(path: Path, file: BufferedReader, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A tensor's values."""
    kind = _quantisation(path, tensor)
    from gguf import quants

    data = np.empty((tensor.bytes // tensor.row_bytes, tensor.row_bytes), dtype=np.uint8)
    try:
        file.seek(tensor.start)
        complete = file.readinto(data.data) == tensor.bytes
    except OSError as error:
        raise MegaloopError(f"{path}: cannot be read ({error.strerror})") from None
    if not complete:
        raise MegaloopError(f"{path}: it ends within tensor {printable(tensor.name)}; use another copy")
    with np.errstate(all="ignore"):  # scales may be anything; whether the values are finite is looked at later
        values = quants.dequantize(data, kind)
    return np.ascontiguousarray(values, dtype=np.float32).reshape(tensor.shape)


def _unpermuted(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Queries' or keys' matrix with the dimensions i and i + H/2 of a head turning together.

    llama.cpp turns neighbours (2i, 2i + 1) together, and its converter puts the rows of each head into that order.
    """
    rows = values.reshape(heads, values.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(values.shape)


# --- settings ---


class _Settings:
    """What is under ``llama.`` in the metadata."""

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self._path = path
        self._metadata = metadata

    def get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(f"llama.{name}", default)

    def whole(self, name: str, default: int | None = None) -> int:
        """A number from 1 on."""
        value = self.get(name, default)
        if value is None:
            raise MegaloopError(f"{self._path}: llama.{name} is missing; the file is not complete")
        if type(value) is not int or value < 1:
            raise self.bad(name, "one whole number from 1 on")
        return value

    def number(self, name: str, default: float) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float):
            raise self.bad(name, "a number")
        return _shortest(float(value))

    def bad(self, name: str, expected: str) -> MegaloopError:
        return MegaloopError(
            f"{self._path}: llama.{name} {quoted(self.get(name))} is not supported; expected {expected}"
        )


def _shortest(value: float) -> float:
    """Of a number that was stored as fp32, the shortest that is stored as the same: 1e-5, not 9.999999747378752e-06."""
    with np.errstate(all="ignore"):
        stored = np.float32(value)
    return float(str(stored)) if float(stored) == value else value


def _read_settings(path: Path, header: GgufHeader, read: Any) -> LlamaModel:
    """The decoder that the metadata describes; refuses by name what ours lacks."""
    metadata = header.metadata
    if metadata.get("general.architecture") != "llama":
        raise MegaloopError(
            f"{path}: general.architecture {quoted(metadata.get('general.architecture'))}; only llama can be imported"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise MegaloopError(
            f"{path}: split.count {quoted(metadata['split.count'])}; join its parts with llama-gguf-split first"
        )
    settings = _Settings(path, metadata)
    for name, value in _MUST_BE.items():
        if settings.get(name, value) != value:
            raise settings.bad(name, repr(value))
    if unknown := sorted(key for key in metadata if key.startswith("llama.") and key[6:] not in _KNOWN):
        raise MegaloopError(f"{path}: {printable(unknown[0])} is not known; the model may compute what ours does not")
    embedding = header.tensors.get(_ENDS["embedding.weight"])
    if embedding is None:
        raise MegaloopError(f"{path}: tensor {_ENDS['embedding.weight']} is missing; the file is not complete")
    hidden, heads = settings.whole("embedding_length"), settings.whole("attention.head_count")
    head_dim = settings.whole("attention.key_length", max(hidden // heads, 1))
    for name in ("attention.value_length", "rope.dimension_count"):
        if settings.get(name, head_dim) != head_dim:
            raise settings.bad(name, f"{head_dim}, the width of a head")
    try:
        model = ModelConfig(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=settings.whole("attention.head_count_kv", heads),
            head_dim=None if head_dim * heads == hidden else head_dim,
            ffn_size=settings.whole("feed_forward_length"),
            vocab_size=settings.whole("vocab_size", embedding.shape[0]),
            rope_theta=settings.number("rope.freq_base", 10000.0),
            norm_eps=settings.number("attention.layer_norm_rms_epsilon", 1e-5),
            tied_embeddings=_ENDS["head.weight"] not in header.tensors,
        )
        scaling = _scaling(path, settings, model, header.tensors.get(_ROPE_FREQUENCIES), read)
        model = model.model_copy(update={"rope_scaling": scaling})
        layers = settings.whole("block_count")
        if layers > len(header.tensors):
            raise settings.bad("block_count", f"fewer than the {len(header.tensors)} tensors")
    except ValueError as error:  # pydantic's
        raise _no_decoder(path, error) from None
    try:
        model.check()
        plan = plain_plan(layers)
    except MegaloopError as error:
        raise _no_decoder(path, error) from None
    return LlamaModel(model, plan, settings.whole("context_length", DEFAULT_LENGTH))


def _no_decoder(path: Path, error: Exception) -> MegaloopError:
    problem = printable(" ".join(str(error).split()), 500)
    return MegaloopError(f"{path}: its settings are not those of a Llama decoder ({problem})")


def _scaling(
    path: Path, settings: _Settings, model: ModelConfig, divisors: GgufTensor | None, read: Any
) -> RopeScaling | None:
    """What becomes of the rotary embedding's frequencies.

    Linear scaling is settings (without a kind, a factor means it, as in llama.cpp); Llama 3's is a tensor.
    """
    kind = settings.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise settings.bad("rope.scaling.type", "none or linear")
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0))
    scaling = None if kind == "none" or factor in (0.0, 1.0) else RopeScaling(kind="linear", factor=factor)
    if divisors is None:
        return scaling
    if divisors.shape != (model.head_size // 2,):
        raise MegaloopError(
            f"{path}: tensor {_ROPE_FREQUENCIES} is {divisors.shape}, expected ({model.head_size // 2},)"
        )
    values = torch.from_numpy(read(divisors))
    if torch.equal(values, torch.ones_like(values)):
        return scaling
    largest = float(values.max())
    if scaling is None and 1 <= largest < float("inf"):
        llama3 = _LLAMA3.model_copy(update={"factor": largest})
        scaled = rotary_frequencies(model.model_copy(update={"rope_scaling": llama3}))
        if torch.allclose(rotary_frequencies(model) / scaled, values, rtol=1e-5, atol=0):
            return llama3
    raise MegaloopError(
        f"{path}: {_ROPE_FREQUENCIES} scales the rotary embedding otherwise than Llama 3.1 to 3.3 do (low_freq_factor 1, "
        "high_freq_factor 4, original length 8192), and does not say how; import the model's safetensors directory instead"
    )
