"""Weights that are elsewhere until a module runs: model, sequential and group offloading of accelerate and
diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_latte import sample, tiny_pipe
from tests.pairs import pairs
from tests.works_with.combination import (
    COGVIDEOX,
    FLUX,
    LATTE,
    STEPS,
    TWO,
    WAN,
    Subject,
    check,
    counted,
    enabled_before_and_after,
    run,
    same,
    sublayers,
)
from tests.works_with.group_offloading import CPU, grouped, offloading

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use

subjects = pytest.mark.parametrize("subject", [WAN, COGVIDEOX, LATTE], ids=lambda s: s.name)


@subjects
def test_model_offload(subject: Subject) -> None:
    check(subject, lambda model: accelerate.cpu_offload_with_hook(model, CPU)[0])


@subjects
def test_sequential_offload(subject: Subject) -> None:
    """Weights are on the meta device wherever they are not needed."""

    def combine(model: Any) -> None:
        accelerate.cpu_offload(model, CPU)
        assert all(p.is_meta for p in model.parameters())

    check(subject, combine)


@pytest.mark.parametrize(
    ("subject", "kind", "prefetch"),
    pairs([WAN, FLUX, LATTE], ["block_level", "leaf_level"], [False, True]),
    ids=lambda v: {False: "on demand", True: "prefetched"}[v] if isinstance(v, bool) else getattr(v, "name", v),
)
def test_group_offload(subject: Subject, kind: str, prefetch: bool) -> None:
    with offloading():
        check(subject, lambda model: grouped(model, kind, prefetch=prefetch))


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("subject", [FLUX, LATTE], ids=lambda s: s.name)
def test_a_rule_for_blocks_gives_what_it_gives_without_offloading(subject: Subject, kind: str) -> None:
    plain = subject.build()
    pab.enable(plain, PABConfig(block=Broadcast(3, (0, 1))), num_steps=STEPS)
    wanted = run(subject, plain)
    with offloading():
        model = subject.build()
        pab.enable(model, PABConfig(block=Broadcast(3, (0, 1))), num_steps=STEPS)
        grouped(model, kind, prefetch=True)
        assert same(run(subject, model), wanted) and counted(model) == counted(plain)


@pytest.mark.parametrize("subject", [WAN, LATTE], ids=lambda s: s.name)
def test_weights_of_a_reused_sublayer_are_not_moved(subject: Subject) -> None:
    with offloading() as onloaded:
        for _, model in enabled_before_and_after(subject, lambda model: grouped(model, "leaf_level")):
            inside = {m for name in sublayers(model) for m in model.get_submodule(name).modules()}
            moved = []
            pab.enable(model, TWO)
            with pab.generation(model, num_steps=STEPS):
                for step in range(STEPS):
                    onloaded.clear()
                    subject.call(model, step)
                    moved.append(sum(group.onload_leader in inside for group in onloaded))
            assert all(moved[::2]) and not any(moved[1::2])
            assert onloaded, "the rest of the model runs"


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: accelerate.cpu_offload(
            pipe.transformer, CPU
        ),  # as enable_sequential_cpu_offload does, which takes no CPU
        lambda pipe: pipe.enable_group_offload(onload_device=CPU, offload_type="leaf_level"),
    ],
    ids=["model", "sequential", "group"],
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_pipeline(offload: Callable[[Any], Any], order: str) -> None:
    plain, pipe = tiny_pipe(), tiny_pipe()
    wanted = sample(plain, 4)
    pab.enable(plain, TWO)
    again = sample(plain, 4)
    if order == "before":
        pab.enable(pipe, TWO)
    offload(pipe)
    pab.enable(pipe, TWO)
    for _ in range(2):
        assert torch.equal(sample(pipe, 4), again) and pab.summary(pipe) == pab.summary(plain)
    pab.disable(pipe)
    assert torch.equal(sample(pipe, 4), wanted)
