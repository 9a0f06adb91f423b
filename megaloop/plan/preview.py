"""``megaloop plan``: what a run will do, take and move, worked out before any rank starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megaloop.config import Config
from megaloop.data.description import DATA_JSON
from megaloop.data.sources import embedding_rows, open_sources
from megaloop.depth import DepthPlan, GrowthStage, run_flops
from megaloop.depth.flops import flops_per_token, head_flops, layer_flops, parameters
from megaloop.errors import MegaloopError
from megaloop.layout.partition import StageMap, split_rounds
from megaloop.layout.placement import Placement
from megaloop.layout.rounds import Rounds
from megaloop.layout.topology import Topology
from megaloop.layout.transfers import Reshard, transfers
from megaloop.model.parameters import parameter_specs
from megaloop.plan.activations import element_bytes
from megaloop.plan.memory import RankBudget, rank_budgets
from megaloop.plan.timeline import StepPicture, draw_text
from megaloop.text import format_bytes

__all__ = ["Boundary", "RunPreview", "StagePreview", "pictures", "preview", "show", "show_timeline"]


@dataclass(frozen=True)
class Boundary:
    """What moves between ranks when the run grows into a stage.

    Attributes:
        moved: bytes, over all ranks.
        largest_receive: bytes that the rank with the most to receive receives.
        in_place: bytes that ranks need and hold already, over all ranks.
    """

    moved: int
    largest_receive: int
    in_place: int

    @classmethod
    def of(cls, reshard: Reshard) -> Boundary:
        received = reshard.received()
        return cls(sum(received), max(received), sum(reshard.in_place))


@dataclass(frozen=True)
class StagePreview:
    """One growth stage of a run.

    Attributes:
        first_step, stop: the optimizer steps, [first_step, stop), counted from 0.
        depth: layers and loop, by places: 24, or 4-4x4-4.
        layers: ids in the order in which they run.
        mean_times: how often the loop runs on average, as far as it is drawn; None otherwise.
        parameters: of the whole model.
        micro_batches: per step and data-parallel rank.
        bubble: fraction of a step in which a pipeline stage waits, if all slices take equally long.
        waiting: fraction in which it waits with the slices as they are.
        estimated: a step has too many micro-batches to simulate; ``waiting`` is extrapolated from fewer.
        flops_per_step: model FLOPs, forward and backward, over all ranks; on average, where the loop's count is drawn.
        flops: of all the stage's steps.
        grows: it has more layers than the stage before.
        boundary: what moves at the change into the stage; None for the first.
        forward_flops, backward_flops: of one micro-batch's passes, by round and pipeline rank.
        ranks: what a rank of each pipeline stage holds.
    """

    first_step: int
    stop: int
    depth: str
    layers: tuple[int, ...]
    mean_times: float | None
    parameters: int
    topology: Topology
    micro_batches: int
    bubble: float
    waiting: float
    estimated: bool
    flops_per_step: int
    flops: int
    grows: bool
    boundary: Boundary | None
    forward_flops: tuple[tuple[int, ...], ...]
    backward_flops: tuple[tuple[int, ...], ...]
    ranks: tuple[RankBudget, ...]

    @property
    def worst(self) -> RankBudget:
        """A rank of the pipeline stage that holds most."""
        return max(self.ranks, key=lambda rank: rank.total)


@dataclass(frozen=True)
class RunPreview:
    """A whole run.

    Attributes:
        ranks: how many the plan is for.
        assumed: nobody said how many, and the configuration leaves dp open: the fewest on which it fits.
        vocab_size: rows of the embedding.
        tokens: predicted, over all steps.
        full_depth_flops: what as many steps at the depth that the run grows to would cost.
        matched_steps: steps at that depth that cost as much as this run.
    """

    name: str
    precision: str
    recompute: str
    ranks: int
    assumed: bool
    vocab_size: int
    tokens: int
    full_depth_flops: int
    matched_steps: int
    stages: tuple[StagePreview, ...]

    @property
    def flops(self) -> int:
        """Of the whole run: model FLOPs, forward and backward."""
        return sum(stage.flops for stage in self.stages)

    @property
    def fraction(self) -> float:
        """The run's FLOPs as a fraction of the full-depth run's."""
        return self.flops / self.full_depth_flops

    @property
    def saved_percent(self) -> float:
        """What growing saves of the full-depth run's FLOPs."""
        return 100 * (1 - self.fraction)

    def to_json(self) -> dict[str, Any]:
        """Everything as one value that JSON can hold; bytes, FLOPs and steps as they are."""
        values = asdict(self) | {"flops": self.flops, "fraction": self.fraction, "saved_percent": self.saved_percent}
        for stage, written in zip(self.stages, values["stages"], strict=True):
            for rank, memory in zip(stage.ranks, written["ranks"], strict=True):
                memory["total"] = rank.total
            written["worst_rank"] = {
                "pipeline_rank": stage.ranks.index(stage.worst),
                **asdict(stage.worst),
                "total": stage.worst.total,
            }
        return values


