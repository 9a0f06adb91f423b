"""The configuration of a run: YAML read into strict models, with overrides from the command line.

Each section is a frozen pydantic model; the sentence under a field is what the documentation says of it.
An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, field_validator

from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainConfig",
    "ValidationConfig",
    "load_config",
    "parse_override",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class ModelConfig(_Section):
    """The Llama-family decoder of SmolLM v1."""

    hidden_size: PositiveInt = 960
    """Width of the residual stream."""
    num_heads: PositiveInt = 15
    """Query heads; must divide hidden_size."""
    num_kv_heads: PositiveInt = 5
    """Key and value heads (grouped-query attention); must divide num_heads."""
    ffn_size: PositiveInt = 2560
    """Inner width of the SwiGLU MLP."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding; empty: the tokenizer's size rounded up to a multiple of 128."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary position embedding."""
    norm_eps: PositiveFloat = 1e-5
    """Epsilon of RMSNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of every freshly initialised matrix."""
    tied_embeddings: bool = True
    """The output head shares the embedding's weight."""
    document_masking: bool = False
    """Attention does not cross document boundaries within a packed sample."""

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    def check(self) -> None:
        """Raise MegaloopError where the shape does not fit together."""
        if self.hidden_size % self.num_heads:
            raise MegaloopError(
                f"model.hidden_size {self.hidden_size} is not divisible by model.num_heads {self.num_heads}; choose a "
                f"multiple, for example {self.hidden_size // self.num_heads * self.num_heads or self.num_heads}"
            )
        if self.head_size % 2:
            raise MegaloopError(
                f"model: head size {self.head_size} (hidden_size / num_heads) is odd; "
                "rotary embeddings need an even one"
            )
        if self.num_heads % self.num_kv_heads:
            raise MegaloopError(
                f"model.num_heads {self.num_heads} is not divisible by model.num_kv_heads {self.num_kv_heads}; "
                "each key-value head serves the same number of query heads"
            )


class SourceConfig(_Section):
    """One set of shards made by ``megaloop prep``."""

    path: Path
    """Directory that holds data.json."""
    weight: PositiveFloat = 1.0
    """Share of the samples, relative to the other sources."""


