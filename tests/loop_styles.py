"""How loops may be made: what tests of layers that run several times are made for."""

from __future__ import annotations

from megaloop.depth import LoopStyle

__all__ = ["STYLES"]

STYLES = [
    LoopStyle(),
    LoopStyle(injection="add"),
    LoopStyle(injection="concat"),
    LoopStyle(residual_scale="1/k"),
    LoopStyle(norm=True),
    LoopStyle("concat", "1/k", norm=True),
    LoopStyle(norm=True, gate=True),
]
