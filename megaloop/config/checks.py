"""Whether the sections of a configuration fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megaloop.config.data import DataConfig
from megaloop.config.depth import GateConfig, GrowthConfig, LoopConfig
from megaloop.depth import DepthPlan
from megaloop.errors import MegaloopError

if TYPE_CHECKING:
    from megaloop.config.run import Config


__all__ = ["check"]


def check(config: Config) -> None:
    """Raise MegaloopError where single values are fine but do not fit together (no files are read)."""
    config.model.check()
    _check_loops(config)
    for stage in config.stages:
        _check_parallel(config, stage.plan)
    if config.model.vocab_size is not None:
        config.check_vocab(config.model.vocab_size)
    if config.parallel.rounds > 1 and not any(
        config.parallel_at(stage.plan.layers)[0] > 1 and not stage.plan.is_looped for stage in config.stages
    ):
        raise MegaloopError(
            f"parallel.rounds {config.parallel.rounds}: rounds are for pipelines of unlooped models (a loop sets its own); "
            "set parallel.pp to 2 or more, or leave rounds out"
        )
    for stage in config.stages:
        dp = config.parallel_at(stage.plan.layers)[2]
        if dp is not None:
            config.train.micro_batches(dp)  # refuses a batch that does not divide
    if config.schedule.warmup_steps > config.train.steps:
        raise MegaloopError(
            f"schedule.warmup_steps {config.schedule.warmup_steps} is more than train.steps {config.train.steps}"
        )
    if config.schedule.kind == "cosine" and config.schedule.decay != "linear":
        raise MegaloopError(
            f"schedule.decay {config.schedule.decay} applies only to schedule.kind trapezoid; set that, or leave decay out"
        )
    _check_weights(config)
    _check_fine_tuning(config)
    if config.growth is not None:
        _check_growth(config, config.growth)


def _check_fine_tuning(config: Config) -> None:
    """Refuse options of fine-tuning that nothing would take up, and fine-tuning without a tokenizer."""
    data, default = config.data, DataConfig.model_fields
    if data.format == "tokens":
        for name in ("prompt_field", "answer_field", "tokenizer", "validation_fraction"):
            if getattr(data, name) != default[name].default:
                raise MegaloopError(f"data.{name} applies only to data.format sft; set that, or leave it out")
    elif data.tokenizer is None and config.init is None:
        raise MegaloopError(
            "data.format sft: no tokenizer; begin with a checkpoint that has one (init=CKPT), or set data.tokenizer"
        )


def _check_weights(config: Config) -> None:
    """Refuse phases of the mixture without samples, and a cooldown's weights where there is no cooldown."""
    for phase, name in enumerate(("stable", "cooldown")):
        if not any(source.weights[phase] for source in config.data.sources):
            raise MegaloopError(f"data.sources: every weight of the {name} phase is 0; give one source a share")
    if config.cooldown_sample is None and any(len(set(source.weights)) > 1 for source in config.data.sources):
        raise MegaloopError(
            f"data.sources: weights of a cooldown, but schedule.kind {config.schedule.kind} with cooldown "
            f"{config.schedule.cooldown:g} has none; use a trapezoid with a cooldown, or give each source one weight"
        )


def _check_loops(config: Config) -> None:
    """Refuse options of loops that contradict each other, or that nothing would take up."""
    loop, plans = config.loop, [stage.plan for stage in config.stages if stage.plan.is_looped]
    if loop != LoopConfig() and not plans:
        changed = next(name for name in LoopConfig.model_fields if getattr(loop, name) != getattr(LoopConfig(), name))
        raise MegaloopError(
            f"loop.{changed}: depth {config.depth} has no loop; use one, for example depth={_looped_example(config.plan)}, "
            "or leave it out"
        )
    for plan in plans:
        if plan.loop is None:
            if loop != LoopConfig():
                raise MegaloopError(f"loop: depth {plan} is more than one loop, which has no options")
            continue
        iterations = plan.loop.iterations
        if loop.backprop is not None and loop.backprop > iterations:
            raise MegaloopError(
                f"loop.backprop {loop.backprop} is more than the {iterations} times that {plan.notation} loops; "
                f"choose at most {iterations}, or leave it out"
            )
        if not loop.min_count <= iterations <= (loop.max_count or iterations):
            raise MegaloopError(
                f"loop: min_count {loop.min_count} and max_count {loop.max_count} exclude the {iterations} times, the mean, "
                f"that {plan.notation} loops"
            )
    if loop.gate is not None:
        _check_gate(config, loop.gate)
    if loop.backprop is not None and loop.injection == "none":
        raise MegaloopError(
            f"loop.backprop {loop.backprop} without loop.injection: no gradient would reach what comes before the loop; "
            "use loop.injection=add or concat, or leave backprop out"
        )


