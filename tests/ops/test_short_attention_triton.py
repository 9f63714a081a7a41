"""The Triton kernel of `short_attention` computes what the reference defines, wherever its operands lie, and writes its
outputs only."""

from __future__ import annotations

import importlib
from functools import partial

import numpy as np
import pytest
import torch

from pab_kernels.ops import BackendError, QKNorm, Quantized, Rope, quantize, short_attention
from pab_kernels.ops.backend import choose
from pab_kernels.ops.quantized import head_group
from pab_kernels.ops.short_attention import ShortAttention
from tests.ops.short_attention_cases import across, affine, everything, plain, tables, temporal
from tests.ops.short_attention_cases import check as checked
from tests.ops.tensors import (
    HALF,
    KERNEL_DEVICE,
    QUANTISED,
    Guarded,
    assert_refuses,
    assert_same,
    called_when_compiled,
    draws,
    guarded_quantized,
    launch,
    opcheck,
    parts,
)

pytest.importorskip("triton")
kernel = importlib.import_module("pab_kernels.ops.short_attention.triton")

OP = torch.ops.pab_kernels.short_attention.default


check = partial(checked, partial(short_attention, backend="triton"))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("frames", [1, 15, 16, 17, 30, 64])
def test_lengths(frames, dtype):
    heads = 3 if frames <= 32 else 1
    check(temporal(frames, heads=heads, dim=72, dtype=dtype))
    check(temporal(frames, heads=heads, dim=72, dtype=dtype), **everything(frames, 72, dtype))


@pytest.mark.parametrize(
    ("frames", "heads", "places"), [(1, 5, 13), (2, 1, 33), (7, 3, 5), (21, 4, 1), (32, 3, 3), (33, 3, 1), (12, 16, 2)]
)
def test_tiles_may_end_anywhere_among_the_heads_and_sequences(frames, heads, places):
    inputs = temporal(frames, heads=heads, places=places, dim=32)
    check(inputs, q_norm=across(inputs[0]))


@pytest.mark.parametrize("dim", range(32, 129, 8))
def test_head_dimensions(dim):
    check(temporal(5, dim=dim), **everything(5, dim, interleaved=True))
    check(temporal(5, dim=dim), **everything(5, dim, interleaved=False))


@pytest.mark.parametrize("norm", [plain, affine])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind, norm):
    q, k, v = temporal(9)
    q += 3  # a mean to be taken off
    check([q, k, v], q_norm=norm(kind))
    check([q, k, v], k_norm=norm(kind))
    check([q, k, v], q_norm=norm(kind), k_norm=norm("layer"), rope=tables(9, 20, False))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_norms_across_heads(interleaved, weighted):
    q, k, v = temporal(9, heads=3, dim=72)
    check([q, k, v], q_norm=across(q, weighted), k_norm=across(k, weighted, seed=6), rope=tables(9, 36, interleaved))
    rows = [t.flatten(0, 1) for t in (q, k, v)]
    check(rows, q_norm=across(rows[0], weighted), k_norm=across(rows[1], weighted, seed=6))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 6, 16, 18, 35])
def test_partial_rotary_embeddings(pairs, interleaved):
    check(temporal(6, dim=72), q_norm=affine("layer", 72), rope=tables(6, pairs, interleaved))


def test_a_rotary_embedding_of_no_channels_is_none():
    inputs = temporal(6)
    assert_same(check(inputs, rope=tables(6, 0, True)), check(inputs))


def test_tables_and_weights_of_any_strides():
    inputs, options = temporal(6), everything(6)
    rope = options["rope"]
    strided = [torch.stack([t, torch.full_like(t, torch.nan)], 1).flatten(1)[:, :20] for t in (rope.cos, rope.sin)]
    check(inputs, rope=Rope(*strided, interleaved=True))
    check(inputs, rope=Rope(rope.cos[:1].expand(6, 20), rope.sin[:1].expand(6, 20), interleaved=False))
    norm = across(inputs[0])
    weight = torch.cat([norm.weight, torch.full_like(norm.weight, torch.nan)], 1)[:, :40]
    check(inputs, q_norm=QKNorm("rms", weight, rstd=norm.rstd))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2])
def test_softmax_scales(scale):
    check(temporal(17), softmax_scale=scale)


def test_large_scores_do_not_overflow():
    q, k, v = temporal(15)
    check([q * 30, k * 30, v])


def test_many_places():
    check(temporal(16, places=127, heads=1, dim=32), q_norm=plain("rms"))


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_do(sizes):
    b, places, frames = sizes
    empty = torch.empty(b, places, frames, 2, 40, dtype=torch.bfloat16, device=KERNEL_DEVICE)
    if frames == 0:  # refused above the kernel: there are no keys
        kernel.launch(ShortAttention(empty, empty, empty), (empty, None))
        return
    out, stored = short_attention(empty, empty, empty, store_dtype=torch.int8, backend="triton")
    assert out.shape == stored.data.shape == empty.shape


