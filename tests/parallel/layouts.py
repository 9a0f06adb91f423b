"""What ranks run in these tests, and the plain single-process loop that they are held against."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from megaloop.config import Config
from megaloop.data import MicroBatch
from megaloop.layout.sources import InitialValues
from megaloop.layout.topology import Topology
from megaloop.model import Decoder, initial_values, vocab_parallel_cross_entropy
from megaloop.model.parameters import parameter_specs
from megaloop.parallel import rounds_engine
from megaloop.parallel.engine import TrainingEngine, join_ranks
from tests.norm_scaling import counted, scale_outputs

VOCAB = 128
LR = 2e-3


def configuration(pp: int = 1, tp: int = 1, dp: int = 1, *, sp: bool = False, **changes: Any) -> dict[str, Any]:
    """A small decoder with grouped-query attention on pp x tp x dp ranks; ``section__key=value`` changes a field."""
    values: dict[str, Any] = {
        "depth": "4",
        "model": {"hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96},
        "data": {"sources": [{"path": "synthetic"}], "sequence_length": 32},
        "parallel": {"pp": pp, "tp": tp, "dp": dp, "sequence_parallel": sp},
        "train": {"steps": 20, "global_batch": 8, "micro_batch": 2, "precision": "fp32"},
        "optimizer": {"lr": LR, "clip": 0.5},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            values[section][field] = value
        else:
            values[section] = value
    return values


def batch(config: Config, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets and document indices of a step's global batch: learnable, the same everywhere."""
    generator = torch.Generator().manual_seed(1000 + step)
    length = config.data.sequence_length
    start = torch.randint(0, VOCAB, (config.train.global_batch, 1), generator=generator)
    stride = torch.randint(1, 4, (config.train.global_batch, 1), generator=generator)
    tokens = (start + stride * torch.arange(length + 1)) % VOCAB
    documents = (torch.arange(length, dtype=torch.int32) // 10).expand(config.train.global_batch, length)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents.contiguous()


def micro_batches(config: Config, dp_rank: int, dp: int, first: int = 0) -> Iterator[MicroBatch]:
    """One data-parallel rank's micro-batches from step ``first`` on, as the engine takes them."""
    for step in range(first, config.train.steps + 1):
        tokens, targets, documents = (x.chunk(dp)[dp_rank] for x in batch(config, step))
        for part in zip(*(x.split(config.train.micro_batch) for x in (tokens, targets, documents)), strict=True):
            yield MicroBatch.of(*part)


def train_layout(values: dict[str, Any]) -> dict[str, Any]:
    """On every rank: train, evaluate, compare replicas."""
    config = Config.model_validate(values)
    topology = Topology(*config.topology(join_ranks()))
    engine = TrainingEngine(
        config, config.plan, topology, VOCAB, InitialValues(config.model, config.seed, config.plan, VOCAB)
    )
    at = engine.coordinate
    batches = micro_batches(config, at.dp, topology.dp)
    iterations = [config.loop_iterations(config.plan, step) for step in range(config.train.steps)]
    results = [engine.train_step(batches, config.optimizer.lr, iteration) for iteration in iterations]
    evaluated = engine.evaluate(batches, engine.micro_batches)
    differing = engine.differing_replicas()
    engine.close()
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "evaluated": evaluated,
        "differing": differing,
    }


def drifting_replica(values: dict[str, Any], state_name: str, name: str, rank: int) -> list[str]:
    """Change one element of one rank's state; returns what the check finds."""
    config = Config.model_validate(values)
    topology = Topology(*config.topology(join_ranks()))
    engine = TrainingEngine(
        config, config.plan, topology, VOCAB, InitialValues(config.model, config.seed, config.plan, VOCAB)
    )
    if dist.get_rank() == rank:
        mine = next(piece for piece in engine.pieces() if (piece.state_name, piece.piece.name) == (state_name, name))
        mine.data.view(-1)[-1] += 1e-3
    found = engine.differing_replicas()
    engine.close()
    return found


