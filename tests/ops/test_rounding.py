"""Casts in kernels round as torch rounds, also in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from pab_kernels.ops import quantize
from pab_kernels.ops.quantized import unpacked
from tests.ops.tensors import KERNEL_DEVICE, draws

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from pab_kernels.ops.rounding import four_bits, from_four_bits, narrow, operand, quantized, scale_of  # noqa: E402


@triton.jit
def _narrow(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, narrow(tl.load(x_ptr + i), out_ptr.dtype.element_ty))


@triton.jit
def _quantize(x_ptr, data_ptr, scale_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x)), data_ptr.dtype.element_ty)
    tl.store(data_ptr + i, quantized(x, scale, data_ptr.dtype.element_ty))
    tl.store(scale_ptr, scale)


@triton.jit
def _four_bits(x_ptr, data_ptr, scale_ptr, back_ptr, ROWS: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr):
    rows, channels = tl.arange(0, ROWS)[:, None], tl.arange(0, W)[None, :]
    data, scale = four_bits(tl.load(x_ptr + rows * W + channels), GROUP)
    tl.store(data_ptr + rows * (W // 2) + tl.arange(0, W // 2)[None, :], data)
    tl.store(
        scale_ptr + rows * (W // GROUP) + tl.arange(0, W // GROUP)[None, :], narrow(scale, scale_ptr.dtype.element_ty)
    )
    tl.store(back_ptr + rows * W + channels, from_four_bits(data))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out_ptr + i, tl.dot(operand(tl.load(a_ptr + i)), operand(tl.load(b_ptr + i))))


def numbers():
    draw = draws(device=KERNEL_DEVICE)
    edges = torch.tensor(
        [0.0, -0.0, 448, -448, 17, 18, 19, 2**-6, 2**-9, 2**-10, 3 * 2**-10, 1e-5, 1.00390625, 1.01171875, 240, -1e-3]
    )
    return torch.cat([draw(500) * s for s in (1e-3, 1e-2, 1, 100, 1e-30)] + [edges.to(KERNEL_DEVICE)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrowing_rounds_to_nearest_even_bit_for_bit(dtype):
    x = numbers()
    x = torch.nn.functional.pad(x, (0, 4096 - len(x))).clamp(-448, 448)
    out = torch.empty_like(x, dtype=dtype)
    _narrow[(1,)](x, out, 4096)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(out.view(bits), x.to(dtype).view(bits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_nan_stays(dtype):
    out = torch.zeros(16, dtype=dtype, device=KERNEL_DEVICE)
    _narrow[(1,)](torch.full((16,), torch.nan, device=KERNEL_DEVICE), out, 16)
    assert out.float().isnan().all()


@pytest.mark.parametrize("size", [1e-3, 1, 1e4, 0, 1e-41])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantising_is_that_of_the_slots_bit_for_bit(dtype, size):
    x = draws(seed=3, device=KERNEL_DEVICE)(128) * size
    expected = quantize(x, dtype)
    data, scale = torch.empty_like(expected.data), torch.empty_like(expected.scale)
    _quantize[(1,)](x, data, scale, 128)
    assert torch.equal(scale, expected.scale) and torch.equal(data.float(), expected.data.float())


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("size", [1e-3, 1, 1e4, 0, 1e-41, 1e37])
def test_4_bits_are_those_of_the_slots_bit_for_bit(size):
    x = draws(seed=3, device=KERNEL_DEVICE)(4, 128) * size
    x[1, 40:42] = torch.tensor([5.0, -5.0]) * size  # two alike: the negative one is -8
    expected = quantize(x, torch.int4)
    data, scale, back = torch.empty_like(expected.data), torch.empty_like(expected.scale), torch.empty_like(x)
    _four_bits[(1,)](x, data, scale, back, 4, 128, 32)
    assert torch.equal(scale, expected.scale) and torch.equal(data, expected.data)
    assert torch.equal(back, unpacked(expected.data, 128))
    x[2, 64], x[3, 5] = torch.nan, -torch.inf
    _four_bits[(1,)](x, data, scale, back, 4, 128, 32)
    finite = quantize(x, torch.int4).scale.isfinite()
    assert torch.equal(scale.isfinite(), finite) and (~finite).sum() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_halves_are_summed_in_float32(dtype):
    draw = draws(dtype, device=KERNEL_DEVICE)
    a, b = draw(32, 32), draw(32, 32)
    out = torch.empty(32, 32, device=KERNEL_DEVICE)
    _dot[(1,)](a, b, out, 32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-4)
