"""How far something is, for whoever shows it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int | None], None]
"""Called with how much is done and, where it is known, how much there is to do."""

RunProgress = Callable[[str, int, int | None], None]
"""The same of one of several runs, whose title comes first."""
