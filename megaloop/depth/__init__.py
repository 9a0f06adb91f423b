"""The algebra of depth: which layers run, in which order. Pure Python, no torch."""

from megaloop.depth.plan import DepthPlan

__all__ = ["DepthPlan"]
