"""Models and prompts that are small enough to be looked into within a second."""

from __future__ import annotations

import numpy as np
import torch

from megaloop.analysis.prompts import Prompt, PromptBatch, Prompts
from megaloop.config import ModelConfig
from megaloop.depth import DepthPlan, DepthSpec, LoopStyle, reorder
from megaloop.model import Decoder
from tests import loop_styles

VOCAB = 96
STYLES = [loop_styles.STYLES[0], loop_styles.STYLES[1], loop_styles.STYLES[5]]
"""A plain loop, one that adds what entered it, and one with all else."""


def tiny_model(depth: str = "4", style: LoopStyle = LoopStyle(), seed: int = 1) -> Decoder:
    """A random model whose layers and loop do much."""
    config = ModelConfig(hidden_size=32, num_heads=4, num_kv_heads=2, ffn_size=48, init_std=0.2)
    layers = DepthPlan.parse(depth).layers
    model = Decoder(config, VOCAB, reorder(DepthPlan.plain(layers), DepthSpec.parse(depth), style))
    model.initialise(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("loop."):  # an adapter that is the identity, and a norm of ones, would hide what they do
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_prompt(length: int, seed: int = 0) -> Prompt:
    """Random tokens, each of which is to predict the next."""
    tokens = np.random.default_rng(seed).integers(VOCAB, size=length)
    return Prompt(tokens, np.append(tokens[1:], -1))


def tiny_batch(lengths: tuple[int, ...] = (7, 12, 5)) -> PromptBatch:
    """Prompts of different lengths together."""
    prompts = [tiny_prompt(length, seed) for seed, length in enumerate(lengths)]
    return Prompts("tests", prompts).batch(range(len(prompts)), torch.device("cpu"))
