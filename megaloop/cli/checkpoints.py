"""``megaloop grow``, ``loop``, ``export`` and ``import``: a checkpoint of a checkpoint; ``init-config``: a run of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from megaloop.cli.options import Json, Precision, read_depth
from megaloop.cli.output import byte_progress, echo, show_result
from megaloop.depth import DepthSpec, InsertAt, Operator
from megaloop.depth.plan import Injection, ResidualScale
from megaloop.errors import MegaloopError

__all__ = ["export", "grow", "import_", "init_config", "loop"]


def grow(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write; RUN/checkpoints/step-N to go on from it.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Layers to grow to.")] = None,
    depth: Annotated[
        str | None, typer.Option(help="Instead of --layers: the grown layers with a loop, such as 4-8x4-4.")
    ] = None,
    operator: Annotated[Operator, typer.Option(help="Which layers are copied.")] = "lidas",
    block: Annotated[int, typer.Option(min=1, help="Layers per copied block (stack copies all).")] = 4,
    insert_at: Annotated[
        InsertAt,
        typer.Option(help="Where lidas and random put a block: after the middle range (as the paper does), or in it."),
    ] = "after",
    moments: Annotated[
        Literal["copy", "zero"], typer.Option(help="Adam's moments of a copied layer: its parent's, or zeros.")
    ] = "copy",
    json: Json = False,
) -> None:
    """Deepen a checkpoint by copying layers: another checkpoint, at the same step."""
    from megaloop.checkpoint.depth import grow_checkpoint

    target = depth if layers is None else layers
    if target is None or (layers is not None and depth is not None):
        raise MegaloopError("grow: say what to grow to, with --layers or with --depth")
    with byte_progress() as show:
        result = grow_checkpoint(
            checkpoint,
            out,
            operator,
            DepthSpec.parse(target),
            block,
            insert_at=insert_at,
            moments=moments,
            on_bytes=show,
        )
    show_result(result, json)


def loop(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write; RUN/checkpoints/step-N to go on from it.")],
    depth: Annotated[
        str | None,
        typer.Option(help="The same layers in another order: 10-4x2-10 loops the middle 4 of 24; 24 undoes it."),
    ] = None,
    untie: Annotated[
        bool, typer.Option("--untie", help="Instead: make every repetition a layer of its own, a grown model.")
    ] = False,
    injection: Annotated[Injection | None, typer.Option(help="As loop.injection; default: as it was, or none.")] = None,
    residual_scale: Annotated[ResidualScale | None, typer.Option(help="As loop.residual_scale; likewise.")] = None,
    norm: Annotated[bool | None, typer.Option(help="As loop.norm; likewise.")] = None,
    no_gate: Annotated[bool, typer.Option("--no-gate", help="Drop the loop's gate.")] = False,
    moments: Annotated[
        Literal["copy", "zero"], typer.Option(help="Adam's moments of an untied repetition: its layer's, or zeros.")
    ] = "copy",
    json: Json = False,
) -> None:
    """Loop some of a checkpoint's layers, or untie what is looped: another checkpoint, at the same step."""
    from megaloop.checkpoint.depth import loop_checkpoint

    if (depth is None) != untie:
        raise MegaloopError("loop: say which order the layers run in, with --depth, or --untie them")
    changes = {"injection": injection, "residual_scale": residual_scale, "norm": norm}
    chosen: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if no_gate and not untie:  # untied, a loop's gate goes anyway
        chosen["gate"] = False
    if chosen and untie:
        raise MegaloopError(
            f"loop: --{next(iter(chosen)).replace('_', '-')} applies only to loops, and --untie removes them"
        )
    with byte_progress() as show:
        result = loop_checkpoint(checkpoint, out, read_depth(depth), changes=chosen, moments=moments, on_bytes=show)
    show_result(result, json)


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    out: Annotated[Path, typer.Option(help="Directory to write.")],
    dtype: Annotated[Precision | None, typer.Option(help="Convert the weights; default: as trained.")] = None,
    depth: Annotated[
        str | None, typer.Option(help="Order of the layers, such as 10-4x3-10; default: as trained.")
    ] = None,
    keep_loop: Annotated[
        bool,
        typer.Option(
            "--keep-loop",
            help="Write each layer once, with code that loops them (trust_remote_code); default: unrolled, a Llama.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Write a checkpoint in Hugging Face format."""
    from megaloop.huggingface.weights import export_huggingface

    with byte_progress() as show:
        result = export_huggingface(
            checkpoint,
            out,
            dtype=dtype.value if dtype else None,
            depth=read_depth(depth),
            keep_loop=keep_loop,
            on_bytes=show,
        )
    show_result(result if result is not None else {"written": str(out)}, json)


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Hugging Face directory or GGUF file of the Llama architecture.")
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Keep this tokenizer with it (file or directory); default: the model's own.")
    ] = None,
    without_tokenizer: Annotated[bool, typer.Option("--without-tokenizer", help="Keep no tokenizer with it.")] = False,
    json: Json = False,
) -> None:
    """Read a Llama-architecture model (Hugging Face directory, GGUF file) into a checkpoint."""
    from megaloop.huggingface.weights import import_huggingface

    if tokenizer is not None and without_tokenizer:
        raise MegaloopError(
            "import: --tokenizer names a tokenizer, and --without-tokenizer keeps none; choose one of them"
        )
    with byte_progress() as show:
        result = import_huggingface(
            source, out, tokenizer=tokenizer, without_tokenizer=without_tokenizer, on_bytes=show
        )
    show_result(result if result is not None else {"written": str(out)}, json)


def init_config(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file to write; default: print it.")] = None,
) -> None:
    """Write a run's configuration that starts from a checkpoint and has its model and depth."""
    from megaloop.checkpoint.starting_config import starting_config
    from megaloop.files import replace_file

    text = starting_config(checkpoint)
    if out is None:
        echo(text, nl=False)
        return
    if out.exists():
        raise MegaloopError(f"output {out} already exists; choose another file")
    try:
        replace_file(out, text.encode())
    except OSError as error:
        raise MegaloopError(f"output {out} cannot be written ({error.strerror})") from None
    show_result({"written": str(out)}, False)
