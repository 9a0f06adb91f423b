"""The algebra of depth: which layers run, in which order, and how that order grows. Pure Python, no torch."""

from megaloop.depth.growth import Growth, InsertAt, Operator, before_growth, grow
from megaloop.depth.plan import DepthPlan
from megaloop.depth.schedule import GrowthStage, RunFlops, growth_stages, run_flops, stage_at

__all__ = [
    "DepthPlan",
    "Growth",
    "GrowthStage",
    "InsertAt",
    "Operator",
    "RunFlops",
    "before_growth",
    "grow",
    "growth_stages",
    "run_flops",
    "stage_at",
]
