"""`short_attention` in CUDA, on a device: the reference's results, whatever the strides, the stream and the graph."""

from __future__ import annotations

import os
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pab_kernels.ops import QKNorm, Quantized, Rope, cuda_library, quantize, short_attention
from pab_kernels.ops.short_attention import ShortAttention
from tests.ops.short_attention_cases import across, affine, everything, plain, tables, temporal
from tests.ops.short_attention_cases import check as checked
from tests.ops.tensors import (
    EIGHT_BITS,
    HALF,
    Guarded,
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
HEAD_DIMS = (64, 72, 96, 128)

attend = partial(short_attention, backend="cuda")
check = partial(checked, attend)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("frames", [1, 7, 15, 16, 17, 30, 32, 33, 48, 64])
def test_lengths(frames, dim, dtype):
    inputs = temporal(frames, heads=3, places=5, dim=dim, dtype=dtype)
    check(inputs)
    check(inputs, **everything(frames, dim, dtype, interleaved=True))
    check(inputs, **everything(frames, dim, dtype, interleaved=False))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("norm", [plain, affine])
def test_norms(norm, kind):
    q, k, v = temporal(9, dim=72)
    q += 3  # a mean to be taken off
    check([q, k, v], q_norm=norm(kind, 72), k_norm=across(k))
    check([q, k, v], q_norm=across(q, False), k_norm=norm(kind, 72), rope=tables(9, 36, False))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 4, 18, 35])
def test_partial_rotary_embeddings(pairs, interleaved):
    for frames in (6, 20, 50):
        check(temporal(frames, dim=72), q_norm=affine("layer", 72), rope=tables(frames, pairs, interleaved))


def test_operands_lie_anywhere():
    draw = draws(torch.bfloat16, device="cuda")
    k, v = draw(1, 3, 1, 2, 72).expand(2, 3, 7, 2, 72), draw(2, 1, 7, 1, 72).expand(2, 3, 7, 2, 72)
    check([draw(2, 3, 8, 3, 80)[:, :, 1:, 1:, 8:], k, v])
    check([draw(5, 7, 3, 2, 72).select(2, i) for i in range(3)])
    check([draw(2, 3, 7, 3, 2, 72).select(3, i) for i in range(3)])
    weight, strided = draw(73)[1:], [t.repeat(1, 2)[:, :36] for t in (tables(7, 36, True).cos, tables(7, 36, True).sin)]
    check(temporal(7, dim=72), q_norm=QKNorm("rms", weight), rope=Rope(*strided, interleaved=True))


def test_many_places():
    check(temporal(16, places=4001, heads=3, dim=72), **everything(16, 72))
    check(temporal(1, places=70001, heads=1, dim=64, b=1))