def preview(config: Config, ranks: int | None = None) -> RunPreview:
    """Work out a run on ``ranks`` ranks (default: the fewest on which its topologies fit).

    Raises:
        MegaloopError: a stage has no topology on that number of ranks, or the vocabulary's size is not known.
    """
    world_size = config.smallest_world if ranks is None else ranks
    config.check_world(world_size)
    vocab_size = _vocab_size(config)
    tokens_per_step = config.train.global_batch * config.data.sequence_length
    costs = run_flops(
        config.stages,
        config.model,
        config.data.sequence_length,
        tokens_per_step,
        vocab_size=vocab_size,
        counts=config.loop_counts,
        backprop=config.loop.backprop,
        gate=config.loop.gate_training,
    )
    return RunPreview(
        name=config.name,
        precision=config.train.precision,
        recompute=config.train.recompute,
        ranks=world_size,
        assumed=ranks is None and config.leaves_dp_open,
        vocab_size=vocab_size,
        tokens=config.train.steps * tokens_per_step,
        full_depth_flops=costs.full_depth,
        matched_steps=costs.matched_steps,
        stages=tuple(_stages(config, world_size, vocab_size, costs.stages)),
    )


def _vocab_size(config: Config) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    try:
        sources = open_sources(config.data, config.init)
    except MegaloopError as error:
        if not _is_missing(config):
            raise  # it is the data that has to be fixed, or what the configuration says of it
        raise MegaloopError(
            f"the vocabulary's size is not known without the data ({error}); set model.vocab_size, for example 49152"
        ) from None
    return embedding_rows(config, sources)


def _is_missing(config: Config) -> bool:
    """Data, tokenizer or checkpoint are not on this machine: there may be none where a run is planned."""
    inside = DATA_JSON if config.data.format == "tokens" else ""
    named = [config.data.tokenizer, config.init, *(source.path / inside for source in config.data.sources)]
    return not all(path is None or path.exists() for path in named)


def _stages(config: Config, world_size: int, vocab_size: int, costs: Sequence[int]) -> Iterator[StagePreview]:
    before: Placement | None = None
    for stage, flops in zip(config.stages, costs, strict=True):
        plan = stage.plan
        topology = Topology(*config.topology(world_size, plan.layers))
        specs = parameter_specs(config.model, plan, vocab_size)
        split = split_rounds(config, plan, topology, vocab_size)
        placement = Placement.of(specs, plan, topology, split)
        rounds = Rounds(topology.pp, config.train.micro_batches(topology.dp), len(split))
        forward, backward = _pass_flops(config, plan, split, vocab_size)
        step = StepPicture("", rounds, forward, backward)
        yield StagePreview(
            first_step=stage.first_step,
            stop=stage.stop,
            depth=plan.notation,
            layers=plan.order,
            mean_times=_mean_times(config, stage),
            parameters=parameters(plan, config.model, vocab_size=vocab_size),
            topology=topology,
            micro_batches=rounds.micro_batches,
            bubble=rounds.bubble,
            waiting=step.waiting if topology.pp > 1 else 0.0,
            estimated=topology.pp > 1 and bool(step.note),
            flops_per_step=round(flops / stage.steps),
            flops=flops,
            grows=before is not None and plan.layers > before.plan.layers,
            forward_flops=forward,
            backward_flops=backward,
            boundary=None if before is None else _boundary(config, before, placement, stage),
            ranks=rank_budgets(config, specs, plan, topology, split),
        )
        before = placement


