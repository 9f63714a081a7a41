"""How far something is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is to do."""

OpenProgress = Callable[[int, int | None], None]
"""`Progress` where it may not be known how much there is to do."""

RunProgress = Callable[[str, int, int | None], None]
"""The same of one of several runs, whose title comes first."""
