"""``megaloop generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megaloop.cli.options import Json, Precision, finite, read_depth
from megaloop.cli.output import echo, show_result

__all__ = ["generate"]


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, callback=finite, help="Sampling temperature; 0: greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Precision.fp32,
    depth: Annotated[
        str | None,
        typer.Option(help="Order of the layers, such as 10-4x3-10: loop more, or less; default: as trained."),
    ] = None,
    json: Json = False,
) -> None:
    """Continue a text, token by token as they come."""
    from megaloop.inference.generate import generate_text

    shown: list[str] = []

    def show(text: str) -> None:
        shown.append(text if shown else prompt + text)  # the prompt comes with the first token: no error follows it
        echo(shown[-1], nl=False)
        sys.stdout.flush()

    result = generate_text(
        checkpoint,
        prompt,
        max_tokens=max_tokens,
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        precision=precision.value,
        depth=read_depth(depth),
        on_text=None if json else show,
    )
    if json:
        show_result(result, json)
        return
    echo("" if shown else result.text)
    rate = result.tokens / max(result.seconds, 1e-9)
    echo(f"{result.tokens} tokens in {result.seconds:.1f} s, {rate:.0f} tokens/s", err=True)
