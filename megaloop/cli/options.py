"""What the options of several commands have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megaloop.depth import DepthSpec
from megaloop.errors import MegaloopError

if TYPE_CHECKING:
    from megaloop.inference.halting import Halting

__all__ = [
    "CRITERIA",
    "HaltDecay",
    "HaltScope",
    "Json",
    "MinLoops",
    "OnError",
    "Overrides",
    "Precision",
    "Recompute",
    "finite",
    "read_depth",
    "read_halts",
]

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Override configuration values: train.steps=100")
]


CRITERIA = (
    "kl=5e-4, entropy, latent, cosine, confidence, gate, argmax=N, fixed=N or oracle (docs/INFERENCE.md); 0: never"
)
MinLoops = Annotated[int, typer.Option(min=1, help="With --halt: iterations that every token runs.")]
HaltScope = Annotated[
    Literal["token", "sequence"],
    typer.Option(help="With --halt: each token whose prediction is used leaves for itself, or a prompt as one."),
]


def finite(value: float | None) -> float | None:
    """Callback of an option: neither an infinity nor ``nan``, which lies within whatever limits there are."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


HaltDecay = Annotated[
    float | None,
    typer.Option(min=0, callback=finite, help="With --halt confidence=...: CALM's decay of the threshold, such as 4."),
]


def read_halts(
    texts: Sequence[str], minimum: int, scope: Literal["token", "sequence"], decay: float | None
) -> list[Halting]:
    """What ``--halt`` and the options beside it say.

    Raises:
        MegaloopError: it cannot be read, or the others stand alone.
    """
    from megaloop.inference.halting import Halting

    if not texts and (minimum, scope, decay) != (1, "token", None):
        raise MegaloopError(
            "--min-loops, --halt-scope and --halt-decay belong to --halt; say when tokens leave the loop: --halt kl=5e-4"
        )
    return [Halting.parse(text, minimum=minimum, scope=scope, decay=decay) for text in texts]


def read_depth(text: str | None) -> DepthSpec | None:
    """What ``--depth`` says.

    Raises:
        MegaloopError: it cannot be read.
    """
    return None if text is None else DepthSpec.parse(text)


class OnError(StrEnum):
    stop = "stop"
    skip = "skip"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


class Recompute(StrEnum):
    none = "none"
    full = "full"
    selective = "selective"
