"""A line, `newest + weight (newest - before)`, is one term: float32 inside, rounded once, on every backend that runs
here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels.broadcast.outputs import extrapolated
from pab_kernels.broadcast.slots import Extrapolation, Key, Slot
from pab_kernels.ops import Line, Norm, broadcast_residual, dequantize, project_residual, quantize
from pab_kernels.ops.cached_outputs import holds
from tests.ops.tensors import DTYPES, KERNEL_DEVICE, draws

WEIGHTS = (1 / 2, 3 / 4, 5 / 6, 5.0)


def number(value: float) -> Tensor:
    return torch.tensor(value, device=KERNEL_DEVICE)


@pytest.fixture(params=["reference", "triton"])
def backend(request: Any) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_large_constant_in_float16_is_given_back_as_it_is(backend: str, weight: float) -> None:
    c = torch.full((1, 3, 136), 4e4, dtype=torch.float16, device=KERNEL_DEVICE)
    x = torch.zeros_like(c)
    line = Line(c, c.clone(), number(weight))
    assert torch.equal(broadcast_residual(x, [line], backend=backend)[0], c)
    gate = torch.full((136,), 2**-8, dtype=torch.float16, device=KERNEL_DEVICE)
    three, y = broadcast_residual(x, [line] * 3, gates=[gate] * 3, norm=Norm("rms"), backend=backend)
    assert torch.equal(three, gate * c + (gate * c + gate * c)) and y is not None and y.isfinite().all()
    a, zeros = x[..., :8], torch.zeros(136, 8, dtype=torch.float16, device=KERNEL_DEVICE)
    assert torch.equal(project_residual(a, zeros, None, x, slots=[line], gates=[gate], backend=backend)[0], gate * c)


def test_a_difference_that_float16_does_not_hold_is_extended(backend: str) -> None:
    c = torch.full((1, 3, 136), 4e4, dtype=torch.float16, device=KERNEL_DEVICE)
    line, x, wanted = Line(c, -c, number(1 / 4)), torch.zeros_like(c), torch.full_like(c, 6e4)
    assert torch.equal(broadcast_residual(x, [line], backend=backend)[0], wanted)
    a, zeros = x[..., :8], torch.zeros(136, 8, dtype=torch.float16, device=KERNEL_DEVICE)
    assert torch.equal(project_residual(a, zeros, None, x, slots=[line], backend=backend)[0], wanted)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kept", [None, torch.int8, torch.float8_e4m3fn, torch.int4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_is_what_a_slot_gives(backend: str, dtype: torch.dtype, kept: Any, weight: float) -> None:
    draw = draws(dtype, device=KERNEL_DEVICE)
    c, x = draw(2, 5, 264), torch.zeros(2, 5, 264, dtype=dtype, device=KERNEL_DEVICE)
    slot = c if kept is None else quantize(c, kept)
    held = broadcast_residual(x, [slot], backend=backend)[0]
    assert torch.equal(broadcast_residual(x, [Line(slot, slot, number(weight))], backend=backend)[0], held)
    assert kept is not None or torch.equal(held, c)


@pytest.mark.parametrize("kinds", ["mm", "ii", "im", "mi"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_stream_and_a_module_give_the_same_bits(dtype: torch.dtype, kinds: str) -> None:
    draw, key = draws(dtype), Key((3, 264), dtype, torch.device("cpu"))
    slots = [draw(3, 264) if kind == "m" else quantize(draw(3, 264), torch.int8) for kind in kinds]
    line, weight = (
        [Slot((slot, [dtype]), key, source, 0) for slot, source in zip(slots, (4, 1), strict=True)],
        torch.tensor(2 / 3),
    )
    of_module = extrapolated(Extrapolation(tuple(line), (weight,)))
    of_stream = broadcast_residual(torch.zeros(3, 264, dtype=dtype), [Line(*slots, weight)])[0]
    assert torch.equal(of_module, of_stream)
    c, c_prev = (slot.double() if isinstance(slot, Tensor) else dequantize(slot, torch.float64) for slot in slots)
    exact = c + weight.double() * (c - c_prev)
    single = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps if "i" in kinds else 0)
    assert (of_stream.double() - exact).abs().max() <= single * exact.abs().max()


def test_in_float64_a_line_is_float64() -> None:
    draw = draws(torch.float64)
    x, c, c_prev, weight = draw(2, 40), draw(2, 40), draw(2, 40), torch.tensor([0.3])
    assert torch.equal(broadcast_residual(x, [Line(c, c_prev, weight)])[0], c + weight.double() * (c - c_prev) + x)


def test_a_line_rounds_once() -> None:
    """Each of two additions, (1 + w) c and -w c_prev, would round, and lose what the line keeps."""
    c, c_prev = (torch.full((1, 8), value, dtype=torch.bfloat16) for value in (1.0, 0.9921875))
    got = broadcast_residual(torch.zeros_like(c), [Line(c, c_prev, torch.tensor(1.0))])[0]
    assert torch.equal(got, torch.full_like(c, 1.0078125))


@pytest.mark.parametrize("which", ["newest", "before"])
def test_either_output_of_a_line_may_be_what_a_device_has_no_float8_for(which: str) -> None:
    slots = {"newest": torch.ones(1, 8), "before": torch.ones(1, 8)}
    assert not holds([(Line(slots["newest"], slots["before"], torch.tensor(1.0)), None)], torch.float8_e4m3fn)
    slots |= {which: quantize(torch.ones(1, 8), torch.float8_e4m3fn)}
    assert holds([(Line(slots["newest"], slots["before"], torch.tensor(1.0)), None)], torch.float8_e4m3fn)
