"""The data of ``megaloop bench savings``, and how the runs on it are evaluated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megaloop.cli.output import count_progress, echo
from megaloop.errors import MegaloopError
from megaloop.files import replace_file
from megaloop.text import printable

if TYPE_CHECKING:
    from megaloop.bench.reasoning import LadderEvaluation
    from megaloop.bench.savings import Evaluation
    from megaloop.config import Config

__all__ = ["PRESETS", "configuration", "evaluation_of", "prepare_data"]

PRESETS = Path(__file__).parents[1] / "bench" / "presets"
_DOCUMENTS = {"cpu": 6_000, "gpu": 60_000}
"""Synthetic documents of a preset's mixture, of 4 to 12 problems each."""
_HELD_OUT = 0.04
_DEMO = "the demo's text"
_MADE_OF = "text_of.json"
"""The paths of the text that a bench's data was made of."""
_SOURCES = {"cpu": ("text", "math"), "gpu": ("text", "math"), "reasoning": ("hops",)}
"""Data sets of a preset, in its directory of data."""
_ASKED, _ASKED_DOCUMENTS = "asked", 44_000


def configuration(preset: str, data: Path, text: list[Path] | None, overrides: list[str] | None) -> Config:
    """The full-depth configuration: a preset's, whose data lies in ``data``, or one's own."""
    from megaloop.config import load_config

    if text and preset not in _DOCUMENTS:
        its = "the preset reasoning makes its own data" if preset in _SOURCES else "a configuration names its own data"
        raise MegaloopError(f"bench savings: --text is for the presets cpu and gpu; {its}")
    if preset in _SOURCES:
        sources = [f"data.sources.{number}.path={data / name}" for number, name in enumerate(_SOURCES[preset])]
        return load_config(PRESETS / f"savings_{preset}.yaml", [*sources, *(overrides or [])])
    return load_config(Path(preset), overrides or [])


def prepare_data(preset: str, config: Config, folder: Path, text: list[Path], *, begun: bool = False) -> None:
    """Make a preset's data sets where they are not there yet.

    Args:
        begun: runs rest on those that are there; else samples that were made for other options (by a bench that ended before it
            trained) are made anew.
    """
    if preset in _DOCUMENTS:
        _text_and_problems(config, folder, _DOCUMENTS[preset], text)
    elif preset in _SOURCES:
        _hops(config, folder, begun)


def evaluation_of(
    preset: str, config: Config, folder: Path, examples: int | None, shots: str | None, loops: str | None
) -> Evaluation | LadderEvaluation:
    """How runs are evaluated: by difficulty where the data has targets of its own, else by primitives."""
    from megaloop.bench.reasoning import LadderEvaluation
    from megaloop.bench.savings import Evaluation
    from megaloop.cli.evaluation import numbers
    from megaloop.config import GrowthConfig
    from megaloop.data import DataSet, open_sources

    counts = None if loops is None else tuple(numbers("--loops", loops, 1))
    datasets = open_sources(config.data).datasets
    if not any(isinstance(data, DataSet) and data.description.targets is not None for data in datasets):
        chosen = tuple(numbers("--shots", "0,2,5" if shots is None else shots, 0))
        return Evaluation(examples or 250, chosen, counts or (1, 2, 3))
    for option, value in (("--examples", examples), ("--shots", shots)):
        if value is not None:
            raise MegaloopError(
                f"bench savings: {option} is for the reasoning primitives; the data has targets of its own, which are asked instead"
            )
    asked = folder / _ASKED if preset in _SOURCES else None
    block = (config.growth or GrowthConfig()).block
    return LadderEvaluation(tuple(data.path for data in datasets), block, asked, loops=counts or (1, 2, 3, 4, 5))