class DataConfig(_Section):
    """Where samples come from, and how long they are."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """One or more sets of shards, mixed by weight."""
    sequence_length: PositiveInt = 2048
    """Tokens per sample (predicted tokens; a sample holds one more)."""
    prefetch: int = Field(default=4, ge=0)
    """Micro-batches read ahead in the background."""


class ParallelConfig(_Section):
    """How the model lies on ranks: pp x tp x dp."""

    pp: PositiveInt = 1
    """Pipeline stages."""
    tp: PositiveInt = 1
    """Tensor-parallel ranks per stage."""
    dp: PositiveInt | None = None
    """Data-parallel replicas; empty: what is left of the world size."""
    sequence_parallel: bool = False
    """Split the norms' regions over the tensor-parallel ranks along the sequence."""
    layer_costs: tuple[PositiveFloat, ...] | None = None
    """Seconds of embedding, one layer and head, as ``megaloop bench layers`` measures; empty: estimated by FLOPs."""

    @field_validator("layer_costs")
    @classmethod
    def _three_costs(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if value is not None and len(value) != 3:
            raise ValueError(f"needs three numbers (embedding, one layer, head); found {len(value)}")
        return value


class TrainConfig(_Section):
    """The training loop."""

    steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    global_batch: PositiveInt = 8
    """Samples per optimizer step, over all ranks."""
    micro_batch: PositiveInt = 1
    """Samples per forward pass of one rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16: bf16 weights and activations with fp32 master weights; fp32: everything in fp32."""
    recompute: Literal["none", "full", "selective"] = "none"
    """Activation checkpointing: keep all; recompute every layer; or keep matrix products and recompute the rest."""
    compile: bool = False
    """torch.compile each layer."""
    check_replicas: int = Field(default=0, ge=0)
    """Every N steps, verify that parameters which several ranks hold are bit-identical; 0: never."""


class OptimizerConfig(_Section):
    """AdamW; no decay on norms and embeddings."""

    lr: PositiveFloat = 3e-4
    """Peak learning rate."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices."""
    clip: float = Field(default=1.0, ge=0)
    """Largest gradient norm over the whole model; 0: no clipping."""


class ScheduleConfig(_Section):
    """Learning rate over the run."""

    kind: Literal["trapezoid", "cosine"] = "trapezoid"
    """trapezoid: warm-up, stable, linear cooldown (arXiv 2405.18392); cosine: warm-up, then half a cosine."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""
    cooldown: float = Field(default=0.15, ge=0, le=1)
    """Fraction of the run over which the trapezoid falls."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a fraction of the peak."""


class ValidationConfig(_Section):
    """Held-out loss during the run."""

    every: int = Field(default=0, ge=0)
    """Steps between validations; 0: only at the end."""
    samples: PositiveInt = 64
    """Validation samples to use at most (rounded down to whole micro-batches over dp)."""


class CheckpointConfig(_Section):
    """When checkpoints are written, and how many stay."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep: PositiveInt = 3
    """Newest checkpoints to keep."""


class LoggingConfig(_Section):
    """What the run writes while it trains."""

    every: PositiveInt = 1
    """Steps between plain log lines (metrics.jsonl gets every step)."""
    tensorboard: bool = True
    """Write TensorBoard event files to RUN/tensorboard."""


class Config(_Section):
    """Everything a run needs to know; written to RUN/config.yaml as resolved."""

    name: str = Field(default="run", min_length=1, pattern=r"^[^/\x00]+$")
    """Name of the run."""
    run_dir: Path | None = None
    """Where the run writes; empty: runs/NAME."""
    init: Path | None = None
    """Checkpoint (or run) whose weights a new run starts from; its moments, step and data position are not taken."""
    seed: int = Field(default=0, ge=0)
    """Seed of the initial weights and of the sample order."""
    depth: str = "32"
    """Layers: 24, or a loop such as 4-4x4-4."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @field_validator("depth", mode="before")
    @classmethod
    def _depth_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def plan(self) -> DepthPlan:
        """The depth plan that ``depth`` spells."""
        return DepthPlan.parse(self.depth)

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run_dir or Path("runs") / self.name

    def check(self) -> None:
        """Raise MegaloopError where single values are fine but do not fit together (no files are read)."""
        self.model.check()
        plan = self.plan
        if plan.is_looped:
            raise MegaloopError(
                f"depth: {self.depth} runs layers several times; training loops needs pipeline rounds, which are not "
                f"there yet: use a plain number of layers, for example {plan.depth}"
            )
        parallel, model, train = self.parallel, self.model, self.train
        for what, value in (
            ("num_heads", model.num_heads),
            ("num_kv_heads", model.num_kv_heads),
            ("ffn_size", model.ffn_size),
        ):
            if value % parallel.tp:
                raise MegaloopError(
                    f"parallel.tp {parallel.tp} does not divide model.{what} {value}; choose a tp that divides it"
                )
        if model.vocab_size is not None:
            self.check_vocab(model.vocab_size)
        if parallel.sequence_parallel and self.data.sequence_length % parallel.tp:
            raise MegaloopError(
                f"parallel.sequence_parallel: tp {parallel.tp} does not divide "
                f"data.sequence_length {self.data.sequence_length}"
            )
        if parallel.pp > plan.depth:
            raise MegaloopError(
                f"parallel.pp {parallel.pp} is more pipeline ranks than the {plan.depth} layers of depth {self.depth}; "
                f"use pp <= {plan.depth} or a deeper model"
            )
        if parallel.dp is not None and train.global_batch % (train.micro_batch * parallel.dp):
            raise _batch_error(train, parallel.dp)
        if self.schedule.warmup_steps > train.steps:
            raise MegaloopError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is more than train.steps {train.steps}"
            )

    def check_vocab(self, rows: int) -> None:
        """Raise MegaloopError where the embedding's rows do not divide over the tensor-parallel ranks."""
        tp = self.parallel.tp
        if rows % tp:
            raise MegaloopError(
                f"parallel.tp {tp} does not divide the vocabulary of {rows} rows; "
                f"set model.vocab_size to a multiple, for example {-(-rows // tp) * tp}"
            )

    def topology(self, world_size: int) -> tuple[int, int, int]:
        """(pp, tp, dp) on ``world_size`` ranks.

        Raises:
            MegaloopError: the world size does not factor, or the global batch does not divide over dp.
        """
        pp, tp = self.parallel.pp, self.parallel.tp
        dp = self.parallel.dp or max(world_size // (pp * tp), 1)
        if pp * tp * dp != world_size:
            raise MegaloopError(
                f"parallel: pp {pp} x tp {tp} x dp {dp} makes {pp * tp * dp} ranks, but {world_size} were started; "
                "start that many, or change the topology"
            )
        if self.train.global_batch % (self.train.micro_batch * dp):
            raise _batch_error(self.train, dp)
        return pp, tp, dp

    def to_yaml(self) -> str:
        """The configuration as YAML that :func:`load_config` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _batch_error(train: TrainConfig, dp: int) -> MegaloopError:
    unit = train.micro_batch * dp
    return MegaloopError(
        f"train.global_batch {train.global_batch} is not a multiple of "
        f"micro_batch {train.micro_batch} x dp {dp} = {unit}; "
        f"choose for example {-(-train.global_batch // unit) * unit}"
    )


def parse_override(text: str) -> tuple[list[str], Any]:
    """``"train.steps=10"`` as (["train", "steps"], 10); the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise MegaloopError(f"override {text!r}: expected key=value, for example train.steps=100")
    try:
        return key.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise MegaloopError(f"override {text!r}: the value is not YAML ({_one_line(error)})") from None


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply ``key.sub=value`` overrides, validate.

    Raises:
        MegaloopError: no such file, not YAML, an unknown key (the nearest known one is named), a bad value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MegaloopError(f"configuration {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MegaloopError(f"configuration {path}: cannot be read ({_one_line(error)})") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MegaloopError(f"configuration {path}: not YAML ({_one_line(error)})") from None
    if not isinstance(values, dict):
        raise MegaloopError(f"configuration {path}: expected a mapping of keys, found {type(values).__name__}")
    for override in overrides:
        keys, value = parse_override(override)
        _set(values, keys, value, override)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise MegaloopError(f"configuration {path}: {_explain(error)}") from None
    config.check()
    return config


def _set(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    node: Any = values
    for key in keys[:-1]:
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
            continue
        if not isinstance(node, dict):
            raise MegaloopError(f"override {override!r}: {key!r} lies under a value that is no section")
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
    if isinstance(node, list) and keys[-1].isdigit() and int(keys[-1]) < len(node):
        node[int(keys[-1])] = value
    elif isinstance(node, dict):
        node[keys[-1]] = value
    else:
        raise MegaloopError(f"override {override!r}: {keys[-1]!r} lies under a value that is no section")


def _known_keys(model: type[BaseModel], prefix: str = "") -> dict[str, None]:
    """Dotted names of all fields, parents first."""
    names: dict[str, None] = {}
    for name, info in model.model_fields.items():
        names[prefix + name] = None
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            names.update(_known_keys(annotation, f"{prefix}{name}."))
        elif annotation == tuple[SourceConfig, ...]:
            names.update(_known_keys(SourceConfig, f"{prefix}{name}."))
    return names


def _explain(error: ValidationError) -> str:
    """The first problem of a validation error, as one line."""
    first: Mapping[str, Any] = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        return (
            f"{where}: {first['msg']} (found {first['input']!r})" if first["type"] != "missing" else f"{where}: missing"
        )
    plain = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
    known = list(_known_keys(Config))
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.0)
    parent, _, leaf = plain.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    same_section = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    best = ".".join(filter(None, [parent, same_section[0]])) if same_section else near[0]
    return f"unknown key {where!r}; did you mean {best!r}?"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