@pytest.mark.parametrize(
    "layout", ["spatial", "contiguous", "odd strides", "expanded", "one batch dimension", "no heads apart"]
)
def test_operands_lie_anywhere(layout):
    draw = draws(torch.bfloat16, device=KERNEL_DEVICE)
    if layout == "spatial":
        inputs = [draw(2, 3, 7, 3, 2, 40).select(3, i) for i in range(3)]
    elif layout == "contiguous":
        inputs = [draw(2, 3, 7, 2, 40) for _ in range(3)]
    elif layout == "odd strides":
        inputs = [
            torch.full((3, 9, 8, 3, 47), torch.nan).to(draw(1))[1:, 3 * i : 3 * i + 3, :7, 1:, 3:43] for i in range(3)
        ]
        for t in inputs:
            t.copy_(draw(2, 3, 7, 2, 40))
    elif layout == "expanded":
        inputs = [
            draw(2, 3, 7, 2, 40),
            draw(1, 3, 1, 2, 40).expand(2, 3, 7, 2, 40),
            draw(2, 1, 7, 1, 40).expand(2, 3, 7, 2, 40),
        ]
    elif layout == "one batch dimension":
        inputs = [draw(5, 7, 3, 2, 40).select(2, i) for i in range(3)]
    else:
        inputs = [draw(2, 3, 7, 40, 2).mT.contiguous()[..., :1, :] for _ in range(3)]
    check(inputs)


@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16, *QUANTISED])
@pytest.mark.parametrize(("frames", "dim"), [(1, 72), (17, 40)])
def test_it_writes_its_outputs_and_nothing_else(frames, dim, store_dtype):
    inputs, options = temporal(frames, dim=dim), everything(frames, dim)
    expected = short_attention(*inputs, store_dtype=store_dtype, **options, backend="triton")
    shape = (2, 2, frames, 2, dim)
    out, stored_out, guards = Guarded(*shape, dtype=torch.bfloat16, device=KERNEL_DEVICE), None, []
    if store_dtype == torch.bfloat16:
        guards = [Guarded(*shape, dtype=torch.bfloat16, device=KERNEL_DEVICE)]
        stored_out = guards[0].tensor
    elif store_dtype is not None:
        stored_out, guards = guarded_quantized(
            *shape, dtype=store_dtype, group=head_group(store_dtype, dim), device=KERNEL_DEVICE
        )
    given = ShortAttention(*inputs, **options, store_dtype=store_dtype)
    launch("short_attention", "triton", given, out.tensor, stored_out)
    for guard in (out, *guards):
        guard.assert_written()
    assert_same((out.tensor, stored_out), expected, strides=False)


def test_outputs_in_any_order_of_dimensions():
    inputs = temporal(7, places=3)
    expected = short_attention(*inputs, store_dtype=torch.int8, backend="triton")
    out = torch.empty(7, 3, 2, 2, 48, dtype=torch.bfloat16, device=KERNEL_DEVICE)[..., 3:43].permute(2, 1, 0, 3, 4)
    data = torch.empty(3, 2, 7, 2, 48, dtype=torch.int8, device=KERNEL_DEVICE)[..., 1:41].transpose(0, 1)
    scale = torch.empty(2, 2, 7, 3, 2, device=KERNEL_DEVICE).permute(0, 3, 2, 1, 4)[..., :1]
    given = ShortAttention(*inputs, store_dtype=torch.int8)
    launch("short_attention", "triton", given, out, Quantized(data, scale, 40))
    assert_same((out, data, scale), (expected[0], expected[1].data, expected[1].scale), strides=False)


