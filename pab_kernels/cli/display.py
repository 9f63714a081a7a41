"""The progress bar and the tables of the commands."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..progress import RunProgress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@contextlib.contextmanager
def progress_bar(begins_with: str, unit: str, width: int = 0) -> Iterator[RunProgress]:
    """Show a progress bar while the block runs, if standard error is a terminal.

    Args:
        begins_with: the first title.
        unit: of the progress.
        width: least columns of the titles.

    Yields:
        A callback that moves the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, title = Console(stderr=True), TextColumn(f"{{task.description:<{width}}}")
    columns = (title, BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(begins_with, total=None)
        yield lambda title, done, todo: bar.update(task, description=title, completed=done, total=todo)


def quiet(*packages: str) -> None:
    """Turn off the warnings and progress bars of diffusers and transformers."""
    for package in packages:
        logging = importlib.import_module(f"{package}.utils.logging")
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def output(width: int) -> Console:
    """A console on standard output, `width` columns wide if it is not a terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=width)


def table(headings: Iterable[str], rows: Iterable[Sequence[str]], words: int = 1, **options: Any) -> Table:
    """A table whose first `words` columns are words and the others numbers; `options` are rich's."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, title_justify="left", caption_justify="left", **options)
    for i, heading in enumerate(headings):
        made.add_column(heading, justify="right" if i >= words else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