def _check_gate(config: Config, gate: GateConfig) -> None:
    """Refuse layouts and options under which a gate cannot be trained, and those of the other way to train it."""
    others = ("beta",) if gate.train == "frozen" else ("slope", "threshold")
    for name in others:
        if getattr(gate, name) != GateConfig.model_fields[name].default:
            raise MegaloopError(f"loop.gate.{name} does not apply to loop.gate.train {gate.train}; leave it out")
    for stage in config.stages:
        pp, tp, _, where = config.parallel_at(stage.plan.layers)
        if stage.plan.style.gate and (pp > 1 or tp > 1):
            raise MegaloopError(
                f"loop.gate: a gate is trained on one pipeline rank without tensor parallelism; found {where}.pp {pp} and "
                f"tp {tp}; use pp 1, tp 1 and more dp"
            )
    if config.loop.backprop is not None:
        raise MegaloopError(
            f"loop.backprop {config.loop.backprop} with loop.gate: each iteration is read out, so gradients pass through all "
            "(frozen: through none); leave backprop out"
        )
    if gate.train == "frozen" and (config.growth is not None or config.depth_events):
        raise MegaloopError(
            "loop.gate.train frozen: the model stays as it is, but growth or depth_events would change it; leave them out"
        )
    if gate.train == "frozen" and config.init is None:
        raise MegaloopError(
            "loop.gate.train frozen: it needs a trained model; name its checkpoint with init=CKPT, or use joint"
        )


def _check_parallel(config: Config, plan: DepthPlan) -> None:
    """Refuse a topology that does not fit a plan."""
    layers = plan.layers
    pp, tp, _, where = config.parallel_at(layers)
    model = config.model
    for what, value in (
        ("num_heads", model.num_heads),
        ("num_kv_heads", model.num_kv_heads),
        ("ffn_size", model.ffn_size),
    ):
        if value % tp:
            raise MegaloopError(f"{where}.tp {tp} does not divide model.{what} {value}; choose a tp that divides it")
    if config.parallel.sequence_parallel and config.data.sequence_length % tp:
        raise MegaloopError(
            f"parallel.sequence_parallel: tp {tp} does not divide data.sequence_length {config.data.sequence_length}"
        )
    rounds = config.parallel.rounds
    if pp > 1 and plan.is_looped and plan.loop is None:
        raise MegaloopError(
            f"depth {plan} is more than one loop of neighbouring layers, which a pipeline cannot spread over ranks; "
            f"use {where}.pp=1, or a depth such as 4-4x4-4"
        )
    if pp > 1 and not plan.is_looped and rounds > 1 and pp * rounds > layers:
        raise MegaloopError(
            f"parallel.rounds {rounds} x {where}.pp {pp} makes {pp * rounds} slices, more than the {layers} layers; "
            f"use at most {max(layers // pp, 1)} rounds, or fewer pipeline ranks"
        )
    if pp > layers:
        raise MegaloopError(
            f"{where}.pp {pp} is more pipeline ranks than the {layers} layers of "
            f"{f'depth {config.depth}' if config.growth is None else 'that growth stage'}; "
            f"use pp <= {layers} or a deeper model"
        )


def _check_growth(config: Config, growth: GrowthConfig) -> None:
    """Refuse a growth during the cooldown, and topologies out of order or never reached."""
    begin = config.schedule.cooldown_start(config.train.steps)
    late = [stage for stage in config.stages[1:] if stage.first_step > begin and not stage.event]
    if config.schedule.kind == "trapezoid" and late:
        raise MegaloopError(
            f"growth: to {late[0].plan.layers} layers at step {late[0].first_step}, but the cooldown begins at step "
            f"{begin} (schedule.cooldown {config.schedule.cooldown:g}); end the growth earlier (growth.end, or the list of stages)"
        )
    counts = [stage.layers for stage in growth.topology]
    if counts != sorted(set(counts)):
        raise MegaloopError(
            f"growth.topology: layers {', '.join(map(str, counts))}; each must be more than the one before"
        )
    if counts and counts[-1] > config.plan.layers:
        raise MegaloopError(
            f"growth.topology: an entry for {counts[-1]} layers, but there are {config.plan.layers}; it is never reached"
        )


def _looped_example(plan: DepthPlan) -> str:
    block = min(4, plan.layers)
    before = (plan.layers - block) // 2
    return f"{before}-{block}x2-{plan.layers - block - before}"
