"""The decoder in torch: one layer, the ends, tensor parallelism inside; unaware of the pipeline."""

from megaloop.model.decoder import Decoder, DecoderStage, LayerFunction, LoopInput
from megaloop.model.gate import exit_log_probabilities, gate_loss
from megaloop.model.kernels import Kernels, build_adamw, choose_kernels
from megaloop.model.layers import AttentionContext, DecoderLayer, rotary_frequencies
from megaloop.model.parameters import ParameterSpec, grown_from, initial_values, norm_factors, parameter_specs
from megaloop.model.tensor_parallel import Labels, TensorParallel, vocab_parallel_cross_entropy

__all__ = [
    "AttentionContext",
    "Decoder",
    "DecoderLayer",
    "DecoderStage",
    "Kernels",
    "Labels",
    "LayerFunction",
    "LoopInput",
    "ParameterSpec",
    "TensorParallel",
    "build_adamw",
    "choose_kernels",
    "exit_log_probabilities",
    "gate_loss",
    "grown_from",
    "initial_values",
    "norm_factors",
    "parameter_specs",
    "rotary_frequencies",
    "vocab_parallel_cross_entropy",
]
