"""Types of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int | None], None]
"""Called with how much is done and, where it is known, how much there is in total."""

RunProgress = Callable[[str, int, int | None], None]
"""The same for one of several runs, with the run's title first."""
