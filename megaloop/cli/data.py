"""``megaloop prep`` and ``megaloop synthesize``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megaloop.cli.options import Json, OnError, finite
from megaloop.cli.output import count_progress, show_result
from megaloop.errors import MegaloopError
from megaloop.terminal import SafeConsole

__all__ = ["prep", "synthesize"]


def prep(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT...", help="txt, jsonl, jsonl.gz, jsonl.zst, parquet; or directories.")
    ],
    out: Annotated[Path, typer.Option(help="Directory to write the data set to.")],
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Train a tokenizer of this size on the text.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Use this one instead: a sentencepiece model, a tokenizer.json, or a directory with either."),
    ] = None,
    train_bpe: Annotated[
        bool,
        typer.Option("--train-bpe", help="Train a byte-level BPE (tokenizer.json) instead of a sentencepiece model."),
    ] = False,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 2048,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=0.5, callback=finite, help="Share of documents held out.")
    ] = 0.01,
    errors: Annotated[OnError, typer.Option(help="What to do with bytes that are not UTF-8.")] = OnError.stop,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one per core.")] = None,
    text_field: Annotated[str, typer.Option(help="Field of jsonl and parquet that holds the text.")] = "text",
    template: Annotated[
        str | None,
        typer.Option(
            help="Instead of one field of jsonl: several, such as 'Q: {question}\\nA: {answer}' (\\n is a line's end)."
        ),
    ] = None,
    targets: Annotated[
        bool,
        typer.Option(
            "--targets", help="Lines of jsonl hold tokens and targets: what each place is to predict, or null."
        ),
    ] = False,
    answer_marks: Annotated[
        str | None,
        typer.Option(help="Text of jsonl has answers between these marks, such as '[[ ]]': they alone are learnt."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a data set that is already there.")] = False,
    json: Json = False,
) -> None:
    """Turn text into a data set: tokenizer, shards, validation split."""
    from data_prep.prepare import prepare

    summary = prepare(
        inputs,
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        train_bpe=train_bpe,
        sequence_length=sequence_length,
        validation_fraction=validation_fraction,
        errors=errors.value,
        workers=workers,
        text_field=text_field,
        template=template.replace("\\n", "\n") if template is not None else None,
        targets=targets,
        marks=answer_marks,
        overwrite=overwrite,
        console=SafeConsole(stderr=True),
    )
    show_result(summary, json)


class Task(StrEnum):
    p_hop = "p-hop"
    addition = "addition"
    chains = "chains"


class Doubles(StrEnum):
    learn = "learn"
    text = "text"
    none = "none"


def synthesize(
    out: Annotated[Path, typer.Option(help="jsonl file to write; megaloop prep takes it.")],
    documents: Annotated[
        int, typer.Option(min=1, help="Documents, each a series of 4 to 12 problems; of a task, samples.")
    ] = 10_000,
    kinds: Annotated[
        str | None,
        typer.Option(help="Kinds of problems, which take turns: of words, addition, hops, variables. Default: all."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed makes other problems.")] = 0,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="A line for each problem, with prompt and answer, for fine-tuning.")
    ] = False,
    task: Annotated[
        Task | None, typer.Option(help="Instead of text: samples of a task by difficulty, with targets.")
    ] = None,
    difficulty: Annotated[
        str | None,
        typer.Option(
            help="Difficulties of a task, with as many samples each: 1-8 or 1,2,4,12. "
            "Hops (1 to 32), terms (2 to 32), depth of chains (0 to 8)."
        ),
    ] = None,
    alphabet: Annotated[int | None, typer.Option(help="p-hop: letters to draw from. Default: 6.")] = None,
    length: Annotated[int | None, typer.Option(help="p-hop: tokens of a sample. Default: 64.")] = None,
    doubles: Annotated[
        Doubles | None,
        typer.Option(
            help="p-hop: a letter that follows itself is its own answer: learn it as others, leave it as text without a target, "
            "or have none. Default: learn."
        ),
    ] = None,
    digits: Annotated[int | None, typer.Option(help="addition: digits of a term. Default: 2.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Directory to write a task's tokenizer to. Default: tokenizer, beside --out."),
    ] = None,
    json: Json = False,
) -> None:
    """Write problems with their answers: as text to train on, or (--task) as samples of one task by difficulty.

    As text: word problems, n-ary addition, p-hop induction, variables.
    """
    from data_prep.ladders import parse_difficulties, write_ladder
    from data_prep.synthetic import KINDS, write_jsonl

    of_tasks = {
        "--difficulty": difficulty,
        "--alphabet": alphabet,
        "--length": length,
        "--doubles": doubles,
        "--digits": digits,
        "--tokenizer": tokenizer,
    }
    with count_progress("synthesizing", documents) as show:
        if task is None:
            if given := [name for name, value in of_tasks.items() if value is not None]:
                raise MegaloopError(f"synthesize: {given[0]} belongs to a task; name one with --task, or leave it out")
            chosen = list(KINDS) if kinds is None else [kind.strip() for kind in kinds.split(",") if kind.strip()]
            result: object = write_jsonl(out, kinds=chosen, count=documents, seed=seed, pairs=pairs, on_document=show)
        elif kinds is not None or pairs:
            wrong = "--kinds" if kinds is not None else "--pairs"
            raise MegaloopError(
                f"synthesize: {wrong} belongs to text, and --task writes samples; leave one of them out"
            )
        elif difficulty is None:
            raise MegaloopError(f"synthesize: --task {task.value} needs --difficulty, such as 1-8 or 2,4,8")
        else:
            result = write_ladder(
                out,
                task.value,
                difficulties=parse_difficulties(difficulty),
                count=documents,
                seed=seed,
                alphabet=alphabet,
                length=length,
                doubles=None if doubles is None else doubles.value,
                digits=digits,
                tokenizer=tokenizer,
                on_document=show,
            )
    show_result(result, json)
