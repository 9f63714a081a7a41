"""`enable` and `disable` interrupted between any two lines of the package: what is left is taken back."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pab_kernels as pab
from tests.broadcast.toy import CONFIG, EVERY_STEP, Pipe, toy

PACKAGE = str(Path(pab.__file__).parent)
MOST_LINES = 100_000
EVERY_SECOND = pab.Broadcast(2, EVERY_STEP)


class _Interrupted(BaseException):
    pass


@contextlib.contextmanager
def _interrupted_at(moments: set[int], lines: list[str]) -> Iterator[None]:
    """Raise before some of the lines of the package that run within, counted from 0."""

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            lines.append(frame.f_code.co_name)
            if len(lines) - 1 in moments:
                raise _Interrupted
        return trace

    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()  # what other tests have left would be finalised within, and be interrupted
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()


def _run(action: Callable[[], Any], moments: set[int]) -> list[str]:
    """Names of the functions whose lines ran until the interruption, or until `action` was done."""
    lines: list[str] = []
    with contextlib.suppress(_Interrupted), _interrupted_at(moments, lines):
        action()
    return lines


def _attributes(pipe: Pipe) -> list[tuple[str, ...]]:
    return [tuple(sorted(vars(part))) for part in (pipe, pipe.scheduler, *pipe.transformer.modules())]


def _plain(pipe: Pipe, before: list[tuple[str, ...]], plain: torch.Tensor) -> bool:
    return _attributes(pipe) == before and torch.equal(pipe.sample(2), plain)


def _taken_back(pipe: Pipe, moment: int, before: list[tuple[str, ...]]) -> bool:
    _run(lambda: pab.enable(pipe, CONFIG), {moment})
    taken_back = _attributes(pipe) == before
    pab.disable(pipe)
    return taken_back


@pytest.fixture
def pipe() -> Pipe:
    """Of one block: every line of what a second one takes would be interrupted too."""
    model = toy()
    del model.blocks[1]
    return Pipe(model)


def test_an_interrupted_enable_leaves_nothing(pipe: Pipe) -> None:
    plain = pipe.sample(2)
    before = _attributes(pipe)
    pab.enable(pipe, CONFIG)  # modules that are imported late are there from now on
    pab.disable(pipe)
    whole = len(_run(lambda: pab.enable(pipe, CONFIG), set()))
    pab.disable(pipe)
    assert 500 < whole < MOST_LINES
    done = [moment for moment in range(0, whole, 3) if not _taken_back(pipe, moment, before)]
    assert all(moment > whole - 10 for moment in done), "before its last lines, in which all is done"
    assert torch.equal(pipe.sample(2), plain)


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice"])
def test_an_interrupted_disable_is_done_by_the_next_one(pipe: Pipe, times: int) -> None:
    plain = pipe.sample(2)
    before = _attributes(pipe)
    pab.enable(pipe, CONFIG)
    whole = len(_run(lambda: pab.disable(pipe), set()))
    assert 100 < whole < MOST_LINES
    for moment in range(0, whole, 3):
        pab.enable(pipe, CONFIG)
        for again in range(times):
            _run(lambda: pab.disable(pipe), {moment // (again + 1)})
        pab.disable(pipe)
        assert _plain(pipe, before, plain), moment


def test_an_enable_interrupted_while_it_takes_back_is_taken_back_by_disable(pipe: Pipe) -> None:
    plain = pipe.sample(2)
    before = _attributes(pipe)
    pab.enable(pipe, CONFIG)
    pab.disable(pipe)
    whole = len(_run(lambda: pab.enable(pipe, CONFIG), set()))
    pab.disable(pipe)
    for moment in range(whole // 3, whole, 41):
        for later in range(1, 200, 17):
            _run(lambda: pab.enable(pipe, CONFIG), {moment, moment + later})
            pab.disable(pipe)
            assert _plain(pipe, before, plain), (moment, later)


def test_an_interrupted_enable_of_an_enabled_model_leaves_it_enabled_as_it_was(pipe: Pipe) -> None:
    other = pab.PABConfig(mlp=EVERY_SECOND)
    pab.enable(pipe, other)
    changed = pipe.sample(4)
    pab.enable(pipe, CONFIG)
    wanted, enabled = pipe.sample(4), _attributes(pipe)
    assert not torch.equal(changed, wanted)
    whole = len(_run(lambda: pab.enable(pipe, other), set()))
    assert whole > 20
    for moment in range(whole):
        pab.enable(pipe, CONFIG)
        _run(lambda: pab.enable(pipe, other), {moment})
        found = pipe.sample(4)
        assert _attributes(pipe) == enabled, moment
        assert torch.equal(found, wanted) or (torch.equal(found, changed) and moment > whole - 5), (
            "all is done before its last lines"
        )


def test_after_an_interrupted_run_the_next_one_is_right_and_outside_of_runs_sublayers_run_plainly(pipe: Pipe) -> None:
    attention: Any = pipe.transformer.blocks[0].attn
    x = torch.randn(1, 6, 8)
    plain = attention(x)
    pab.enable(pipe, CONFIG)
    wanted = pipe.sample(4)
    whole = len(_run(lambda: pipe.sample(4), set()))
    assert whole > 500
    for moment in range(1, whole, 7):
        _run(lambda: pipe.sample(4), {moment})
        assert torch.equal(attention(x), plain), moment
        assert torch.equal(pipe.sample(4), wanted), moment
