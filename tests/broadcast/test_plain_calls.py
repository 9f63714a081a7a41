"""Calls that are no part of a sampling run (training, evaluation, warm-up, export) run plainly, are counted, and
disturb no run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pab_kernels as pab
from tests.broadcast.toy import CONFIG, Pipe, Toy, noise, toy

STEPS = 8


def training_step(model: Toy) -> None:
    model.requires_grad_(True)
    out = model(noise(7), torch.tensor([321.0]), noise(8, 3))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    model.requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(out, toy()(noise(7), torch.tensor([321.0]), noise(8, 3)))


@torch.no_grad()
def evaluation(model: Toy) -> None:
    given = noise(7), torch.tensor([321.0]), noise(8, 3)
    assert torch.equal(model(*given), toy()(*given))


def export(model: Toy) -> None:
    given = noise(7), torch.tensor([321.0]), noise(8, 3)
    with torch.no_grad():
        program = torch.export.export(model, given, strict=False)
        assert torch.equal(program.module()(*given), toy()(*given))


def tracing(model: Toy) -> None:
    given = noise(7), torch.tensor([321.0]), noise(8, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and warns of numbers that it takes for constant
        traced: Any = torch.jit.trace(model, given, check_trace=False)
    assert torch.allclose(traced(*given), toy()(*given))


@pytest.fixture(params=["a pipeline", "a bare model"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def runs(way: str) -> tuple[Any, Toy, Iterator[Any]]:
    """What is enabled, its model, and the steps of a run."""
    model = toy()
    if way == "a pipeline":
        pipe = Pipe(model)
        pab.enable(pipe, CONFIG)
        return pipe, model, pipe.steps(STEPS, 0)
    pab.enable(model, CONFIG)

    def steps() -> Iterator[Any]:
        request, text = pab.generation(model, num_steps=STEPS), noise(100, 3)
        for i in range(STEPS):
            with request, torch.no_grad():
                out = model(noise(i), torch.tensor([900.0 - i]), text)
            yield out

    return model, model, steps()


@pytest.mark.parametrize("other", [training_step, evaluation, export, tracing])
@pytest.mark.parametrize("at", [0, 3, STEPS], ids=["before", "in the middle", "after"])
def test_a_call_that_is_no_part_of_a_run(other: Any, at: int, way: str) -> None:
    _, _, expected = runs(way)
    of, model, steps = runs(way)
    for i in range(STEPS + 1):
        if i == at:
            other(model)
            assert pab.summary(of).plain_calls == (other is not export)
        if i < STEPS:
            assert torch.equal(next(steps), next(expected)), i
    assert pab.summary(of).forced == 0
    pab.disable(of)
    other(model)


def test_gradients_are_said_once_and_calls_of_nobody_once(caplog: pytest.LogCaptureFixture) -> None:
    pipe, model, _ = runs("a pipeline")
    for _ in range(3):
        training_step(model)
        evaluation(model)
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 2 and "gradients are recorded" in said[0] and "no sampling run that is followed" in said[1]
    assert pab.summary(pipe).plain_calls == 6


def test_a_run_that_records_gradients_is_plain_and_takes_no_steps_of_a_bare_model() -> None:
    model = toy().requires_grad_(True)
    pab.enable(model, CONFIG, num_steps=2)
    for _ in range(3):
        model(noise(0), torch.tensor([1.0]), noise(1, 3))
    summary = pab.summary(model)
    assert summary.plain_calls == 3 and not summary.contexts


def test_a_model_with_gradients_is_broadcast_where_none_are_recorded() -> None:
    pipe = Pipe(toy().requires_grad_(True))
    pab.enable(pipe, CONFIG)
    pipe.sample(STEPS)
    summary = pab.summary(pipe)
    assert summary.plain_calls == 0 and summary.contexts["#0"]["spatial"].reused > 0


def test_a_plain_call_within_a_call_takes_none_of_its_turns() -> None:
    _, model, steps = runs("a pipeline")
    _, _, expected = runs("a pipeline")
    plain, began, ended = toy(), [], []

    def of_the_whole(*_: Any) -> None:
        if len(began) == len(ended):
            began.append(True)
            given = noise(len(began)).requires_grad_(), torch.tensor([321.0]), noise(8, 3)
            with torch.enable_grad():
                assert torch.equal(model(*given), plain(*given))
            ended.append(True)

    model.blocks[1].register_forward_pre_hook(of_the_whole)
    assert all(torch.equal(got, right) for got, right in zip(steps, expected, strict=True))
