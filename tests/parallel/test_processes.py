"""Processes that tests share: their results, their errors, and where they are when they do not answer."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.parallel import processes
from tests.parallel.processes import run_on


def hangs_on_the_second(rank: int, here: str) -> None:
    if rank == 1:
        Path(here).write_text("")  # until the test reads
        threading.Event().wait()


def test_the_stack_of_a_rank_that_hangs_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, answer = tmp_path / "here", processes.wait
    os.mkfifo(here)

    def wait(connections: list[Any], most: float) -> list[Any]:
        if len(connections) == 2:
            return answer(connections)
        here.read_text()
        return []

    monkeypatch.setattr(processes, "wait", wait)
    with pytest.raises(AssertionError, match="ranks still run after") as error:
        run_on(2, hangs_on_the_second, str(here))
    assert "hangs_on_the_second" in str(error.value) and "rank 1: " in str(error.value)
    assert "rank 0: " not in str(error.value)
