"""What commands show: a bar on standard error while something runs, and tables."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..progress import RunProgress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@contextlib.contextmanager
def progress_bar(begins_with: str, unit: str, width: int = 0) -> Iterator[RunProgress]:
    """A bar, where standard error is a terminal, until the block ends; moved by calling what the block gets.

    Args:
        begins_with: what it says before it is first moved.
        unit: of what is done.
        width: columns of the titles, at least.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, title = Console(stderr=True), TextColumn(f"{{task.description:<{width}}}")
    columns = (title, BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(begins_with, total=None)
        yield lambda title, done, todo: bar.update(task, description=title, completed=done, total=todo)


def output(width: int) -> Console:
    """Standard output; of `width` columns where it is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=width)


def table(headings: Iterable[str], rows: Iterable[Sequence[str]], words: int = 1, **options: Any) -> Table:
    """A table whose first `words` columns are words, and all others numbers; `options` are those of rich's tables."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, title_justify="left", caption_justify="left", **options)
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="right" if i >= words else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
