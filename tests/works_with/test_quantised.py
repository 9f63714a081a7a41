"""Quantised linear layers: torchao and bitsandbytes where they are installed, and the two ways in which such layers are
made, by hand.

One way keeps `nn.Linear` and gives it a weight that is more than its numbers (torchao), the other puts a subclass in
its place (bitsandbytes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.works_with.combination import FLUX, LATTE, WAN, Subject, check, sublayers

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use


class Int8Weight(Tensor):
    """int8 numbers with a scale for each row.

    It is of the dtype that it stands for, and a linear layer dequantises it.
    """

    q: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    def __init__(self, weight: Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.q = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return args[0]
        plain = [(a.q * a.scale).to(a.dtype) if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


class Int8Linear(nn.Linear):
    """A subclass whose weight is packed: in it are other numbers, in another shape."""

    scale: Tensor

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        weight = Int8Weight(linear.weight)
        made.weight = nn.Parameter(weight.q.reshape(-1, 1), requires_grad=False)
        made.bias = linear.bias
        made.register_buffer("scale", weight.scale)
        return made

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.reshape(self.out_features, self.in_features) * self.scale
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def in_blocks(model: Any) -> list[tuple[str, nn.Linear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks." in name]


def by_weights(model: Any) -> None:
    for _, linear in in_blocks(model):
        linear.weight = nn.Parameter(Int8Weight(linear.weight.data), requires_grad=False)


def by_subclass(model: Any) -> None:
    for name, linear in in_blocks(model):
        model.set_submodule(name, Int8Linear.of(linear))


def torchao(model: Any) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    for _, linear in in_blocks(model):
        quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())


def bitsandbytes(bits: int) -> Callable[[Any], None]:
    def combine(model: Any) -> None:
        bnb = pytest.importorskip("bitsandbytes")
        for name, linear in in_blocks(model):
            wide = {"bias": linear.bias is not None}
            if bits == 4:
                made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, **wide)
            else:
                made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, **wide)
            made.load_state_dict(linear.state_dict())
            model.set_submodule(name, made.to("cpu"))
        model.requires_grad_(False)

    combine.__name__ = f"bitsandbytes {bits} bits"
    return combine


WAYS = [by_weights, by_subclass, torchao, bitsandbytes(4), bitsandbytes(8)]
CASES = [
    (subject, way) for way in WAYS for subject in (WAN, FLUX, LATTE) if subject is not WAN or "bits" not in way.__name__
]
"""Wan's widths are too odd for bitsandbytes."""


@pytest.mark.parametrize(("subject", "way"), CASES, ids=lambda v: v.name if isinstance(v, Subject) else v.__name__)
def test_quantised_linear_layers(subject: Subject, way: Callable[[Any], None]) -> None:
    plain = subject.build()
    found, out = sublayers(plain), subject.call(plain, 0)
    way(plain)
    assert sublayers(plain) == found and not torch.equal(subject.call(plain, 0), out)
    check(subject, way, flops="8 bits" not in way.__name__)  # whose own product is not known on the meta device
