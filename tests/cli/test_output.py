"""What commands print: text from outside is neither markup nor anything that a terminal obeys."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from megaloop.cli.output import echo, print_error
from megaloop.terminal import DescriptionColumn, SafeConsole
from megaloop.text import message_line, parse_whole, quoted, safe_lines

NASTY = "[/red]run [bold]x[/] :smile: \x1b[2J\x0e\u202e\x85"
SHOWN = r"[/red]run [bold]x[/] :smile: \x1b[2J\x0e\u202e\x85"


def test_a_console_prints_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    console = SafeConsole(width=100)
    table = Table(box=None, pad_edge=False)
    table.add_column(NASTY)
    table.add_row(NASTY)
    console.print(NASTY, soft_wrap=True)
    console.print(Text(NASTY), soft_wrap=True, style="bold")
    console.print(table)
    echo(NASTY)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [SHOWN, SHOWN, SHOWN, SHOWN, SHOWN]


def test_a_bar_may_be_called_anything(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(DescriptionColumn(), console=SafeConsole(width=100)) as bar:
        bar.add_task(NASTY)
    assert SHOWN in capsys.readouterr().out


def test_an_error_is_one_line_of_less_than_2000_characters(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(f"found {'[/red]' * 100_000}\nand\x1b[31m; what to do")
    error = capsys.readouterr().err
    assert error.startswith("error: found [/red]")
    assert error.endswith(r"and\x1b[31m; what to do" + "\n")
    assert error.count("\n") == 1
    assert len(error) < 2000


def test_texts_are_escaped_and_shortened() -> None:
    assert message_line("a\n\n b\tc") == "a b c"
    assert safe_lines("a\n\tb\x1b\r") == "a\n\tb\\x1b\\r"
    assert len(message_line("\x1b" * 10**6)) < 2000
    assert quoted("\x1b") == r"'\x1b'"
    assert len(quoted("x" * 10**6)) <= 100
    assert len(quoted([[["x" * 1000] * 1000] * 1000] * 1000)) <= 100


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("007", 7), ("12", 12), ("9" * 18, 10**18 - 1)])
def test_a_whole_number_is_read(text: str, number: int) -> None:
    assert parse_whole(text) == number


@pytest.mark.parametrize("text", ["", "²", "٣", "-1", "+1", "1_0", " 1", "1e3", "9" * 19, "9" * 5000])
def test_what_only_looks_like_a_number_is_none(text: str) -> None:
    assert parse_whole(text) is None


def test_nothing_reads_yaml_or_prints_elsewhere() -> None:
    """What a module of its own would forget: limits on what is read, escapes in what is shown."""
    root = Path(__file__).parents[2]
    own = {
        "yaml.safe_load(": [],
        " Console(": [],
        "typer.echo(": ["megaloop/cli/output.py", "megaloop/cli/cluster.py"],
    }
    for folder in ("megaloop", "launchers", "data_prep"):
        for path in (root / folder).rglob("*.py"):
            text, name = path.read_text(encoding="utf-8"), str(path.relative_to(root))
            assert not [words for words, places in own.items() if words in text and name not in places], name