def held_bytes(values: dict[str, Any]) -> dict[str, int]:
    """On every rank: bytes of an engine's state at the end of a step's last backward pass, each storage once.

    ``logits``: how many micro-batches' logits are alive when the loss is computed, at most.
    """
    config = Config.model_validate(values)
    topology = Topology(*config.topology(join_ranks()))
    engine = TrainingEngine(
        config, config.plan, topology, VOCAB, InitialValues(config.model, config.seed, config.plan, VOCAB)
    )
    deepspeed = inner_engine(engine)
    parameters = [local.parameter for local in engine.parameters]
    found: dict[str, int] = {"logits": 0}
    reductions = {name: getattr(deepspeed, name) for name in ("allreduce_gradients", "buffered_allreduce_fallback")}
    loss_of, seen = deepspeed.module.loss_fn, list[weakref.ref[torch.Tensor]]()

    def measure(name: str, *arguments: Any, **options: Any) -> Any:
        if "weights" not in found:
            adam = deepspeed.optimizer.optimizer
            masters = [flat for group in adam.param_groups for flat in group["params"]]
            moments = [adam.state[flat][moment] for flat in masters for moment in ("exp_avg", "exp_avg_sq")]
            sums = [parameter._hp_grad for parameter in parameters if hasattr(parameter, "_hp_grad")]
            found["parameters"] = sum(parameter.numel() for parameter in parameters)
            found["weights"] = _bytes([parameter.data for parameter in parameters])
            found["gradients"] = _bytes(
                [parameter.grad for parameter in parameters if parameter.grad is not None] + sums
            )
            found["optimizer"] = _bytes(masters + moments)
        return reductions[name](*arguments, **options)

    def measured_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(weakref.ref(logits))
        found["logits"] = max(found["logits"], sum(item() is not None for item in seen))
        result: torch.Tensor = loss_of(logits, targets)
        return result

    for name in reductions:
        setattr(deepspeed, name, partial(measure, name))
    deepspeed.module.loss_fn = measured_loss
    engine.train_step(micro_batches(config, engine.coordinate.dp, topology.dp), LR)
    engine.close()
    return found


def peak_bytes(values: dict[str, Any]) -> int:
    """On every rank: the most that a step, the second, has allocated and not yet freed at a time."""
    config = Config.model_validate(values)
    topology = Topology(*config.topology(join_ranks()))
    engine = TrainingEngine(
        config, config.plan, topology, VOCAB, InitialValues(config.model, config.seed, config.plan, VOCAB)
    )
    batches = micro_batches(config, engine.coordinate.dp, topology.dp)
    engine.train_step(batches, LR)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        engine.train_step(batches, LR)
    engine.close()
    events: Any = profile.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def reduced_gradients(values: dict[str, Any]) -> dict[str, float]:
    """On every rank: the gradients with which a bf16 run's optimizer steps, before clipping, and how they came about.

    Returns:
        beyond_bf16: fraction of them that bf16 cannot hold.
        off: the largest difference from the mean over replicas, in fp32, of what each had added up.
    """
    config = Config.model_validate(values)
    topology = Topology(*config.topology(join_ranks()))
    engine = TrainingEngine(
        config, config.plan, topology, VOCAB, InitialValues(config.model, config.seed, config.plan, VOCAB)
    )
    deepspeed = inner_engine(engine)
    reduce, step, replicas = (
        deepspeed._bf16_reduce_grads, deepspeed.optimizer.step, deepspeed.grid.get_data_parallel_group(),
    )  # fmt: skip
    before: list[torch.Tensor] = []
    found: dict[str, float] = {}

    def gradients() -> list[torch.Tensor]:
        return [item.clone() for item in deepspeed.optimizer.get_grads_for_reduction()[0]]

    def watched_reduce() -> None:
        before[:] = gradients()
        reduce()

    def watched_step(*arguments: Any, **options: Any) -> None:
        after = torch.cat(gradients())
        expected = torch.cat(before)
        dist.all_reduce(expected, group=replicas)
        expected /= topology.dp
        found["beyond_bf16"] = float((after != after.bfloat16().float()).float().mean())
        found["off"] = float((after - expected).abs().max())
        step(*arguments, **options)

    deepspeed._bf16_reduce_grads, deepspeed.optimizer.step = watched_reduce, watched_step
    engine.train_step(micro_batches(config, engine.coordinate.dp, topology.dp), LR)
    engine.close()
    return found