def test_addresses_beyond_32_bits():
    """Three rows 2 ** 31 + 8 elements apart."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("there is less than 20 GiB of free memory on the device")
    apart, row = 2**31 + 8, 5 * 2 * 64
    source, out = (
        torch.zeros(2 * apart + row, dtype=torch.bfloat16, device="cuda").as_strided((3, 5, 2, 64), (apart, 128, 64, 1))
        for _ in "ab"
    )
    near = temporal(5, places=3, b=1, dim=64)[0][0]
    source.copy_(near)
    launch("short_attention", "cuda", ShortAttention(source, source, source), out, None)
    assert torch.equal(out, attend(near, near, near)[0])


@pytest.mark.parametrize("store_dtype", [torch.bfloat16, *EIGHT_BITS])
@pytest.mark.parametrize(("frames", "dim"), [(9, 72), (30, 128), (45, 72)])
def test_nothing_but_the_outputs_is_written(frames, dim, store_dtype):
    inputs, options = temporal(frames, dim=dim, heads=3), everything(frames, dim)
    expected, _ = attend(*inputs, **options)
    sizes = inputs[0].shape
    out = Guarded(*sizes, dtype=torch.bfloat16, device="cuda")
    if store_dtype in EIGHT_BITS:
        stored, guards = guarded_quantized(*sizes, dtype=store_dtype, group=dim, device="cuda")
    else:
        guards = [Guarded(*sizes, dtype=store_dtype, device="cuda")]
        stored = guards[0].tensor
    launch("short_attention", "cuda", ShortAttention(*inputs, **options, store_dtype=store_dtype), out.tensor, stored)
    for guard in (out, *guards):
        guard.assert_written()
    assert_same(out.tensor, expected, strides=False)
    kept = quantize(expected, store_dtype, dim, backend="reference") if isinstance(stored, Quantized) else expected
    assert_same(stored, kept, strides=False)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("frames", [6, 25, 40])
def test_what_is_not_finite_stays_in_its_channel_of_its_head(frames, bad):
    q, k, v = temporal(frames, dim=72)
    clean, _ = attend(q, k, v)
    v[1, 1, frames // 2, 1, 70] = bad
    out, stored = attend(q, k, v, store_dtype=torch.int8)
    assert not out[1, 1, :, 1, 70].isfinite().any() and not stored.scale[1, 1, :, 1].isfinite().any()
    out[1, 1, :, 1, 70] = clean[1, 1, :, 1, 70]
    assert_same(out, clean)


def test_it_runs_on_the_current_stream_and_in_graphs():
    inputs, options = temporal(15, places=64, dim=72), everything(15, 72)
    expected, out = attend(*(2 * t for t in inputs), **options)[0], torch.zeros_like(inputs[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        launch("short_attention", "cuda", ShortAttention(*(2 * t for t in inputs), **options), out, None)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch("short_attention", "cuda", ShortAttention(*inputs, **options), out, None)
    for t in inputs:
        t.mul_(2)
    graph.replay()
    assert torch.equal(out, expected)


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    inputs = temporal(15, dim=72)
    there = attend(*(t.to("cuda:1") for t in inputs))[0]
    assert there.device.index == 1 and torch.equal(there.to("cuda:0"), attend(*inputs)[0])


@pytest.mark.parametrize("frames", [15, 31, 64])
def test_again_and_again_gives_the_same_bits(frames):
    inputs, options = (
        temporal(frames, places=100, dim=72),
        {**everything(frames, 72, interleaved=False), "store_dtype": torch.int8},
    )
    first = attend(*inputs, **options)
    for _ in range(20):
        assert_same(attend(*inputs, **options), first)


def test_compiled_it_is_one_operation_that_torch_knows():
    inputs, options = temporal(5, dim=64), {"store_dtype": torch.int8, **everything(5, 64), "backend": "cuda"}
    result, called = called_when_compiled(short_attention, *inputs, **options)
    assert called == ["pab_kernels.short_attention"]
    assert_same(result, short_attention(*inputs, **options))
    none = (None, None, None, 0.0, None)
    opcheck(
        torch.ops.pab_kernels.short_attention.default,
        (*inputs, None, *none, *none, None, None, False, torch.int8, "cuda"),
    )


@st.composite
def calls(draw):
    """Any length, heads, options and place of q, k and v within their projection."""
    frames, dim, dtype = draw(st.integers(1, 64)), draw(st.sampled_from(HEAD_DIMS)), draw(st.sampled_from(HALF))
    sizes = {name: draw(st.integers(1, most)) for name, most in (("b", 3), ("places", 5), ("heads", 6))}
    inputs = temporal(frames, dim=dim, dtype=dtype, seed=draw(st.integers(0, 1000)), **sizes)
    if draw(st.booleans()):
        inputs = [inputs[i] for i in draw(st.permutations(range(3)))]
    values = draws(dtype, 7, "cuda")

    def norm(x):
        kind = draw(st.sampled_from([None, "rms", "layer", "across"]))
        if kind in (None, "across"):
            return kind and across(x, draw(st.booleans()))
        weight, bias = (values(dim) if draw(st.booleans()) else None for _ in range(2))
        return QKNorm(kind, weight, bias if kind == "layer" else None, 1e-5)

    pairs = draw(st.one_of(st.none(), st.just(dim // 2), st.integers(1, dim // 2)))
    rope = None if pairs is None else tables(frames, pairs, draw(st.booleans()))
    scale = draw(st.sampled_from([None, 0.1, -0.2]))
    return inputs, {"softmax_scale": scale, "q_norm": norm(inputs[0]), "k_norm": norm(inputs[1]), "rope": rope}


@given(calls(), st.sampled_from([None, *EIGHT_BITS]))
@settings(max_examples=CALLS)
def test_fuzz(call, store_dtype):
    inputs, options = call
    out = check(inputs, **options)
    again, stored = attend(*inputs, **options, store_dtype=store_dtype)
    assert torch.equal(again, out)
    if store_dtype is not None:
        assert_same(stored, quantize(out, store_dtype, out.shape[-1], backend="reference"), strides=False)
