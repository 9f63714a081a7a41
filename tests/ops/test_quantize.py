"""Quantised slots are as near to what they keep as 8 or 4 bits allow."""

from __future__ import annotations

import shutil

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from pab_kernels.ops import Quantized, dequantize, empty_quantized, quantize
from pab_kernels.ops.quantized import FORMATS, unpacked
from tests.ops.tensors import DTYPES, QUANTISED, assert_refuses, assert_same, called_when_compiled, draws


@pytest.mark.parametrize("channels", [1, 72, 128, 136, 1152])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_the_error_stays_within_half_a_step_of_the_groups_own_scale(dtype, channels):
    x = draws()(3, 5, channels) * torch.logspace(-3, 3, channels)  # the groups have very different sizes
    q = quantize(x, dtype)
    used, width = FORMATS[dtype], FORMATS[dtype].group
    assert q.dtype == dtype and q.data.dtype == used.data and q.shape == x.shape and q.group == width
    assert q.scale.dtype == used.scale and q.scale.shape == (3, 5, -(-channels // width))
    for start in range(0, channels, width):
        group, scale = x[..., start : start + width], q.scale[..., start // width].unsqueeze(-1)
        extreme = group.gather(-1, group.abs().argmax(-1, keepdim=True))
        exact = {torch.int8: extreme.abs() / 127, torch.float8_e4m3fn: extreme.abs() / 448, torch.int4: extreme / -8}
        assert torch.equal(scale, exact[dtype].to(used.scale))
        error = (dequantize(q, x.dtype)[..., start : start + width] - group).abs()
        if dtype == torch.int4:  # there is a -8, and no 8: what lies beyond 7.5 steps on the other side becomes 7
            steps = (group / scale).nan_to_num()
            assert (
                error <= (0.5001 * scale.abs()).maximum((steps - 7) * scale.abs() * 1.0001) + 2**-9 * group.abs()
            ).all()
            continue
        step = scale if dtype == torch.int8 else torch.maximum(group.abs() / 8, scale / 512)
        assert (error <= 0.5001 * step).all()


@pytest.mark.parametrize("dtype", QUANTISED)
def test_each_value_becomes_the_nearest_one_there_is(dtype):
    x = draws()(4, 200)
    q = quantize(x, dtype)
    if dtype == torch.int4:
        every = torch.arange(-8.0, 8)
    else:
        every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        every = every[~every.isnan() & (every > -128 if dtype == torch.int8 else every.abs() <= 448)]
    scale = q.scale.double().repeat_interleave(q.group, -1)[..., :200]
    nearest = (x.double() / scale).unsqueeze(-1).sub(every.double()).abs().amin(-1)
    assert ((x - dequantize(q, torch.float32).double()).abs() <= (nearest * 1.0001 + 1e-5) * scale.abs()).all()


def test_two_values_of_4_bits_share_a_byte_the_even_channel_the_low_half():
    x = torch.tensor([[-8.0, 7, 3, -1, 5]])
    q = quantize(x, torch.int4)
    assert q.data.tolist() == [[0x78, 0xF3, 0x05]] and q.scale.tolist() == [[1]] and q.shape == (1, 5)
    assert torch.equal(dequantize(q, torch.float32), x)
    assert quantize(-x, torch.int4).scale.tolist() == [[-1]], "of either sign the largest magnitude is -8"
    assert quantize(torch.tensor([[1.0, -1.0]]), torch.int4).scale.tolist() == [[0.125]]
    every = torch.arange(256, dtype=torch.uint8).unsqueeze(-1)
    low, high = dequantize(Quantized(every, torch.ones(256, 1).bfloat16(), 32), torch.float32).unbind(-1)
    assert set(low.tolist()) == set(high.tolist()) == set(range(-8, 8))
    assert torch.equal((low % 16 + 16 * (high % 16)), every[:, 0].float())


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_group_of_zeros_is_exactly_zero(dtype):
    x = draws()(2, 300)
    x[0, 128:256] = 0
    x[1] = 0
    back = dequantize(quantize(x, dtype), torch.float32)
    assert (back[0, 128:256] == 0).all() and (back[1] == 0).all()
    assert torch.allclose(back, x, atol=0.5 if dtype == torch.int4 else 0.1)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("size", [1e-45, 2.66e-43, 9.39e-43, 1e-40, 1e-30, 1e30, 3e38])
def test_extreme_groups_stay_finite(dtype, size):
    x = torch.tensor([[size, -size, size / 2, 0.0]])
    back = dequantize(quantize(x, dtype), torch.float32)
    vanishes = FORMATS[dtype].most * 1.4e-45  # what is smaller has a scale of 0
    if dtype == torch.int4:
        vanishes = 8 * 2**-126  # or one without an inverse
    assert ((back - x).abs() <= max(size / 2, vanishes)).all()


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_seen_in_its_group_and_nowhere_else(dtype, bad):
    x = draws()(1, 256)
    x[0, 3] = bad
    back = dequantize(quantize(x, dtype), torch.float32)
    assert back[0, 3].isnan() and back[0, FORMATS[dtype].group :].isfinite().all()


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("own", DTYPES)
def test_dequantising_rounds_once(dtype, own):
    q = quantize(draws(own)(5, 136), dtype)
    scale = torch.stack([q.scale[:, c // q.group] for c in range(136)], -1).float()
    data = unpacked(q.data, 136) if dtype == torch.int4 else q.data.float()
    assert torch.equal(dequantize(q, own), (data * scale).to(own))


@pytest.mark.parametrize("group", [1, 40, 72, 500])
def test_other_groups(group):
    x = draws()(2, 144)
    q = quantize(x, torch.int8, group=group)
    assert q.group == group and q.scale.shape == (2, -(-144 // group))
    for c in range(144):
        assert torch.equal(
            q.scale[:, c // group], x[:, c // group * group : (c // group + 1) * group].abs().amax(-1) / 127
        )
    assert torch.allclose(dequantize(q, torch.float32), x, atol=0.02)


@pytest.mark.parametrize("dims", [(2, 1, 0), (1, 0, 2), (0, 2, 1)])
@pytest.mark.parametrize("sizes", [(136, 128, 256), (128, 384, 128)])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_any_strides_give_the_contiguous_result(dtype, sizes, dims):
    x = draws()(*sizes).permute(dims)[:3, :2]
    q = quantize(x, dtype)
    assert q.data.is_contiguous() and q.scale.is_contiguous()
    assert_same(q, quantize(x.contiguous(), dtype))


def test_bytes():
    q = quantize(draws()(7, 1152), torch.int8)
    assert q.nbytes == 7 * (1152 + 9 * 4)
    assert quantize(draws()(7, 1151), torch.int4).nbytes == 7 * (576 + 36 * 2)
    assert q.device == torch.device("cpu")


@pytest.mark.parametrize("dtype", QUANTISED)
def test_meta_and_fake_tensors(dtype):
    real = quantize(draws()(2, 3, 135), dtype)
    with FakeTensorMode():
        fakes = [quantize(torch.empty(2, 3, 135), dtype)]
    for other in (*fakes, quantize(torch.empty(2, 3, 135, device="meta"), dtype), empty_quantized((2, 3, 135), dtype)):
        used = FORMATS[dtype]
        assert (other.data.shape, other.data.dtype, other.data.stride()) == (
            real.data.shape,
            used.data,
            real.data.stride(),
        )
        assert (other.scale.shape, other.scale.dtype, other.scale.stride()) == (
            real.scale.shape,
            used.scale,
            real.scale.stride(),
        )
        assert dequantize(other, torch.bfloat16).shape == other.shape == (2, 3, 135)


def test_no_tokens():
    assert dequantize(quantize(torch.empty(0, 136), torch.int8), torch.float32).shape == (0, 136)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    group=st.integers(1, 50),
    dtype=st.sampled_from(QUANTISED),
)
def test_quantising_again_changes_nothing(values, group, dtype):
    once = dequantize(quantize(torch.tensor(values), dtype, group), torch.float32)
    again = dequantize(quantize(once, dtype, group), torch.float32)
    assert torch.allclose(once, again, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (([1.0], torch.int8), TypeError, "x is a list"),
        ((torch.ones(3, dtype=torch.int32), torch.int8), TypeError, "x has dtype torch.int32"),
        ((torch.ones(()), torch.int8), ValueError, "x has no dimensions"),
        ((torch.ones(3), torch.uint8), TypeError, "dtype is torch.uint8"),
        ((torch.ones(3), torch.uint4), TypeError, "dtype is torch.uint4"),
        ((torch.ones(3), torch.int8, 0), ValueError, "group is 0"),
        ((torch.ones(3), torch.int8, 2.5), ValueError, "group is 2.5"),
        ((torch.ones(3), torch.int8, True), ValueError, "group is True"),
        ((torch.ones(3), [torch.int8]), TypeError, "dtype is [torch.int8]"),
    ],
)
def test_refused(args, error, message):
    assert_refuses(error, message, quantize, *args)


def test_an_empty_one_of_another_dtype_is_refused():
    assert_refuses(TypeError, "dtype is torch.float32", empty_quantized, (2, 3), torch.float32)
    assert_refuses(ValueError, "group is -1", empty_quantized, (2, 3), torch.int8, -1)
    for shape in ((), (-1, 4), "ab", (2.0, 3)):
        assert_refuses(ValueError, f"shape is {shape!r}", empty_quantized, shape, torch.int8)
    with pytest.raises(RuntimeError, match="nowhere"):  # no fault of the shape's
        empty_quantized((2, 8), torch.int8, device="nowhere")


def test_what_is_no_quantized_is_refused():
    x, scale = torch.ones(2, 8), torch.ones(2, 1)
    for data, error, message in (
        ("eight", TypeError, "data is a str"),
        (torch.zeros((), dtype=torch.int8), ValueError, "data has no dimensions"),
        (x, TypeError, "data's dtype is torch.float32"),
        (torch.zeros(2, 4, dtype=torch.uint8), TypeError, "scale has dtype torch.float32; torch.bfloat16"),
    ):
        assert_refuses(error, message, dequantize, Quantized(data, scale), torch.float32)
    four = quantize(x, torch.int4)
    odd = Quantized(four.data, four.scale, 32, channels=5)
    assert_refuses(ValueError, "data has shape (2, 4); (2, 3)", dequantize, odd, torch.float32)


@pytest.mark.parametrize("group", [137, 10**9, 10**12, 2**31, 2**63, 10**400])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_group_wider_than_the_channels_is_one_group(dtype, group):
    x = draws()(3, 136)
    wide, whole = quantize(x, dtype, group), quantize(x, dtype, 136)
    assert wide.group == group and wide.scale.shape == (3, 1) == empty_quantized((3, 136), dtype, group).scale.shape
    assert_same((wide.data, wide.scale), (whole.data, whole.scale))
    assert_same(dequantize(wide, torch.float32), dequantize(whole, torch.float32))
    (compiled, dequantized), _ = called_when_compiled(
        lambda t: ((q := quantize(t, dtype, group)), dequantize(q, torch.float32)), x
    )
    assert_same((compiled.data, dequantized), (whole.data, dequantize(whole, torch.float32)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ for a CPU")
@pytest.mark.parametrize(("channels", "dtype"), [(137, torch.int8), (264, torch.int8), (137, torch.int4)])
def test_inductor_gives_a_ragged_last_group_its_own_scale(channels, dtype):
    """Its vectorised loops read past the scales where these were all expanded and then sliced."""
    x = draws()(5, channels)
    q = quantize(x, dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        data, scale, values = torch.compile(_there_and_back, fullgraph=True)(x, q)
    assert_same((data, scale, values), (q.data, q.scale, dequantize(q, torch.float32)))


def _there_and_back(x, q):
    made = quantize(x, q.dtype)
    return made.data, made.scale, dequantize(q, torch.float32)


def test_no_channels_have_no_group():
    assert quantize(torch.empty(4, 0), torch.int8).scale.shape == (4, 0)
    assert dequantize(quantize(torch.empty(4, 0), torch.int8, 7), torch.float32).shape == (4, 0)


def test_it_is_compared_by_identity():
    q = quantize(torch.ones(2), torch.int8)
    assert q == q and q != Quantized(q.data, q.scale, q.group)
