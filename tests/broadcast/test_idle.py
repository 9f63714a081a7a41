"""Sublayers of which nothing is reused in a whole generation: they run as they are, once in every call that is
counted."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.attach import is_stand_in
from tests.hang import HANG

KINDS = {"blocks.*.0": "spatial", "blocks.*.1": "mlp"}
EVERY_SECOND = PABConfig(spatial=Broadcast(2, (0, 1)))


class Model(nn.Module):
    """Two blocks of an attention and an MLP, with something done between them."""

    def __init__(self, between: Callable[[], Any] = lambda: None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks[0](x)
        self.between()
        return self.blocks[1](x)  # type: ignore[no-any-return]


X = torch.ones(1, 2, 4)


def counts(model: Any, name: str = "#0") -> dict[str, tuple[int, int]]:
    return {kind: (t.computed, t.reused) for kind, t in pab.summary(model).contexts[name].items()}


@pytest.fixture
def model() -> Model:
    made = Model().eval().requires_grad_(False)
    pab.enable(made, EVERY_SECOND, num_steps=4, kinds=KINDS)
    return made


def test_only_calls_of_the_model_are_counted(model: Model) -> None:
    mlp: Any = model.blocks[0][1]  # type: ignore[index]
    for _ in range(2):
        mlp(X)
        model(X)
        mlp(X)
        mlp(X)
    assert counts(model) == {"spatial": (2, 2), "mlp": (4, 0)}


def test_of_a_call_that_fails_what_ran_is_counted(model: Model) -> None:
    def fail() -> None:
        raise ArithmeticError("on purpose")

    model.between = fail
    with pytest.raises(ArithmeticError):
        model(X)
    assert counts(model) == {"spatial": (1, 0)}


def test_a_call_inside_of_another_counts_its_own(model: Model) -> None:
    inner, outer = pab.generation(model, num_steps=4), pab.generation(model, num_steps=2)

    def call_inside() -> None:
        model.between = lambda: None
        with inner:
            model(X)

    for _ in range(2):
        model.between = call_inside
        with outer:
            model(X)
    for request in (inner, outer):
        assert counts(request) == {"spatial": (2, 2), "mlp": (4, 0)}


def test_rules_that_come_later_find_no_idle_turn(model: Model) -> None:
    model(X)
    pab.enable(model, PABConfig(mlp=Broadcast(2, (0, 1))), num_steps=4)
    for _ in range(4):
        model(X)
    assert counts(model) == {"spatial": (8, 0), "mlp": (4, 4)}


def test_a_plain_call_after_others_is_not_counted_below(model: Model) -> None:
    model(X)
    model.requires_grad_(True)
    with torch.enable_grad():
        model(X)
    model.requires_grad_(False)
    model(X)
    assert counts(model) == {"spatial": (2, 2), "mlp": (4, 0)}
    assert pab.summary(model).plain_calls == 1


def test_threads_count_apart(model: Model) -> None:
    requests = [pab.generation(model, num_steps=4) for _ in range(2)]
    barrier = threading.Barrier(2, timeout=HANG)
    model.between = barrier.wait

    def run(request: Any) -> None:
        for _ in range(4):
            with request:
                model(X)

    threads = [threading.Thread(target=run, args=[request]) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request in requests:
        assert counts(request) == {"spatial": (4, 4), "mlp": (8, 0)}


def test_an_enabled_model_is_exported_after_calls(model: Model) -> None:
    plain = model(X)
    exported = torch.export.export(model, (X,), strict=True)
    assert torch.equal(exported.module()(X), plain)
    model(X)
    assert counts(model) == {"spatial": (2, 2), "mlp": (4, 0)}


def stand_ins(model: Model) -> set[str]:
    return {name for name, module in model.named_modules() if name and is_stand_in(vars(module).get("forward"))}


def test_only_sublayers_that_a_rule_reuses_have_stand_ins(model: Model) -> None:
    attention, mlps = {"blocks.0.0", "blocks.1.0"}, {"blocks.0.1", "blocks.1.1"}
    assert stand_ins(model) == attention
    pab.enable(model, PABConfig(spatial=1, mlp=Broadcast(2, layers=[1])))
    assert stand_ins(model) == attention | {"blocks.1.1"}, "those of earlier rules stay: their generation may go on"
    pab.enable(model, PABConfig(), timed=True)
    assert stand_ins(model) == attention | mlps, "time is measured between sublayers"
    pab.disable(model)
    assert not stand_ins(model)
