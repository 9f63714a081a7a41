"""`quantize` and `dequantize` in CUDA, on a device: bit for bit the reference, whatever the strides, the stream and the
graph."""

from __future__ import annotations

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pab_kernels.ops import Quantized, cuda_library, dequantize, quantize
from pab_kernels.ops.dequantize import Dequantize
from pab_kernels.ops.quantize import Quantize
from tests.ops.tensors import (
    DTYPES,
    EIGHT_BITS,
    assert_same,
    called_when_compiled,
    draws,
    guarded_quantized,
    launch,
    opcheck,
)

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)
REASON = cuda_library.refuse(torch.empty(0, device="cuda"))
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

CALLS = int(os.environ.get("PAB_FUZZ_CALLS", "200"))


def spread(*sizes: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Channels of very different sizes, on the device."""
    return (draws(seed=seed)(*sizes) * torch.logspace(-3, 3, sizes[-1])).to(dtype).cuda()


def assert_the_same_as_the_reference(x: Tensor, eight: torch.dtype, group: int) -> None:
    q, expected = quantize(x, eight, group, backend="cuda"), quantize(x, eight, group, backend="reference")
    assert_same(q.scale, expected.scale)
    assert torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8)) and q.data.is_contiguous()
    assert_same(dequantize(q, x.dtype, backend="cuda"), dequantize(expected, x.dtype, backend="reference"))


@pytest.mark.parametrize("sizes", [(1,), (3, 137), (2, 5, 1152), (2, 3, 4, 72), (0, 128), (70000, 128)])
@pytest.mark.parametrize("eight", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_the_reference(dtype, eight, sizes):
    for group in {128, 72, sizes[-1] if sizes[-1] <= 128 else 1}:
        assert_the_same_as_the_reference(spread(*sizes, dtype=dtype), eight, group)


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_any_strides(eight):
    x = spread(136, 24, 256, dtype=torch.bfloat16)
    for view in (x[:, ::2, 8:], x[:, :, 1:130], x.permute(1, 2, 0), x[:1].expand(3, 24, 256), x.transpose(0, 1)):
        assert_the_same_as_the_reference(view, eight, 128)


@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_zeros_extremes_and_what_is_not_finite(eight):
    x = spread(6, 256, dtype=torch.float32)
    x[0] = 0
    x[1] = -0.0
    x[2] = 1e-45
    x[3] *= 1e32
    assert_the_same_as_the_reference(x, eight, 128)
    x[4, 3], x[5, 200] = torch.nan, -torch.inf
    back = dequantize(quantize(x, eight, backend="cuda"), torch.float32, backend="cuda")
    assert (
        back[4, 3].isnan()
        and back[5, 200].isnan()
        and back[4, 128:].isfinite().all()
        and back[5, :128].isfinite().all()
    )


@pytest.mark.parametrize("channels", [200, 256])
@pytest.mark.parametrize("eight", EIGHT_BITS)
def test_nothing_but_the_output_is_written(eight, channels):
    x = spread(5, 7, channels, dtype=torch.bfloat16)
    out, guards = guarded_quantized(5, 7, channels, dtype=eight, group=128, device="cuda")
    launch("quantize", "cuda", Quantize(x, eight), out)
    for guard in guards:
        guard.assert_written()
    assert_same(out, quantize(x, eight, backend="reference"), strides=False)
    values = torch.full((5, 7, channels + 16), torch.nan, device="cuda")
    launch("dequantize", "cuda", Dequantize(out, torch.float32), values[..., 8:-8])
    assert values[..., :8].isnan().all() and values[..., -8:].isnan().all() and values[..., 8:-8].isfinite().all()


def test_every_value_of_eight_bits_dequantises_exactly():
    for eight in EIGHT_BITS:
        data = torch.arange(256, dtype=torch.uint8, device="cuda").view(eight).view(2, 128)
        q = Quantized(data, torch.tensor([[0.37], [3e-5]], device="cuda"))
        for dtype in DTYPES:
            made, expected = (dequantize(q, dtype, backend=backend) for backend in ("cuda", "reference"))
            assert torch.equal(made.isnan(), expected.isnan()) and torch.equal(made.nan_to_num(), expected.nan_to_num())


def test_it_runs_on_the_current_stream_and_in_graphs():
    x, out = (
        spread(64, 1152, dtype=torch.bfloat16),
        quantize(spread(64, 1152, dtype=torch.bfloat16, seed=1), torch.int8),
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        y = x * 2
        launch("quantize", "cuda", Quantize(y, torch.int8), out)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(out, quantize(x * 2, torch.int8, backend="reference"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch("quantize", "cuda", Quantize(x, torch.int8), out)
    x.mul_(0.5)
    graph.replay()
    assert_same(out, quantize(x, torch.int8, backend="reference"))


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    x = spread(5, 256, dtype=torch.float32).to("cuda:1")
    assert_same(quantize(x, torch.int8, backend="cuda"), quantize(x, torch.int8, backend="reference"))


def test_again_and_again_gives_the_same_bits():
    x = spread(1000, 1152, dtype=torch.float16)
    first = quantize(x, torch.float8_e4m3fn, backend="cuda")
    for _ in range(20):
        assert_same(quantize(x, torch.float8_e4m3fn, backend="cuda"), first)


def test_compiled_it_is_one_operation_that_torch_knows():
    x = spread(5, 200, dtype=torch.float32)
    q, called = called_when_compiled(lambda x: quantize(x, torch.int8, backend="cuda").data, x)
    assert called == ["pab_kernels.quantize.default"]
    assert torch.equal(q, quantize(x, torch.int8, backend="reference").data)
    opcheck(torch.ops.pab_kernels.quantize, (x, torch.int8, 128, "cuda"))


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 600)),
    offset=st.integers(0, 9),
    group=st.integers(1, 128),
    dtype=st.sampled_from(DTYPES),
    eight=st.sampled_from(EIGHT_BITS),
    seed=st.integers(0, 1000),
)
@settings(max_examples=CALLS)
def test_fuzz(sizes, offset, group, dtype, eight, seed):
    assert_the_same_as_the_reference(
        spread(sizes[0], sizes[1] + offset, dtype=dtype, seed=seed)[:, offset:], eight, group
    )
