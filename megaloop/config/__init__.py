"""The configuration of a run: YAML read into strict models, with overrides from the command line.

Each section is a frozen pydantic model; the sentence under a field is what the documentation says of it.
An unknown key is an error that names the nearest known one.
"""

from megaloop.config.data import DataConfig, PhaseWeightsConfig, SourceConfig
from megaloop.config.depth import (
    DepthEventConfig,
    GateConfig,
    GrowthConfig,
    GrowthTopologyConfig,
    LoopConfig,
    StageConfig,
)
from megaloop.config.load import fields, load_config, parse_override
from megaloop.config.model import ModelConfig, RopeScaling
from megaloop.config.run import Config
from megaloop.config.training import (
    CheckpointConfig,
    FaultsConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DepthEventConfig",
    "FaultsConfig",
    "GateConfig",
    "GrowthConfig",
    "GrowthTopologyConfig",
    "LoggingConfig",
    "LoopConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PhaseWeightsConfig",
    "RopeScaling",
    "ScheduleConfig",
    "SourceConfig",
    "StageConfig",
    "TrainConfig",
    "ValidationConfig",
    "fields",
    "load_config",
    "parse_override",
]