@pytest.mark.parametrize("store_dtype", [torch.float16, *QUANTISED])
@pytest.mark.parametrize("dim", [40, 72, 128])
def test_what_is_stored_is_the_rounded_output_quantised(dim, store_dtype):
    inputs = temporal(17, dim=dim, dtype=torch.float16)
    inputs[2][0, 0] = 0  # scales of 0
    out, stored = short_attention(*inputs, store_dtype=store_dtype, backend="triton")
    expected = out if store_dtype == torch.float16 else quantize(out, store_dtype, head_group(store_dtype, dim))
    assert_same(stored, expected, strides=False)
    kept = parts(stored)[0]
    in_one = dim // kept.shape[-1]  # channels in an element
    assert [n * in_one for n in kept.stride()[:-1]] == list(out.stride()[:-1]) and kept.data_ptr() != out.data_ptr()


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("frames", [1, 6, 40])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite_stays_in_its_head_of_its_sequence(frames, which, bad):
    inputs = temporal(frames, dim=72)
    clean, _ = short_attention(*inputs, backend="triton")
    inputs[which][1, 1, frames // 2, 1, 70] = bad
    out, stored = short_attention(*inputs, store_dtype=torch.float8_e4m3fn, backend="triton")
    scale = stored.scale[1, 1, :, 1]
    if which == 2:
        assert not out[1, 1, :, 1, 70].isfinite().any() and not scale.isfinite().any()
        assert frames == 40 or out[1, 1, :, 1].isnan().all()
        assert frames != 40 or torch.equal(out[1, 1, :, 1, :70], clean[1, 1, :, 1, :70])
    elif torch.isnan(torch.tensor(bad)):
        assert out[1, 1, frames // 2 if which == 0 else slice(None), 1].isnan().all()
    out[1, 1, :, 1] = clean[1, 1, :, 1]
    assert_same(out, clean)


def test_addresses_beyond_32_bits():
    """Three rows 2 ** 31 + 8 elements apart, in memory of which nothing else is touched."""
    apart, row = 2**31 + 8, 5 * 2 * 40
    if KERNEL_DEVICE == "cuda":
        far = [torch.zeros(2 * apart + row, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    else:  # zeros that numpy takes from the system are not there until they are written
        far = [torch.from_numpy(np.zeros(2 * apart + row, dtype=np.int16)).view(torch.bfloat16) for _ in range(2)]
    source, out = (t.as_strided((3, 5, 2, 40), (apart, 80, 40, 1)) for t in far)
    near = temporal(5, places=3, b=1)[0][0]
    source.copy_(near)
    expected, _ = short_attention(near, near, near, backend="triton")
    launch("short_attention", "triton", ShortAttention(source, source, source), out, None)
    assert torch.equal(out, expected)


def test_it_gives_the_same_twice():
    inputs, options = temporal(15, dim=72), everything(15, 72)
    assert_same(*(short_attention(*inputs, store_dtype=torch.int8, **options, backend="triton") for _ in range(2)))


@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16, torch.int8])
def test_fakes_are_laid_out_like_the_results(store_dtype):
    inputs, options = temporal(5), everything(5)
    results = parts(short_attention(*inputs, store_dtype=store_dtype, **options, backend="triton"))
    args = sample(store_dtype)
    fakes = OP(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in args[:-1]), "auto")
    assert [(t.shape, t.dtype, t.stride()) for t in fakes] == [(t.shape, t.dtype, t.stride()) for t in results]


def sample(store_dtype):
    """Arguments of the registered operation."""
    inputs, options = temporal(5), everything(5)
    norms = [x for n in (options["q_norm"], options["k_norm"]) for x in (n.kind, n.weight, n.bias, n.eps, n.rstd)]
    rope = options["rope"]
    return (
        *inputs,
        None,
        options["softmax_scale"],
        *norms,
        rope.cos,
        rope.sin,
        rope.interleaved,
        store_dtype,
        "triton",
    )


@pytest.mark.parametrize("store_dtype", [None, torch.int8])
def test_the_registered_operation_passes_opcheck(store_dtype):
    opcheck(OP, sample(store_dtype))


def test_compiled_it_is_one_operation_with_the_same_result():
    inputs, options = temporal(5), {"store_dtype": torch.int8, **everything(5), "backend": "triton"}
    result, called = called_when_compiled(short_attention, *inputs, **options)
    assert called == ["pab_kernels.short_attention"]
    assert_same(result, short_attention(*inputs, **options))


def test_refused():
    def refuses(reason, *inputs):
        message = f"backend 'triton' cannot serve this call; {reason}"
        assert_refuses(BackendError, message, short_attention, *inputs, backend="triton")

    refuses("Triton kernels run on CUDA devices", *(t.to("meta") for t in temporal(5)))
    for dtype in (torch.float32, torch.float64):
        refuses(f"q is {dtype}; float16 and bfloat16 are supported", *temporal(5, dtype=dtype))
    refuses("the head dimension is 36; multiples of 8 are supported", *temporal(5, dim=36))
    many = torch.zeros(32, dtype=torch.bfloat16, device=KERNEL_DEVICE).expand(2**30, 1, 2, 32)
    refuses(f"there are {2**31} heads of sequences; at most {2**31 - 64}", many, many, many)


def test_auto_takes_it_on_a_gpu_only():
    assert choose("short_attention", "auto", ShortAttention(*temporal(5))) == (
        "triton" if KERNEL_DEVICE == "cuda" else "reference"
    )
