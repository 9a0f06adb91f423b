"""GGUF files for tests, byte by byte: right ones of a random Llama, and ones that lie."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "rms_norm_eps": 1e-5, "rope_theta": 50_000.0, "max_position_embeddings": 256,
}  # fmt: skip
THEIRS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
Described = tuple[str, tuple[int, ...], int, int]


def text(value: str | bytes, size: int | None = None) -> bytes:
    """A string; ``size``: what it says its length is."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if size is None else size) + data


def value_of(value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, bytes):  # as it is
        return value
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    items = [value_of(item) for item in value]
    return (
        struct.pack("<I", 9)
        + (items[0][:4] if items else struct.pack("<I", 4))
        + struct.pack("<Q", len(items))
        + b"".join(item[4:] for item in items)
    )


def header(
    metadata: list[tuple[str, Any]],
    tensors: list[Described],
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """All before the tensors' bytes; each is (name, dimensions fastest first, type, offset)."""
    keys, many = (len(metadata), len(tensors)) if counts is None else counts
    out = b"GGUF" + struct.pack("<IQQ", version, many, keys)
    for key, value in metadata:
        out += text(key) + value_of(value)
    for name, dimensions, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    return out + b"\0" * (-len(out) % 32)


def settings_of(config: Any) -> dict[str, Any]:
    """The metadata that llama.cpp's converter writes for a Llama of transformers."""
    return {
        "general.architecture": "llama", "general.name": "random", "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings, "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size, "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads, "llama.rope.freq_base": float(config.rope_theta),
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps, "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim, "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size, "tokenizer.ggml.tokens": ["a", "b", "\u0120c"],
    }  # fmt: skip


def tensors_of(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a Llama of transformers by their names in a GGUF file, in its order of rows."""
    config = model.config
    found = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        parts = name.split(".")
        if parts[1] == "layers":
            theirs = f"blk.{parts[2]}.{THEIRS['.'.join(parts[3:-1])]}.weight"
        else:
            theirs = {"embed_tokens": "token_embd", "norm": "output_norm", "weight": "output"}[parts[1]] + ".weight"
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-2])
        if heads:  # LlamaModel.permute of convert_hf_to_gguf.py
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        found[theirs] = values
    return found


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, np.ndarray[Any, Any]],
    quantisation: str = "F32",
    **options: Any,
) -> Path:
    """A file; matrices are quantised, vectors stay fp32, as llama.cpp does it."""
    described: list[Described] = []
    data = b""
    for name, values in tensors.items():
        kind = GGMLQuantizationType[quantisation if values.ndim == 2 else "F32"]
        described.append((name, values.shape[::-1], int(kind), len(data)))
        data += quants.quantize(np.ascontiguousarray(values), kind).tobytes()
        data += b"\0" * (-len(data) % 32)
    path.write_bytes(header([*metadata.items()], described, **options) + data)
    return path


def random_llama(**changes: Any) -> Any:
    """A random Llama of transformers with norms that are not ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0).add_(torch.randn_like(parameter), alpha=0.01)
    return model
