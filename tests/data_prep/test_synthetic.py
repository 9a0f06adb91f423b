"""Synthetic problems: right by solvers of their own, the same for a seed, and importable like any jsonl."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.synthetic import KINDS, Problem, documents, write_jsonl
from megaloop.data import DataSet
from megaloop.errors import MegaloopError
from megaloop.tokenizer import load_tokenizer
from tests.cli.test_cli import megaloop

PROBLEMS = {kind: [entry for _, series in documents([kind], 200, 1) for entry in series] for kind in KINDS}


def _solve_variables(prompt: str) -> int:
    """By following names to a number, whatever the form."""
    pairs = re.findall(
        r"(?:let (\w) be (\w+)|(\w) <- (\w+)|set (\w) \$?(\w+)|Box (\w) holds (?:as much as box )?(\w+))", prompt
    )
    scope = {name: value for pair in pairs for name, value in [[part for part in pair if part]]}
    asked = re.findall(r"so (\w) is$|\| (\w) \?$|echo \$(\w)\n$|does box (\w) hold\?$", prompt)
    value = next(part for part in asked[0] if part)
    while not value.isdigit():
        value = scope[value]
    return int(value)


def _solve_words(prompt: str) -> int:
    """By applying whatever sentence can be applied until nobody is unknown."""
    have: dict[str, int] = {}
    rules = re.findall(r"([A-Z]\w+) has ([^.?]+)\.", prompt)
    for _ in rules:
        for person, said in rules:
            names = [name for name in re.findall(r"[A-Z]\w+", said)]  # noqa: C416
            if any(name not in have for name in names):
                continue
            number = int(found[0]) if (found := re.findall(r"\d+", said)) else 0
            if "more than" in said:
                have[person] = have[names[0]] + number
            elif "fewer than" in said:
                have[person] = have[names[0]] - number
            elif "twice" in said or "three times" in said:
                have[person] = have[names[0]] * (2 if "twice" in said else 3)
            elif "together" in said:
                have[person] = have[names[0]] + have[names[1]]
            else:
                have[person] = number
    asked = re.search(r"does (\w+) have\?$|are (\w+)'s\? A:$|of (\w+) are$", prompt)
    assert asked is not None
    return have[next(group for group in asked.groups() if group)]


def _solve_hops(prompt: str) -> str:
    """By walking the text backwards."""
    if found := re.fullmatch(r"Walk (\d) through (\w+):", prompt):
        hops, sequence = int(found[1]), found[2]
    elif found := re.fullmatch(r"\(([^)]+)\) (\d) times", prompt):
        hops, sequence = int(found[2]), found[1].replace(", ", "")
    else:
        found = re.fullmatch(r"([a-z ]+) / (\d) /", prompt)
        assert found is not None
        hops, sequence = int(found[2]), found[1].replace(" ", "")
    at = len(sequence) - 1
    for _ in range(hops):
        at = sequence[:at].rindex(sequence[at]) + 1
    return sequence[at]


def _final(problem: Problem) -> str:
    """The last number or letter of an answer."""
    return re.findall(r"\d+|\b[a-z]\b", problem.answer)[-1]


def test_every_answer_is_right() -> None:
    for problem in PROBLEMS["variables"]:
        assert int(_final(problem)) == _solve_variables(problem.prompt), problem
    for problem in PROBLEMS["words"]:
        assert int(_final(problem)) == _solve_words(problem.prompt), problem
    for problem in PROBLEMS["hops"]:
        assert _final(problem) == _solve_hops(problem.prompt), problem
    for problem in PROBLEMS["addition"]:
        assert int(_final(problem)) == sum(map(int, re.findall(r"\d+", problem.prompt))), problem


def test_every_form_occurs() -> None:
    for kind, makers in KINDS.items():
        shapes = {re.sub(r"\w+", "", problem.prompt)[-3:] for problem in PROBLEMS[kind]}
        assert len(shapes) >= len(makers) - 1


def test_a_seed_makes_the_same_file_and_a_larger_one_begins_with_it(tmp_path: Path) -> None:
    first, more, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.jsonl"
    written = write_jsonl(first, count=40, seed=3)
    write_jsonl(more, count=60, seed=3)
    write_jsonl(other, count=40, seed=4)
    assert more.read_text().startswith(first.read_text())
    assert first.read_text() != other.read_text()
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    assert len(lines) == written.documents == 40
    assert written.bytes == first.stat().st_size
    assert [line["kind"] for line in lines[:4]] == list(KINDS)
    assert 4 * 40 <= written.problems <= 12 * 40


def test_pairs_are_what_fine_tuning_takes(tmp_path: Path) -> None:
    written = write_jsonl(tmp_path / "a.jsonl", kinds=["addition"], count=5, pairs=True)
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(lines) == written.problems
    assert all(set(line) == {"kind", "prompt", "answer"} and line["answer"] for line in lines)


def test_a_template_makes_documents_of_any_jsonl(tmp_path: Path) -> None:
    lines = [{"question": f"What is {n} and {n}?", "answer": str(2 * n), "note": "x {y}"} for n in range(300)]
    source = tmp_path / "qa.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    prepare(
        [source], tmp_path / "out", vocab_size=300, sequence_length=16, template="Q: {question}\nA: {answer} {{}}\n"
    )
    dataset = DataSet.open(tmp_path / "out")
    tokenizer = load_tokenizer(dataset.tokenizer)
    split = dataset.split("train")
    text = "".join(tokenizer.decode(split.sample(n).tokens[:-1].tolist()) for n in range(len(split)))
    assert "Q: What is 7 and 7?\nA: 14 {}\n" in text
    with pytest.raises(MegaloopError, match="line 1: no text in field 'nothing'"):
        prepare([source], tmp_path / "b", vocab_size=300, sequence_length=16, template="{nothing}")


@pytest.mark.parametrize("template", ["plain", "{", "{0}", "{a.b}", "{a!r}", "{a:9}", "{}"])
def test_templates_hold_names_of_fields_and_nothing_else(tmp_path: Path, template: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "b"}\n', encoding="utf-8")
    with pytest.raises(MegaloopError, match="--template"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300, template=template)


def test_the_command_line_writes_and_refuses(tmp_path: Path) -> None:
    made = megaloop("synthesize", "--out", tmp_path / "a.jsonl", "--documents", "20", "--kinds", "words,hops", "--json")
    assert json.loads(made.stdout)["documents"] == 20
    for arguments, message in (
        (("--out", tmp_path / "b.jsonl", "--kinds", "words,word"), "unknown kind word; choose from words, addition"),
        (("--out", tmp_path / "a.jsonl" / "b.jsonl"), "cannot write"),
        (("--out", "/"), "/ is a directory; name a file to write"),
    ):
        result = megaloop("synthesize", *arguments)
        assert (result.returncode, message in result.stderr) == (2, True)
        assert len(result.stderr.splitlines()) == 1