def _hops(config: Config, folder: Path, begun: bool) -> None:
    """p-hop induction: samples for all steps, and those that are asked."""
    from data_prep.ladders import PHop, write_ladder
    from data_prep.prepare import prepare
    from megaloop.bench.reasoning import ASKED, HOPS, VALIDATION_FRACTION, documents
    from megaloop.data.description import DATA_JSON
    from megaloop.tokenizer.files import FOLDER

    length, hardest = config.data.sequence_length, max(ASKED)
    if (needed := PHop(length=max(length, 4)).length_for(hardest)) > length:
        raise MegaloopError(
            f"bench savings: data.sequence_length {length} is too short for the {hardest} hops that the preset asks; use {needed} or more"
        )
    made: tuple[tuple[str, tuple[int, ...], int, float, Literal["learn", "text"]], ...] = (
        ("hops", HOPS, documents(config), VALIDATION_FRACTION, "learn"),
        (_ASKED, ASKED, _ASKED_DOCUMENTS, 0.5, "text"),
    )
    for seed, (name, difficulties, count, held_out, doubles) in enumerate(made):
        is_there = (folder / name / DATA_JSON).is_file()
        if is_there and (begun or _has(folder / name, count, length)):
            continue
        file = folder / f"{name}.jsonl"
        with count_progress(f"preparing {folder / name}", count) as show:
            write_ladder(
                file,
                "p-hop",
                difficulties=difficulties,
                count=count,
                seed=seed,
                length=length,
                doubles=doubles,
                on_document=show,
            )
        prepare(
            [file],
            folder / name,
            tokenizer=folder / FOLDER,
            sequence_length=length,
            validation_fraction=held_out,
            targets=True,
            overwrite=is_there,
        )
        file.unlink()  # its samples are in the shards, and it can be made again


def _has(path: Path, documents: int, length: int) -> bool:
    """Whether a data set has so many documents, in samples of this length."""
    from megaloop.data import DataSet

    description = DataSet.open(path).description
    found = sum(split.documents for split in description.splits.values())
    return (found, description.sequence_length) == (documents, length)


def _text_and_problems(config: Config, folder: Path, documents: int, text: list[Path]) -> None:
    """The presets' two sources: text, and synthetic problems, with one tokenizer trained on both."""
    from data_prep.demo import demo_text
    from data_prep.prepare import prepare
    from data_prep.sources import Inputs, find_inputs
    from data_prep.synthetic import write_jsonl
    from data_prep.tokenizer import train_sentencepiece

    wanted = [str(path.resolve()) for path in text] or [_DEMO]
    if (folder / "text" / "data.json").is_file() and (folder / "math" / "data.json").is_file():
        _check_made_of(folder / _MADE_OF, wanted)
        return
    vocab_size = config.model.vocab_size
    assert vocab_size is not None
    echo(f"preparing {folder}", err=True)
    if not text:
        demo_text(folder / "text.jsonl")
    inputs = text or [folder / "text.jsonl"]
    write_jsonl(folder / "math.jsonl", count=documents)
    replace_file(folder / _MADE_OF, json.dumps(wanted).encode())
    tokenizer = folder / "tokenizer.model"
    both = find_inputs([*inputs, folder / "math.jsonl"])
    tokenizer.write_bytes(train_sentencepiece(_some(Inputs(both)), vocab_size))
    for name, files in (("text", inputs), ("math", [folder / "math.jsonl"])):
        prepare(
            files,
            folder / name,
            tokenizer=tokenizer,
            sequence_length=config.data.sequence_length,
            validation_fraction=_HELD_OUT,
            overwrite=(folder / name / "data.json").is_file(),
        )


def _check_made_of(file: Path, wanted: list[str]) -> None:
    """Refuse to train on other text than was named; a bench of an earlier version does not know what its text was."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if found != wanted:
        raise MegaloopError(
            f"bench savings: {printable(file.parent)} was made of {printable(', '.join(map(str, found)), 200)}, and not of "
            f"{printable(', '.join(wanted), 200)}; name the same --text, or choose another --out"
        )


def _some(documents: Iterable[tuple[int, str]]) -> Iterator[str]:
    """So much of each file's text that a tokenizer is trained in seconds."""
    taken: dict[int, int] = {}
    for number, text in documents:
        if taken.get(number, 0) < 8 << 20:
            taken[number] = taken.get(number, 0) + len(text)
            yield text
