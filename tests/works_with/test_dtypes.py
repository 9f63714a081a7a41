"""Half precision, autocast, inference mode and memory formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import pab_kernels as pab
from tests.works_with.combination import LATTE, STEPS, SUBJECTS, TWO, WAN, Subject, check, run, same

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings(
        "ignore:Mismatch dtype between input and weight:UserWarning"
    ),  # autocast leaves Wan's RMSNorm as it is
]

subjects = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
HALVES = [torch.bfloat16, torch.float16]


def with_inputs(subject: Subject, change: Callable[[torch.Tensor], torch.Tensor]) -> Subject:
    def inputs(seed: int) -> dict[str, Any]:
        return {name: change(v) if isinstance(v, torch.Tensor) else v for name, v in subject.inputs(seed).items()}

    return replace(subject, inputs=inputs)


@subjects
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(subject: Subject, dtype: torch.dtype) -> None:
    halves = with_inputs(subject, lambda v: v.to(dtype) if v.is_floating_point() and v.ndim > 1 else v)
    check(halves, lambda model: model.to(dtype))


@pytest.mark.parametrize("subject", [WAN, LATTE], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast(subject: Subject, dtype: torch.dtype) -> None:
    check(subject, lambda model: None, around=lambda: torch.autocast("cpu", dtype))


@pytest.mark.parametrize("subject", [WAN, LATTE], ids=lambda s: s.name)
def test_inference_mode(subject: Subject) -> None:
    check(subject, lambda model: None, around=torch.inference_mode)


@pytest.mark.parametrize("subject", [WAN, LATTE], ids=lambda s: s.name)
def test_what_inference_mode_kept_is_reused_outside_of_it(subject: Subject) -> None:
    model = subject.build()
    pab.enable(model, TWO, num_steps=STEPS)
    wanted = run(subject, model)
    for first in (True, False):
        with pab.generation(model, num_steps=STEPS):
            found = []
            for step in range(STEPS):
                for place, name in enumerate(("cond", "uncond")):
                    with (
                        torch.inference_mode((step % 2 == 0) == first),
                        torch.set_grad_enabled(True),
                        pab.context(model, name),
                    ):
                        found.append(subject.call(model, step + 100 * place))
        assert same(found, wanted) and pab.summary(model).forced == 0


@pytest.mark.parametrize("subject", [WAN, LATTE], ids=lambda s: s.name)
def test_channels_last(subject: Subject) -> None:
    dense = next(iter(subject.inputs(0).values()))
    assert dense.ndim == 5
    wide = with_inputs(subject, lambda v: v.contiguous(memory_format=torch.channels_last_3d) if v.ndim == 5 else v)

    def combine(model: Any) -> None:
        for name, p in model.named_parameters():
            if p.ndim > 3:
                p.data = p.data.contiguous(memory_format=torch.channels_last_3d if p.ndim == 5 else torch.channels_last)
                assert not p.is_contiguous() or 1 in p.shape, name

    check(wide, combine)
