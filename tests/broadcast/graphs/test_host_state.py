"""What of a model a CUDA graph depends on."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from pab_kernels.broadcast.graphs.host_state import difference, host_state


class Way(enum.Enum):
    A = 1
    B = 2


class Processor:
    def __init__(self) -> None:
        self.way = Way.A
        self.table = torch.ones(2)
        self.seen: list[int] = []


def model() -> Any:
    made = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.Dropout(0.5)))
    made[1].register_buffer("angles", torch.ones(3), persistent=False)
    made[0].processor = Processor()
    made[0].scaling = {"default": 1.0}
    made[0].quantised = TwoTensor(torch.ones(2), torch.ones(2))
    made[0].names = ["a", ("b", 1)]
    return made


def replaced(m: Any) -> None:
    m[0].weight = nn.Parameter(m[0].weight.clone())


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (replaced, "0._parameters"),
        (lambda m: setattr(m[0].weight, "data", m[0].weight.data.clone()), "0._parameters"),
        (lambda m: setattr(m[0].weight, "data", m[0].weight.data.t()), "0._parameters"),
        (lambda m: m[1].register_buffer("angles", torch.ones(3)), "1._buffers"),
        (lambda m: m[1].train(False), "1.training"),
        (lambda m: setattr(m[1][1], "p", 0.25), "1.1.p"),
        (lambda m: m[0].scaling.update(default=0.5), "0.scaling"),
        (lambda m: m[0].scaling.update(other=1.0), "0.scaling"),
        (lambda m: m[0].names.append("c"), "0.names"),
        (lambda m: setattr(m[0].processor, "way", Way.B), "0.processor"),
        (lambda m: setattr(m[0].processor, "table", torch.ones(2)), "0.processor"),
        (lambda m: setattr(m[0].quantised, "b", torch.ones(2)), "0.quantised"),
        (lambda m: setattr(m[0], "processor", Processor()), "0.processor"),
        (lambda m: setattr(m[0], "forward", lambda x: x), "0.forward"),
        (lambda m: m.__setitem__(1, nn.Identity()), "_modules"),
        (lambda m: m[1].append(nn.GELU()), "1._modules"),
        (lambda m: m[0].register_forward_hook(lambda *_: None), "0._forward_hooks"),
        (lambda m: setattr(m, "loaded", True), "loaded"),
    ],
)
def test_a_change_is_told_by_module_and_attribute(change: Callable[[Any], None], where: str) -> None:
    made = model()
    before, kept = host_state(made), [*made.parameters(), *made.modules(), made[0].processor, made[0].quantised.b]
    assert difference(before, host_state(made)) is None
    change(made)
    assert difference(before, host_state(made)) == where and kept


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.mul_(2),
        lambda m: m.load_state_dict({name: 2 * t for name, t in m.state_dict().items()}),
        lambda m: m[0].processor.seen.append(1),
    ],
)
def test_other_values_in_the_same_tensors_are_no_change(change: Callable[[Any], None]) -> None:
    made = model().requires_grad_(False)
    before = host_state(made)
    change(made)
    assert difference(before, host_state(made)) is None
