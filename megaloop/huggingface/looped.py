"""The directory of a model that keeps its loop: settings, names and the code that transformers runs it with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaloop.depth import DepthPlan, DepthSpec, Loop, LoopStyle
from megaloop.errors import MegaloopError
from megaloop.model.parameters import LOOP_ADAPTER, LOOP_NORM
from megaloop.text import printable

__all__ = ["MODELING", "MODEL_TYPE", "loop_tensor_names", "looped_plan", "looped_settings"]

MODEL_TYPE = "megaloop"
MODELING = Path(__file__).with_name("modeling_megaloop.py")
"""The code that is written with a model: it is copied, never imported here."""
_STYLE = {"loop_injection": "injection", "loop_residual_scale": "residual_scale", "loop_norm": "norm"}
"""Settings, and the fields of :class:`megaloop.depth.LoopStyle`."""
_COUNTS = ("num_prelude_layers", "num_recurrent_layers", "num_coda_layers", "num_loops")


def looped_settings(layers: int, loop: Loop, style: LoopStyle) -> dict[str, Any]:
    """What ``config.json`` says beyond :func:`megaloop.huggingface.llama.llama_settings`, of so many unique layers."""
    coda = layers - loop.start - loop.block
    name = MODELING.stem
    return {
        "architectures": ["MegaloopForCausalLM"],
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": f"{name}.MegaloopConfig", "AutoModelForCausalLM": f"{name}.MegaloopForCausalLM"},
        "num_hidden_layers": loop.start + loop.block * loop.iterations + coda,
        **dict(zip(_COUNTS, (loop.start, loop.block, coda, loop.iterations), strict=True)),
        **{theirs: getattr(style, ours) for theirs, ours in _STYLE.items()},
    }


def loop_tensor_names(style: LoopStyle) -> Iterator[tuple[str, str]]:
    """(their name, our name) of what the loop has besides its layers."""
    if style.injection == "concat":
        yield "model.loop_adapter.weight", LOOP_ADAPTER
    if style.norm:
        yield "model.loop_norm.weight", LOOP_NORM


def looped_plan(source: Path, settings: dict[str, Any]) -> DepthPlan:
    """The plan that :func:`looped_settings` were made of.

    Raises:
        MegaloopError: a setting that is missing or makes no sense; options of a loop that runs once, which is none.
    """
    if missing := sorted({*_COUNTS, *_STYLE} - settings.keys()):
        raise MegaloopError(f"{source}: config.json lacks {missing[0]!r}")
    counts = [settings[name] for name in _COUNTS]
    if any(type(count) is not int or count < 0 for count in counts):
        raise MegaloopError(
            f"{source}: {', '.join(_COUNTS)} in config.json are whole numbers; found {printable(counts)}"
        )
    prelude, block, coda, iterations = counts
    try:
        style = LoopStyle(**{ours: settings[theirs] for theirs, ours in _STYLE.items()})
        plan = DepthSpec.looped(prelude, block, iterations, coda).plan
    except (MegaloopError, TypeError) as error:
        raise MegaloopError(f"{source}: config.json describes no loop ({printable(error, 300)})") from None
    if style != LoopStyle() and plan.loop is None:
        raise MegaloopError(
            f"{source}: num_loops 1 in config.json, of a loop with an injection, a norm or scaled residuals; "
            "set it to 2 or more, and choose the number when the model is run, with --depth"
        )
    return DepthPlan(plan.order, style=style)