def _mean_times(config: Config, stage: GrowthStage) -> float | None:
    """How often a stage's loop runs on average, where that is drawn."""
    if stage.plan.loop is None or config.loop_iterations(stage.plan, stage.first_step) is None:
        return None
    drawn = config.loop_counts.of(stage.plan.loop.iterations).drawn(stage.first_step, stage.stop)
    return sum(iterations * steps for iterations, steps in drawn.items()) / stage.steps


def _pass_flops(
    config: Config, plan: DepthPlan, slices: StageMap, vocab_size: int
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """FLOPs of one micro-batch's forward and backward passes, by round and pipeline rank; the last has the head."""
    tokens = config.train.micro_batch * config.data.sequence_length
    if plan.style.gate:  # trained on one rank, in one round
        shape, length = config.model, config.data.sequence_length
        whole = flops_per_token(
            plan, shape, length, vocab_size=vocab_size, recompute=config.train.recompute, gate=config.loop.gate_training
        )
        return ((tokens * whole.forward,),), ((tokens * (whole.hardware - whole.forward),),)
    layer = tokens * layer_flops(config.model, config.data.sequence_length)
    head = tokens * head_flops(config.model, vocab_size)
    live = [not call.is_frozen(config.loop.backprop) for call in plan.calls()]
    forward = [[(stop - start) * layer for start, stop in slice_] for slice_ in slices]
    again = 3 if config.train.recompute == "full" else 2
    backward = [[sum(live[start:stop]) * layer * again for start, stop in slice_] for slice_ in slices]
    forward[-1][-1] += head
    backward[-1][-1] += 2 * head
    return tuple(map(tuple, forward)), tuple(map(tuple, backward))


def pictures(run: RunPreview) -> list[StepPicture]:
    """A step of each growth stage that has a pipeline."""
    return [
        StepPicture(
            f"Stage {number}: {_depth(stage)}, {stage.topology}",
            Rounds(stage.topology.pp, stage.micro_batches, len(stage.forward_flops)),
            stage.forward_flops,
            stage.backward_flops,
        )
        for number, stage in enumerate(run.stages, 1)
        if stage.topology.pp > 1
    ]


def show_timeline(run: RunPreview, console: Console) -> None:
    """Print how the pipeline works on a step, stage by stage, where there is one."""
    for picture in pictures(run):
        console.print()
        console.print(draw_text(picture, console.width), soft_wrap=True)
    legend = "digits: forward passes, by micro-batch; letters: backward passes; dots: waiting"
    console.print(Text(legend if pictures(run) else "no stage has a pipeline (pp 1): nothing to draw", "dim"))


def _boundary(config: Config, before: Placement, after: Placement, stage: GrowthStage) -> Boundary:
    moments = config.growth.moments if config.growth else "copy"
    return Boundary.of(transfers(before, after, stage.growth, weight_bytes=element_bytes(config), moments=moments))


def show(run: RunPreview, console: Console) -> None:
    """Print a run for a person."""
    console.print(_headline(run))
    for number, stage in enumerate(run.stages, 1):
        console.print()
        console.print(_stage(number, stage, run))
    console.print()
    console.print(_summary(run))


def _headline(run: RunPreview) -> RenderableType:
    line = Text.assemble((run.name, "bold"), f": {_count(run.ranks, 'rank')}, {run.precision}, ")
    line.append(f"recompute {run.recompute}, vocabulary {run.vocab_size:,}")
    if not run.assumed:
        return line
    note = "dp is left open: planned for the fewest ranks that fit; --ranks N for more"
    return Group(line, Text(note, "yellow"))


def _stage(number: int, stage: StagePreview, run: RunPreview) -> RenderableType:
    title = Text(f"Stage {number} of {len(run.stages)}", "bold")
    title.append(
        f"  steps [{stage.first_step:,}, {stage.stop:,})  {_depth(stage)}  {_short(stage.parameters)} parameters",
        "not bold",
    )
    rounds = len(stage.forward_flops)
    waits = f", {_count(rounds, 'round')}" if rounds > 1 else ""
    waits += f", bubble {stage.bubble:.1%}" if stage.topology.pp > 1 else ""
    waits += " (the step is too long to simulate: waiting is estimated)" if stage.estimated else ""
    facts = [
        f"{stage.topology}; {_count(stage.micro_batches, 'micro-batch', 'micro-batches')} per step and dp rank{waits}",
        f"{_flops(stage.flops_per_step)} per step, {_flops(stage.flops)} in the stage",
    ]
    if stage.mean_times is not None:
        facts.append(f"the loop runs {stage.mean_times:.2f} times on average, as drawn for these steps")
    if stage.boundary is not None:
        facts.append(
            f"{'growth' if stage.grows else 'the change of depth'} moves {format_bytes(stage.boundary.moved)}, "
            f"{format_bytes(stage.boundary.largest_receive)} at most to a rank; "
            f"{format_bytes(stage.boundary.in_place)} in place"
        )
    lines = [Text(f"  {fact}") for fact in facts]
    if stage.waiting > stage.bubble + 0.1:
        lines.append(Text(f"  {_uneven(stage)}", "yellow"))
    return Group(title, *lines, Padding(_memory(stage), (0, 0, 0, 2), expand=False))


def _uneven(stage: StagePreview) -> str:
    """What slices that are not even cost, and what to choose instead."""
    line = f"slices are uneven: ranks wait {stage.waiting:.0%} of a step, with even ones {stage.bubble:.0%}; "
    loop = DepthPlan(stage.layers).loop
    if loop is not None and loop.block < stage.topology.pp:
        return line + (
            f"the loop has {_count(loop.block, 'layer')} for {stage.topology.pp} pipeline ranks: "
            f"use pp {loop.block} and more dp, or loop more layers"
        )
    return line + "fewer pipeline ranks and more dp would balance better"


def _depth(stage: StagePreview) -> str:
    """24 layers, or 4-4x4-4 (12 layers, 24 deep)."""
    layers = len(set(stage.layers))
    looped = len(stage.layers) > layers
    return f"{stage.depth} ({_count(layers, 'layer')}, {len(stage.layers)} deep)" if looped else _count(layers, "layer")


def _memory(stage: StagePreview) -> Table:
    """Per pipeline stage: its layers, and what each of its ranks holds."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("pp", justify="right")
    table.add_column("layer ids")
    for name in ("params", "weights", "grads", "optimizer", "activations", "rank"):
        table.add_column(name, justify="right", no_wrap=True)
    for pp, rank in enumerate(stage.ranks):
        sizes = [rank.weights, rank.gradients, rank.optimizer, rank.activations]
        table.add_row(
            str(pp),
            _ranges(rank.layers),
            _short(rank.parameters),
            *map(format_bytes, sizes),
            Text(format_bytes(rank.total), "bold" if rank.total == stage.worst.total else ""),
        )
    return table


def _summary(run: RunPreview) -> RenderableType:
    steps = run.stages[-1].stop
    lines = Text.assemble(("Whole run", "bold"), f"  {steps:,} steps, {_short(run.tokens)} tokens, {_flops(run.flops)}")
    if len(run.stages) > 1:
        lines.append(
            f"\n  {run.fraction:.1%} of the FLOPs of {steps:,} full-depth steps: growing saves {run.saved_percent:.1f}%"
            f"\n  {run.matched_steps:,} full-depth steps cost as much (the FLOPs-matched baseline)"
        )
    worst = max((stage.worst for stage in run.stages), key=lambda rank: rank.total)
    lines.append(f"\n  at most {format_bytes(worst.total)} on a rank; buffers of collectives come on top")
    return lines


def _ranges(ids: Sequence[int]) -> str:
    """Layer ids in their order, runs of consecutive ones shortened: 0-3, 8-11, 4."""
    runs: list[list[int]] = []
    for layer_id in ids:
        if runs and layer_id == runs[-1][-1] + 1:
            runs[-1].append(layer_id)
        else:
            runs.append([layer_id])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def _flops(value: int) -> str:
    return f"{value:.3g} FLOPs".replace("e+", "e")


def _short(value: int) -> str:
    """Three significant digits with K, M, B or T: 361M."""
    for factor, suffix in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if value >= factor * 0.9995:
            scaled = value / factor
            return f"{scaled:.{max(0, 2 - (scaled >= 9.995) - (scaled >= 99.95))}f}{suffix}"
    return str(value)
