"""The pages name what is there: links, anchors, files, modules, commands, options and rooms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer

from tests.test_rooms import BESIDE, ROOMS

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path.name != "CHANGELOG.md")
"""All but the history, which names files as they were."""

FOREIGN = {"--kill-on-bad-exit", "--requeue", "--error-exitcode"}
"""Options of other programs that stand alone in a sentence."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            broken.append(target)
    assert not broken


@each_page
def test_every_file_and_module_that_is_named_exists(page: Path) -> None:
    missing = []
    text = page.read_text(encoding="utf-8")
    for span in (*_spans(text), *_blocks(text)):
        for path in re.findall(r"(?<![\w./<-])[\w.]+(?:/[\w.]+)*/[\w.]+\.(?:py|sh|j2|yaml)\b", span):
            if (
                path.upper() != path
                and not re.search(r"\b[A-Z]{2,}\b|^demo-|^runs/[a-z]*/", path)
                and not _exists(path)
            ):
                missing.append(path)
        for module in re.findall(r"(?<![\w./-])megaloop(?:\.[a-z_]+)+", span):
            if not _is_module(module):
                missing.append(module)
    assert not missing


@each_page
def test_every_command_and_option_that_is_named_exists(page: Path) -> None:
    wrong = []
    text = page.read_text(encoding="utf-8")
    for code in (*_blocks(text), *_spans(text)):
        for words, options in _commands_in(code):
            found = _find(words)
            if found is None:
                wrong.append(f"megaloop {words}")
            else:
                wrong += [f"megaloop {words} {option}" for option in options - found]
    assert not wrong


@each_page
def test_an_option_that_stands_alone_is_one_of_some_command(page: Path) -> None:
    known = {option for _, options in _all_commands() for option in options} | FOREIGN
    alone = [re.match(r"--[a-z][\w-]*", span) for span in _spans(page.read_text(encoding="utf-8"))]
    assert not {match[0] for match in alone if match} - known - _options_of_tools()


def test_the_list_and_the_picture_of_rooms_are_those_that_arrows_are_checked_by() -> None:
    text = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    table = re.search(r"^## Rooms\n.*?^## ", text, re.M | re.S)
    assert table is not None
    listed = re.findall(r"^\| \[?`([a-z_]+)/", table[0], re.M)
    assert [name for name in listed if name not in BESIDE] == [room for room in ROOMS if room != "ground"]
    assert {name for name in listed if name in BESIDE} == set(BESIDE)
    picture = (ROOT / "docs/rooms.svg").read_text(encoding="utf-8")
    assert not {room for room in (*ROOMS, *BESIDE) if room != "ground"} - set(re.findall(r">([a-z_]+)<", picture))


# --- reading Markdown


def _blocks(text: str) -> list[str]:
    """Fenced and indented blocks, lines that end in a backslash joined."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    indented = re.findall(r"^    .*(?:\n    .*)*", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return [re.sub(r"\\\n\s*", " ", block) for block in (*fenced, *indented)]


def _without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^    .*", "", text, flags=re.M)
    return re.sub(r"`[^`\n]*`", lambda match: "" if "](" in match[0] else match[0], text)


def _spans(text: str) -> list[str]:
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", re.sub(r"^    .*", "", text, flags=re.M))


@cache
def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", _without_code(page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# --- what there is


def _exists(path: str) -> bool:
    """From the root, or as the pages say it of a room: ``depth/plan.py``."""
    return (ROOT / path).exists() or (ROOT / "megaloop" / path).exists()


def _is_module(name: str) -> bool:
    """A module, or something in one."""
    parts = name.split(".")
    while len(parts) > 1 or name == "megaloop":
        path = ROOT.joinpath(*parts)
        if path.with_suffix(".py").is_file():
            return True
        if path.is_dir():  # what a package itself exports
            rest = name.split(".")[len(parts) :]
            return not rest or rest[0] in (path / "__init__.py").read_text(encoding="utf-8")
        parts.pop()
    return False


@cache
def _group() -> Any:
    from megaloop.cli.main import app

    return typer.main.get_command(app)


def _find(words: str) -> set[str] | None:
    """The options of a command; None if there is none of that name."""
    return dict(_all_commands()).get(words)


@cache
def _all_commands() -> tuple[tuple[str, set[str]], ...]:
    return tuple(_walk(_group(), ""))


def _walk(command: Any, name: str) -> Iterator[tuple[str, set[str]]]:
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    yield name, {option for option in options if option.startswith("--")} | {"--help", "--debug"}
    for own, item in getattr(command, "commands", {}).items():
        yield from _walk(item, f"{name} {own}".strip())


def _commands_in(code: str) -> Iterator[tuple[str, set[str]]]:
    """(command, the options after it) of every command line of ours in a piece of code."""
    groups = {name.split()[0] for name, _ in _all_commands() if " " in name}
    for match in re.finditer(r"(?<![\w./:-])megaloop ([a-z][\w-]*)([^\n|;#]*)", code):
        words, rest = match[1], match[2].split(" -- ")[0].split("megaloop ")[0]
        if words in groups and (inner := re.match(r" ([a-z][\w-]*)", rest)):
            words = f"{words} {inner[1]}"
        yield words, set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest))


@cache
def _options_of_tools() -> set[str]:
    """Options of the scripts in tools/."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "tools").iterdir() if path.is_file()]
    return {option for text in texts for option in re.findall(r"--[a-z][\w-]*", text)}
