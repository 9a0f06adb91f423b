"""How the commands print: the one place through which text from outside reaches a terminal.

Names of runs, tasks and files, and whatever checkpoints and records hold, may contain what rich takes for markup
(``[/red]``) or what a terminal obeys (``\\x1b[2J``). Here neither is: consoles parse no markup, and control characters are
shown as escapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import ProgressColumn, Task
from rich.segment import Segment
from rich.text import Text

from megaloop.text import printable, safe_lines

__all__ = ["DescriptionColumn", "SafeConsole"]


class SafeConsole(Console):
    """A console for texts from outside: no markup, no emoji codes, nothing highlighted, no control characters.

    Args:
        stderr: print there instead of to stdout.
        width: columns; default: the terminal's.
        soft_wrap: leave long lines to the terminal.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None, soft_wrap: bool = False):
        super().__init__(stderr=stderr, width=width, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, with control characters in the text as escapes; those that rich itself sends stay."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(safe_lines(segment.text), segment.style)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich's, with the escapes in it before it is measured: a table's column is as wide as what is shown."""
        return super().render_str(safe_lines(text), **options)


class DescriptionColumn(ProgressColumn):
    """The column of a progress bar that says what is under way, whatever it is called."""

    def render(self, task: Task) -> Text:
        return Text(printable(task.description, 100))
