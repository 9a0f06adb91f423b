"""``megaloop generate``."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launchers.rank import started_by_launcher
from megaloop.cli.options import (
    CRITERIA,
    HaltDecay,
    HaltScope,
    Json,
    MinLoops,
    Precision,
    finite,
    read_depth,
    read_halts,
)
from megaloop.cli.output import echo, show_result
from megaloop.cli.ranks import is_first_rank, joined_ranks, launch_again, part_progress
from megaloop.errors import MegaloopError
from megaloop.text import printable

if TYPE_CHECKING:
    from megaloop.inference.generate import Generation, GenerationResult
    from megaloop.inference.setting import Setting

__all__ = ["generate"]


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="A checkpoint, or a run (its latest).")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue; an empty one: a new document.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts instead: one a line, or .jsonl with a field 'prompt'; continuations go out as JSON lines."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File for the continuations of --prompts; default: standard output.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=1_000_000, help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, callback=finite, help="Sampling temperature; 0: greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, callback=finite, help="Sample from the likeliest tokens of this mass.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a continuation and is left out of it; again for more.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling; each prompt draws by itself.")] = 0,
    precision: Annotated[Precision, typer.Option(help="Arithmetic.")] = Precision.fp32,
    depth: Annotated[
        str | None,
        typer.Option(help="Order of the layers, such as 10-4x3-10: loop more, or less; default: as trained."),
    ] = None,
    max_loops: Annotated[
        int | None,
        typer.Option("--max-loops", "--loops", min=1, help="How often the loop runs at most; instead of --depth."),
    ] = None,
    block: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:STOP", help="Which layers loop, by place; default: the trained loop, or the middle 4."
        ),
    ] = None,
    halt: Annotated[
        str | None,
        typer.Option(
            metavar="CRITERION=THRESHOLD",
            help=f"Tokens leave the loop when they have settled: {CRITERIA}.",
        ),
    ] = None,
    min_loops: MinLoops = 1,
    halt_scope: HaltScope = "token",
    halt_decay: HaltDecay = None,
    cache: Annotated[
        str, typer.Option(help="Keys and values that the loop keeps: full (exact), last, or shared=N iterations.")
    ] = "full",
    speculate: Annotated[
        int | None,
        typer.Option(
            min=1, max=64, help="Tokens that the model drafts with few loops and then checks at once, with all."
        ),
    ] = None,
    draft_loops: Annotated[int, typer.Option(min=1, help="Loops of a draft of --speculate.")] = 1,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the layers first (tens of seconds): for many or long texts.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, max=4096, help="Prompts that are continued at a time.")] = 16,
    ranks: Annotated[int, typer.Option(min=1, help="Local ranks that share the prompts.")] = 1,
    json: Json = False,
) -> None:
    """Continue a text, token by token as they come; or many, together."""
    if (prompt is None) == (prompts is None):
        raise MegaloopError("generate: give a text with --prompt, or a file of them with --prompts")
    if prompts is None and (out is not None or ranks > 1):
        raise MegaloopError("generate: --out and --ranks are for many prompts; give a file of them with --prompts")
    if out is not None and out.exists():
        raise MegaloopError(f"generate: --out {printable(out)} is there already; remove it, or choose another name")
    if out is not None and not out.parent.is_dir():  # found out now, and not when everything has been generated
        raise MegaloopError(
            f"generate: --out {printable(out)}: there is no directory {printable(out.parent)}; create it"
        )
    read = None if prompts is None else _read_prompts(prompts)
    if ranks > 1 and not started_by_launcher():
        launch_again(ranks)
        return
    from megaloop.inference.caches import CachePolicy
    from megaloop.inference.generate import Generation
    from megaloop.inference.loops import Block
    from megaloop.inference.sampling import Sampling
    from megaloop.inference.setting import Setting
    from megaloop.inference.speculation import Speculation
    from megaloop.inference.thinking import Thinking

    if speculate is None and draft_loops != 1:
        raise MegaloopError("generate: --draft-loops is of --speculate; say how many tokens to draft")
    halts = read_halts([] if halt is None else [halt], min_loops, halt_scope, halt_decay)
    chosen = None if block is None else Block.parse(block)
    setting = Setting(
        read_depth(depth), max_loops, chosen, Thinking(halts[0] if halts else None, CachePolicy.parse(cache))
    )
    sampling = Sampling(0.0 if greedy else temperature, top_k, top_p)
    drafts = None if speculate is None else Speculation(speculate, draft_loops)
    how = Generation(max_tokens, sampling, tuple(text for text in stop or [] if text), seed, batch, drafts)
    if prompt is not None:
        _one(checkpoint, prompt, how, setting, precision.value, compiled, json)
        return
    assert read is not None
    with joined_ranks():
        results = _many(checkpoint, read, how, setting, precision.value, compiled)
        if is_first_rank():
            _write(read, results, out, json)


def _read_prompts(path: Path) -> list[str]:
    """The prompts of a file: one a line, or of JSON lines the field ``prompt``."""
    from megaloop.data.jsonl import MARK, NotText, field_text, foreign_encoding, read_object

    try:
        data = path.read_bytes()
    except OSError as error:
        raise MegaloopError(f"--prompts {printable(path)}: {error.strerror}") from None
    if (foreign := foreign_encoding(data[:4096])) is not None:
        raise MegaloopError(f"--prompts {printable(path)}: this is {foreign}")
    found: list[str] = []
    for number, line in enumerate(data.removeprefix(MARK).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(
                field_text(read_object(line), "prompt", "a line") if path.suffix == ".jsonl" else line.decode()
            )
        except (NotText, UnicodeDecodeError) as error:
            raise MegaloopError(f"--prompts {printable(path)}, line {number}: {error}") from None
    if not found:
        raise MegaloopError(f"--prompts {printable(path)}: there is no prompt in it")
    return found


def _one(
    checkpoint: Path,
    prompt: str,
    how: Generation,
    setting: Setting,
    precision: Literal["fp32", "bf16"],
    compiled: bool,
    json: bool,
) -> None:
    from megaloop.inference.generate import generate_text

    shown: list[str] = []
    notes: list[str] = []

    def say_notes() -> None:  # as late, so that an error stands alone
        while notes:
            echo(notes.pop(), err=True)

    def show(text: str) -> None:
        say_notes()
        shown.append(text if shown else prompt + text)  # the prompt comes with the first token: no error follows it
        echo(shown[-1], nl=False)
        sys.stdout.flush()

    result = generate_text(
        checkpoint,
        prompt,
        how,
        setting,
        precision=precision,
        compiled=compiled,
        on_text=None if json else show,
        on_note=notes.append,
    )
    say_notes()
    if json:
        show_result(_values(result) | {"text": result.text}, json)
        return
    echo("" if shown else result.text)
    echo(_summary(result, setting), err=True)


def _many(
    checkpoint: Path,
    prompts: Sequence[str],
    how: Generation,
    setting: Setting,
    precision: Literal["fp32", "bf16"],
    compiled: bool,
) -> list[GenerationResult]:
    """Prompts in parts that ranks share, in their order."""
    from megaloop.inference.generate import Writer
    from megaloop.runtime.share import share_over_ranks, world_size

    writer = Writer.open(checkpoint, setting, precision=precision, compiled=compiled)

    def run(_: int, part: range) -> tuple[list[GenerationResult], list[str]]:
        notes: list[str] = []
        return writer.continue_prompts(prompts[part.start : part.stop], how, numbers=part, on_note=notes.append), notes

    with part_progress() as show:
        found = share_over_ranks("generating", _parts(len(prompts), how.rows, world_size()), run, show)
    notes = [note for _, of_part in found for note in of_part]
    if notes and is_first_rank():
        echo(notes[0], err=True)
    return [result for results, _ in found for result in results]


def _parts(prompts: int, rows: int, ranks: int) -> list[range]:
    """So many prompts that few rows stand empty while a part ends, and a part for each rank where there are fewer."""
    size = min(4 * rows, -(-prompts // ranks))
    return [range(first, min(first + size, prompts)) for first in range(0, prompts, size)]


def _write(prompts: Sequence[str], results: Sequence[GenerationResult], out: Path | None, json: bool) -> None:
    lines = [
        json_module.dumps({"prompt": prompt, "continuation": result.continuation} | _values(result), ensure_ascii=False)
        for prompt, result in zip(prompts, results, strict=True)
    ]
    if out is None:
        for line in lines:
            echo(line)
    else:
        out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    tokens = sum(result.tokens for result in results)
    if json and out is not None:
        show_result({"prompts": len(prompts), "tokens": tokens, "out": str(out)}, json)
    elif out is not None:
        echo(f"{len(prompts):,} continuations of {tokens:,} tokens in {printable(out)}", err=True)


def _values(result: GenerationResult) -> dict[str, Any]:
    drafts = {"drafted": result.drafted, "accepted": result.accepted} if result.drafted else {}
    return {
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
        "stopped": result.stopped,
        "loops_mean": result.loops_mean,
    } | drafts


def _summary(result: GenerationResult, setting: Setting) -> str:
    rate = result.tokens / max(result.seconds, 1e-9)
    loops = f", {result.loops_mean:.2f} loops a token" if setting.thinking.halting is not None else ""
    drafts = f", {result.accepted} of {result.drafted} drafted tokens accepted" if result.drafted else ""
    return f"{result.tokens} tokens in {result.seconds:.1f} s, {rate:.0f} tokens/s{loops}{drafts}"