def inner_engine(engine: TrainingEngine) -> Any:
    """DeepSpeed's engine, of which some tests look at what it holds."""
    step_engine: Any = engine._engine
    return step_engine.inner


def _bytes(tensors: list[torch.Tensor]) -> int:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def train_plainly(values: dict[str, Any]) -> dict[str, Any]:
    """The same training in one process with nothing but torch: no DeepSpeed, no pipeline, no parallelism."""
    config = Config.model_validate(values)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    specs = parameter_specs(config.model, config.plan, VOCAB)
    # LN-scaling in another way than the decoder's: factors of outputs, not of gains
    model = Decoder(config.model.model_copy(update={"norm_scaling": False}), VOCAB, config.plan)
    if config.model.norm_scaling:
        scale_outputs(model, counted(sorted(set(config.plan.order))))
    masters = {
        name: initial_values(name, specs[name], config.seed, (0,) * len(specs[name].shape), specs[name].shape)
        for name, _ in model.named_parameters()
    }
    model.to(dtype)
    parameters = dict(model.named_parameters())
    options = config.optimizer
    groups = [
        {"params": [masters[n] for n in masters if specs[n].decay], "weight_decay": options.weight_decay},
        {"params": [masters[n] for n in masters if not specs[n].decay], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=options.lr, betas=(options.beta1, options.beta2), eps=options.eps)
    losses, norms = [], []

    def take_masters() -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(masters[name])

    for step in range(config.train.steps):
        take_masters()
        tokens, targets, documents = batch(config, step)
        model.backprop, calls = config.loop.backprop, config.plan.calls(config.loop_iterations(config.plan, step))
        # in bf16 each micro-batch's gradient is rounded by its layers, as in any run; only their sum is exact
        size = config.train.micro_batch if dtype == torch.bfloat16 else config.train.global_batch
        parts = list(zip(*(x.split(size) for x in (tokens, targets, documents)), strict=True))
        adam.zero_grad()
        total = 0.0
        for part_tokens, part_targets, part_documents in parts:
            logits = model(part_tokens, part_documents if config.model.document_masking else None, calls=calls)
            loss = vocab_parallel_cross_entropy(logits, part_targets, model.tp) / len(parts)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                before = masters[name].grad
                masters[name].grad = gradient.float() if before is None else before + gradient.float()
            total += float(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters.values(), options.clip or float("inf"))))
        adam.step()
        losses.append(total)
    take_masters()
    tokens, targets, documents = batch(config, config.train.steps)
    with torch.no_grad():
        logits = model(tokens, documents if config.model.document_masking else None)
        evaluated = float(vocab_parallel_cross_entropy(logits, targets, model.tp))
    return {"losses": losses, "norms": norms, "evaluated": evaluated}


def most_messages(values: dict[str, Any], count: int) -> tuple[int, int]:
    """Messages of a direction that this rank held at most, in a training step and in a validation of ``count`` micro-batches."""
    config = Config.model_validate(values)
    topology = Topology(*config.topology(join_ranks()))
    engine = TrainingEngine(
        config, config.plan, topology, VOCAB, InitialValues(config.model, config.seed, config.plan, VOCAB)
    )
    most, sent = [0], rounds_engine._Step._send

    def sending(step: rounds_engine._Step, *arguments: Any, **options: Any) -> None:
        sent(step, *arguments, **options)
        most[0] = max(most[0], *(len(queue) for queue in step._sent.values()))

    rounds_engine._Step._send = sending  # type: ignore[method-assign, assignment]
    try:
        batches = itertools.cycle(micro_batches(config, engine.coordinate.dp, topology.dp))
        engine.train_step(batches, LR)
        training, most[0] = most[0], 0
        engine.evaluate(batches, count)
    finally:
        rounds_engine._Step._send = sent  # type: ignore[method-assign]
        engine.close()
    return training, most[0]
