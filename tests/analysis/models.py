"""Small models with weights that do something, prompts for them, and the same as transformers' Llama."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megaloop.analysis.prompts import Prompt, PromptBatch, Prompts
from megaloop.checkpoint import CheckpointInfo, RunState, save_checkpoint
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, LoopStyle
from megaloop.huggingface.weights import export_huggingface
from megaloop.layout.pieces import Box, Piece, StatePiece
from megaloop.layout.topology import Topology
from megaloop.model import Decoder
from tests.analysis.reference import HookedLlama

__all__ = ["CONFIG", "CPU", "VOCAB", "decoder", "exported", "random_prompts", "saved", "whole_batch"]

VOCAB = 64
CPU = torch.device("cpu")
CONFIG = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, vocab_size=VOCAB)
"""Grouped heads, tied embeddings."""


def decoder(depth: str, style: LoopStyle = LoopStyle(), config: ModelConfig = CONFIG, seed: int = 0) -> Decoder:
    """A model whose layers change the residual stream as much as it is, with norms and adapters that are not the identity."""
    model = Decoder(config, VOCAB, DepthPlan(DepthPlan.parse(depth).order, style=style))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * drawn)
            else:
                std = 0.3 if name in ("embedding.weight", "head.weight") else 1.2 / parameter.shape[-1] ** 0.5
                parameter.copy_(std * drawn)
    return model.eval()


def random_prompts(lengths: Sequence[int] = (13, 26, 17), seed: int = 0) -> Prompts:
    """Prompts of different lengths, with targets at about two of three positions."""
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        tokens, targets = rng.integers(0, VOCAB, length), rng.integers(0, VOCAB, length)
        made.append(Prompt(tokens, np.where(rng.random(length) < 0.35, -1, targets)))
    return Prompts("random", made)


def whole_batch(prompts: Prompts) -> PromptBatch:
    """All of them in one batch, filled up at their ends."""
    return prompts.batch(range(len(prompts)), CPU)


def saved(model: Decoder, folder: Path, tokenizer: Path | None = None) -> Path:
    """The model as a checkpoint in fp32."""
    pieces = []
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        pieces.append(StatePiece("model", Piece(name, shape, Box.whole(shape)), parameter.detach()))
    info = CheckpointInfo(
        run=RunState.fresh(), plan=model.plan, model=model.config,
        topology=Topology(), precision="fp32", config={}, growth=None,
    )  # fmt: skip
    save_checkpoint(folder, pieces, info, tokenizer=tokenizer)
    return folder


def exported(model: Decoder, folder: Path) -> HookedLlama:
    """The model as ``megaloop export`` writes it and transformers reads it, one layer for each execution."""
    from transformers import AutoModelForCausalLM

    export_huggingface(saved(model, folder / "checkpoint"), folder / "llama", dtype="fp32")
    return HookedLlama(AutoModelForCausalLM.from_pretrained(folder / "llama"))
