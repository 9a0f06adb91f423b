"""The algebra of depth: which layers run, in which order, and how that order grows. Pure Python, no torch."""

from megaloop.depth.counts import LoopCounts
from megaloop.depth.growth import Growth, InsertAt, Operator, before_growth, copied_block, grow
from megaloop.depth.loops import Execution, loop, reorder, unloop, untie, with_inference_loop
from megaloop.depth.plan import DepthPlan, LayerCall, Loop, LoopStyle
from megaloop.depth.schedule import GrowthStage, RunFlops, growth_stages, run_flops, stage_at, stages_between
from megaloop.depth.spec import DepthSpec

__all__ = [
    "DepthPlan",
    "DepthSpec",
    "Execution",
    "Growth",
    "GrowthStage",
    "InsertAt",
    "LayerCall",
    "Loop",
    "LoopCounts",
    "LoopStyle",
    "Operator",
    "RunFlops",
    "before_growth",
    "copied_block",
    "grow",
    "growth_stages",
    "loop",
    "reorder",
    "run_flops",
    "stage_at",
    "stages_between",
    "unloop",
    "untie",
    "with_inference_loop",
]
