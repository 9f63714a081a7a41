"""The unmodified kernels of quantize and dequantize on the CPU: the reference's bits, every element written once, no
other touched."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from pab_kernels.ops import Quantized, dequantize, quantize
from tests.csrc.machine import NUMBERS, Machine, library
from tests.ops.tensors import DTYPES, EIGHT_BITS


def _struct(pointers: str, numbers: str, dtypes: str) -> type[ctypes.Structure]:
    kinds = ((pointers, ctypes.c_void_p), (numbers, ctypes.c_int64), (dtypes, ctypes.c_int))
    return type(
        "Arguments",
        (ctypes.Structure,),
        {"_fields_": [(name, kind) for names, kind in kinds for name in names.split()]},
    )


QuantizeArguments = _struct(
    "x data scale", "rows channels group x_stride data_stride scale_stride", "x_dtype data_dtype"
)
DequantizeArguments = _struct(
    "data scale out", "rows channels group data_stride scale_stride out_stride", "data_dtype out_dtype"
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return library("quantize.cu", tmp_path_factory.mktemp("lockstep"), ["quantize_plan.cpp"])


def _rows(rows: int, channels: int, padding: int, dtype: torch.dtype) -> Tensor:
    """`[rows, channels]`, aligned to 16 bytes, with room around every row."""
    buffer = torch.zeros(rows * (channels + padding) + 64).to(dtype)
    offset = -buffer.data_ptr() % 16 // buffer.element_size() + 16
    return buffer[offset : offset + rows * (channels + padding)].view(rows, channels + padding)[:, :channels]


@pytest.mark.parametrize("reversed_order", [False, True])
@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "channels", "group", "padding"),
    [
        (5, 256, 128, 0),
        (7, 136, 128, 8),
        (3, 137, 128, 3),
        (9, 72, 72, 0),
        (4, 144, 72, 16),
        (6, 50, 7, 1),
        (1, 1, 1, 0),
        (33, 24, 8, 0),
    ],
)
def test_the_bits_are_those_of_the_reference(kernels, rows, channels, group, padding, dtype, eight, reversed_order):
    machine = Machine(kernels, reversed_order)
    x, data = _rows(rows, channels, padding, dtype), _rows(rows, channels, padding, eight)
    x.copy_(torch.randn(rows, channels) * torch.logspace(-3, 3, channels))
    if rows >= 5:
        x[0, 0], x[-1, -1] = torch.nan, torch.inf
        x[1], x[2], x[3] = (
            0,
            -0.0,
            1e-45 if dtype == torch.float32 else 1e-7,
        )  # the smallest there is, and its scale is 0
    groups, stride = -(-channels // group), channels + padding
    scale = torch.full((rows, groups), -1.0)
    shape = (rows, channels, group)
    arguments = QuantizeArguments(
        x.data_ptr(), data.data_ptr(), scale.data_ptr(), *shape, stride, stride, groups, NUMBERS[dtype], NUMBERS[eight]
    )
    machine.launch("pab_quantize", arguments, [x], [data, scale])
    expected = quantize(x, eight, group, backend="reference")
    assert torch.equal(scale.nan_to_num(-7), expected.scale.nan_to_num(-7))
    finite = expected.scale.isfinite().repeat_interleave(group, -1)[:, :channels]  # a NaN has no particular bits
    assert torch.equal(data.view(torch.uint8)[finite], expected.data.view(torch.uint8)[finite])

    out = _rows(rows, channels, padding, dtype)
    arguments = DequantizeArguments(
        data.data_ptr(),
        scale.data_ptr(),
        out.data_ptr(),
        *shape,
        stride,
        groups,
        stride,
        NUMBERS[eight],
        NUMBERS[dtype],
    )
    machine.launch("pab_dequantize", arguments, [data, scale], [out])
    values = dequantize(Quantized(data, scale, group), dtype, backend="reference")
    assert torch.equal(out.isnan(), values.isnan()) and torch.equal(out[~values.isnan()], values[~values.isnan()])
    assert rows < 5 or (out[0, 0].isnan() and out[-1, -1].isnan())


def test_float8_rounds_to_nearest_even_everywhere(kernels):
    """Every value of e4m3, every middle between two neighbours and what is next to it, at a scale of 1."""
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448
    middles = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(middles, torch.tensor(towards)) for towards in (-torch.inf, torch.inf)]
    positive = torch.cat([values, middles, *beside])
    every = torch.cat([positive, -positive]).view(-1, 2)
    x = torch.cat([every, torch.full((len(every), 2), 448.0)], 1)
    data, scale = torch.zeros(x.shape).to(torch.float8_e4m3fn), torch.zeros(len(x), 1)
    arguments = QuantizeArguments(
        x.data_ptr(), data.data_ptr(), scale.data_ptr(), len(x), 4, 4, 4, 4, 1, 0, NUMBERS[data.dtype]
    )
    Machine(kernels, False).launch("pab_quantize", arguments, [x], [data, scale])
    assert (scale == 1).all() and torch.equal(data.view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8))
