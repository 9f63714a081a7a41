"""The Triton kernel of `attention` computes what the reference defines, from wherever its operands lie, and writes its
outputs only."""

from __future__ import annotations

import importlib

import pytest
import torch

from pab_kernels.ops import BackendError, QKNorm, Quantized, Rope, attention, quantize
from pab_kernels.ops.attention import Attention, reference
from pab_kernels.ops.attention.options import normalise, rotate
from pab_kernels.ops.backend import choose
from pab_kernels.ops.quantized import head_group
from tests.ops.tensors import (
    HALF,
    KERNEL_DEVICE,
    QUANTISED,
    Guarded,
    assert_accurate,
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
kernel = importlib.import_module("pab_kernels.ops.attention.triton")
prepare = importlib.import_module("pab_kernels.ops.attention.prepare").prepare

HEAD_DIMS = range(32, 129, 8)


def qkv(*batch, queries=7, keys=None, heads=2, dim=40, dtype=torch.bfloat16, seed=0):
    draw = draws(dtype, seed, KERNEL_DEVICE)
    return [draw(*batch, n, heads, dim) for n in (queries, keys or queries, keys or queries)]


def packed(order, *, b=1, t=3, s=2, h=2, d=40, dtype=torch.bfloat16):
    """q, k, v: views of a packed projection, which lies between NaN."""
    around = torch.full((b + 2, t, s, 3, h, d), torch.nan, dtype=dtype, device=KERNEL_DEVICE)
    around[1:-1] = draws(dtype, device=KERNEL_DEVICE)(b, t, s, 3, h, d)
    views = [around[1:-1].select(3, i) for i in range(3)]
    return views if order == "spatial" else [view.transpose(1, 2) for view in views]


def tables(positions, pairs, interleaved, seed=3):
    theta = draws(torch.float32, seed, KERNEL_DEVICE)(positions, pairs) * 3
    return Rope(theta.cos(), theta.sin(), interleaved)


def everything(queries, dim, dtype=torch.bfloat16):
    """Options of all kinds for 2 rows."""
    draw = draws(dtype, 1, KERNEL_DEVICE)
    return {
        "softmax_scale": 0.2,
        "key_lengths": torch.tensor([queries - 2, queries], device=KERNEL_DEVICE),
        "q_norm": QKNorm("rms", draw(dim), None, 1e-5),
        "k_norm": QKNorm("layer", draw(dim), draw(dim), 1e-5),
        "rope": tables(queries, dim // 2 - 4, interleaved=True),
    }


def double(value):
    """An argument in float64."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, QKNorm):
        return QKNorm(value.kind, double(value.weight), double(value.bias), value.eps, double(value.rstd))
    return Rope(value.cos.double(), value.sin.double(), value.interleaved) if isinstance(value, Rope) else value


def check(q, k, v, **options):
    """Error against float64 that of torch, and all but the last bit that of the reference that rounds in the same
    places."""
    given = Attention(q, k, v, **options)
    out, stored = attention(q, k, v, backend="triton", **options)
    exact = reference.compute(Attention(*map(double, given[:-1])))[0]
    assert_accurate(out, attention(q, k, v, **options)[0], exact)
    step = kernel.tiles(q.shape[-3], q.shape[-1], (9, 0)).keys
    same = reference.online_attention(given, step=step)[0]
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, same, rtol=2 * eps, atol=eps / 4 * same.abs().max().item())
    assert (out == same).float().mean() > 0.95 - 0.15 * ("k_norm" in options or "q_norm" in options)
    return out, stored


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_head_dimension(dim):
    check(*qkv(1, queries=9, keys=70, dim=dim, dtype=HALF[dim // 8 % 2]))


def test_a_head_is_not_padded_to_a_power_of_two():
    assert kernel.parts(72) == ((0, 64), (64, 16)) and kernel.parts(112) == ((0, 64), (64, 32), (96, 16))
    for dim in HEAD_DIMS:
        widths = [width for _, width in kernel.parts(dim)]
        assert dim <= sum(widths) < dim + 16 and all(width in (16, 32, 64, 128) for width in widths)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 127), (127, 1), (7, 64), (64, 65), (128, 128), (129, 63)])
def test_sequences_that_do_and_do_not_fill_their_tiles(queries, keys, dtype):
    check(*qkv(1, queries=queries, keys=keys, dim=72, heads=1, dtype=dtype))


def test_open_soras_1590_tokens():
    check(*qkv(1, queries=5, keys=1590, dim=72, heads=1))
    check(*qkv(1, queries=1590, keys=5, dim=72, heads=1))


@pytest.mark.parametrize("scale", [0.0, 0.3, 20.0])
def test_the_scale_of_the_softmax(scale):
    check(*qkv(1, queries=7, keys=70, dim=40), softmax_scale=scale)


def test_a_scale_of_0_weighs_the_keys_of_the_length_alike():
    q, k, v = qkv(1, queries=3, keys=5)
    out, _ = attention(
        q, k, v, softmax_scale=0.0, key_lengths=torch.tensor([4], device=KERNEL_DEVICE), backend="triton"
    )
    assert torch.allclose(out.float(), v[:, :4].float().mean(1, keepdim=True).expand_as(out), atol=1e-2)


def test_scores_that_would_overflow_without_their_maximum():
    q, k, v = qkv(1, queries=7, keys=130, dim=40)
    k[:, 100] *= 60  # the maximum changes late
    assert check(q * 40, k, v)[0].isfinite().all()


@pytest.mark.parametrize("order", ["spatial", "temporal"])
def test_packed_projections_are_read_where_they_lie(order, monkeypatch):
    q, k, v = packed(order, d=72)
    monkeypatch.setattr(kernel, "prepare", None)  # nothing is copied
    out, _ = check(q, k, v)
    natural = out if order == "spatial" else out.transpose(1, 2)
    assert natural.is_contiguous()


def test_strides_and_places_that_16_bytes_cannot_be_read_from():
    draw = draws(torch.bfloat16, device=KERNEL_DEVICE)
    odd, moved, rows = draw(2, 7, 2, 43)[..., :40], draw(2, 7, 2, 48)[..., 3:43], draw(2, 9, 2, 40)[:, 1:-1]
    check(odd, moved, rows)
    check(moved, rows, odd)


def test_operands_that_are_expanded_and_dimensions_in_any_order():
    q, k, v = qkv(2, 2, queries=3)
    one = [t[:1, :, :, :1].expand(2, 2, 3, 2, 40) for t in (k, v)]
    check(q, *one)
    for dims in [(2, 0, 1, 3), (3, 1, 0, 2)]:
        apart = [t.permute(*dims, 4).contiguous().permute(*(dims.index(i) for i in range(4)), 4) for t in (q, k, v)]
        check(*apart)


def test_the_kernel_writes_to_memory_as_the_fake_says():
    for given in (
        packed("temporal"),
        packed("spatial"),
        [t.permute(2, 0, 1, 3, 4) for t in qkv(2, 1, queries=3, heads=1)],
    ):
        for store_dtype in (None, torch.bfloat16, torch.int8):
            here = parts(attention(*given, store_dtype=store_dtype, backend="triton"))
            meta = parts(attention(*(t.to("meta") for t in given), store_dtype=store_dtype))
            assert [(t.shape, t.dtype, t.stride()) for t in here] == [(t.shape, t.dtype, t.stride()) for t in meta]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize(
    "shut", [slice(0, 64), slice(0, 66), slice(64, 128), slice(3, 130), slice(0, 129), slice(0, 130)]
)
def test_keys_with_scores_of_minus_infinity_weigh_nothing(shut):
    """A whole step of the loop of them, too; where there are no others the output is 0."""
    q, k, v = qkv(1, queries=3, keys=130)
    q[..., 0], k[:, shut, 0, 0] = 1, -torch.inf
    out, left = attention(q, k, v, backend="triton")[0], [i for i in range(130) if i not in range(130)[shut]]
    expected = attention(q[:, :, :1], k[:, left, :1], v[:, left, :1])[0] if left else torch.zeros_like(q[:, :, :1])
    torch.testing.assert_close(out[:, :, :1], expected, rtol=2e-2, atol=1e-2)
    same = reference.online_attention(Attention(q, k, v), step=64)[0]
    torch.testing.assert_close(out, same, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_keys_beyond_the_length_are_not_read(index):
    q, k, v = qkv(7, queries=3, keys=130, heads=1)
    lengths = [130, 1, 0, 64, 65, 999, -1]
    for row, length in enumerate(lengths):
        k[row, max(length, 0) :] = torch.nan
        v[row, max(length, 0) :] = torch.inf
    out, _ = check(q, k, v, key_lengths=torch.tensor(lengths, dtype=index, device=KERNEL_DEVICE))
    assert (out[2] == 0).all() and (out[6] == 0).all() and out.isfinite().all()


def test_lengths_of_one_and_of_both_batch_dimensions_of_any_strides():
    q, k, v = qkv(2, 3, queries=5, heads=1)
    lengths = torch.tensor([[5, 0], [1, 2], [3, 4]], device=KERNEL_DEVICE).T
    check(q, k, v, key_lengths=lengths)
    check(q, k, v, key_lengths=lengths[:, 1])
    check(*(t[:, 0] for t in (q, k, v)), key_lengths=lengths[:, 2])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_of_q_and_k(kind, affine, dtype):
    draw = draws(dtype, 5, KERNEL_DEVICE)
    weight, bias = (draw(72) if affine else None), (draw(72) if affine and kind == "layer" else None)
    q, k, v = qkv(1, queries=5, keys=9, dim=72, heads=2, dtype=dtype)
    norm = QKNorm(kind, weight, bias, 1e-3)
    check(q, k, v, q_norm=norm)
    check(q + 3, k, v, k_norm=norm)
    check(q, k, v, q_norm=norm, k_norm=norm)


def test_a_norm_across_heads_takes_its_reciprocal_root():
    q, k, v = packed("temporal", s=1, h=5)
    rstd = (q.float().flatten(-2).square().mean(-1) + 1e-6).rsqrt()
    rstd = rstd.transpose(1, 2).contiguous().transpose(1, 2)
    weight = draws(torch.bfloat16, 5, KERNEL_DEVICE)(5, 48)[:, :40]
    check(q, k, v, q_norm=QKNorm(weight=weight, rstd=rstd))
    check(q, k, v, q_norm=QKNorm(rstd=rstd), k_norm=QKNorm(weight=weight, rstd=rstd[..., :1].expand_as(rstd)))


@pytest.mark.parametrize("pairs", [0, 1, 9, 20, 36])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding(interleaved, pairs):
    rope = tables(17, pairs, interleaved)
    q, k, v = qkv(1, queries=17, dim=72)
    check(q, k, v, rope=rope)
    check(q, k[:, 1:], v[:, 1:], rope=rope)  # keys of another number are not rotated


def test_tables_of_any_row_stride():
    wide = tables(7, 16, True)
    q, k, v = qkv(1)
    check(q, k, v, rope=Rope(wide.cos[:, 3:11], wide.sin[:, 3:11], True))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_norm_rounds_then_the_rotation_rounds(kind, interleaved, dtype):
    draw, rope = draws(dtype, 5, KERNEL_DEVICE), tables(17, 16, interleaved)
    x = packed("temporal", t=17, s=1, h=5, dtype=dtype)[0]
    norm = QKNorm(kind, draw(40), draw(40) if kind == "layer" else None)
    for n, r in ((norm, None), (None, rope), (norm, rope)):
        expected = x if n is None else normalise(x, n)
        expected = expected if r is None else rotate(expected, r)
        y = prepare(x, n, r)
        assert (y == expected).float().mean() > 0.99  # float32 sums in another order may round otherwise
        torch.testing.assert_close(y, expected, rtol=torch.finfo(dtype).eps * 2, atol=torch.finfo(dtype).eps * 4)
    assert_same(prepare(x, None, None), x, strides=False)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
def test_channels_that_do_not_rotate_keep_even_what_is_not_finite():
    x = qkv(1)[0]
    x[..., 16], x[..., 39] = torch.inf, torch.nan
    for interleaved in (True, False):
        y = prepare(x, None, tables(7, 8, interleaved))
        assert (y[..., 16] == torch.inf).all() and y[..., 39].isnan().all() and y[..., :16].isfinite().all()


@pytest.mark.parametrize("store_dtype", [torch.bfloat16, *QUANTISED])
@pytest.mark.parametrize("dim", [40, 64, 72, 112])
def test_the_stored_copy_is_quantised_from_the_rounded_output(dim, store_dtype):
    out, stored = check(*qkv(2, queries=5, dim=dim), store_dtype=store_dtype)
    assert_same(
        stored, out if store_dtype == torch.bfloat16 else quantize(out, store_dtype, head_group(store_dtype, dim))
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("store_dtype", QUANTISED)
def test_a_nan_in_the_values_reaches_what_is_stored(store_dtype):
    q, k, v = qkv(1, queries=3, dim=72)
    v[0, 1, 0, 70] = torch.nan
    out, stored = attention(q, k, v, store_dtype=store_dtype, backend="triton")
    assert (
        stored.scale[:, :, 0, -1].isnan().all()
        and stored.scale[:, :, 1].isfinite().all()
        and out[:, :, 0, 70].isnan().all()
    )


@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16, *QUANTISED])
def test_it_writes_its_outputs_and_nothing_else(store_dtype):
    inputs, options = qkv(2, queries=5, dim=72), everything(5, 72)
    expected = attention(*inputs, store_dtype=store_dtype, backend="triton", **options)
    given = [t.clone() for t in inputs]
    sizes = (2, 5, 2, 72)
    stored_out, guards = None, [Guarded(*sizes, dtype=torch.bfloat16, device=KERNEL_DEVICE)]
    if store_dtype == torch.bfloat16:
        guards.append(Guarded(*sizes, dtype=store_dtype, device=KERNEL_DEVICE))
        stored_out = guards[1].tensor
    elif store_dtype is not None:
        stored_out, more = guarded_quantized(
            *sizes, dtype=store_dtype, group=head_group(store_dtype, 72), device=KERNEL_DEVICE
        )
        guards += more
    call = Attention(*inputs, **options, store_dtype=store_dtype)
    launch("attention", "triton", call, guards[0].tensor, stored_out)
    for guard in guards:
        guard.assert_written()
    assert_same((guards[0].tensor, stored_out), expected, strides=False)
    assert_same(inputs, given)


def test_outputs_in_an_order_of_their_own():
    q, k, v = packed("temporal")
    expected = attention(q, k, v, backend="triton")[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    launch("attention", "triton", Attention(q, k, v), out, None)
    assert_same(out, expected, strides=False)


@pytest.mark.parametrize("sizes", [(0, 3, 7, 2, 40), (2, 0, 7, 2, 40), (2, 3, 7, 0, 40), (0, 7, 2, 40), (2, 0, 2, 40)])
def test_nothing_is_launched_for_nothing(sizes):
    q = torch.zeros(sizes, dtype=torch.bfloat16, device=KERNEL_DEVICE)
    k = torch.zeros((*sizes[:-3], 3, *sizes[-2:]), dtype=torch.bfloat16, device=KERNEL_DEVICE)
    out, stored = attention(q, k, k, q_norm=QKNorm(), k_norm=QKNorm(), store_dtype=torch.int8, backend="triton")
    assert out.shape == q.shape and stored.scale.shape == (*sizes[:-1], 1)


def test_it_gives_the_same_twice():
    inputs, options = qkv(2, queries=9), everything(9, 40)
    assert_same(*(attention(*inputs, store_dtype=torch.int8, backend="triton", **options) for _ in range(2)))


def test_all_options_together():
    check(*qkv(2, queries=67, dim=72), store_dtype=torch.int8, **everything(67, 72))


def flat(q, k, v, store_dtype, options):
    """Arguments of the registered operation."""
    q_norm, k_norm, rope = options["q_norm"], options["k_norm"], options["rope"]
    norms = [x for n in (q_norm, k_norm) for x in (n.kind, n.weight, n.bias, n.eps, n.rstd)]
    return (
        q,
        k,
        v,
        options["key_lengths"],
        options["softmax_scale"],
        *norms,
        rope.cos,
        rope.sin,
        rope.interleaved,
        store_dtype,
        "triton",
    )


def test_the_registered_operation_passes_opcheck():
    """What is stored in another dtype is checked with the reference, and its layout by the test of the fake."""
    args = flat(*qkv(2, queries=5), torch.int8, everything(5, 40))
    opcheck(torch.ops.pab_kernels.attention.default, args)


def test_compiled_it_is_one_operation_with_the_same_result():
    inputs, options = qkv(2, queries=5), everything(5, 40) | {"store_dtype": torch.int8, "backend": "triton"}
    result, called = called_when_compiled(attention, *inputs, **options)
    assert called == ["pab_kernels.attention"]
    assert_same(result, attention(*inputs, **options))


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (qkv(1, dtype=torch.float32), {}, "q is torch.float32; float16 and bfloat16"),
        (qkv(1, dtype=torch.float64), {}, "q is torch.float64"),
        (qkv(1, dim=36), {}, "the head dimension is 36; multiples of 8"),
        (qkv(1), {"softmax_scale": -0.1}, "softmax_scale is -0.1; 0 or more is supported"),
        ([t.to("meta") for t in qkv(1)], {}, "the tensors are on meta"),
    ],
)
def test_what_it_cannot_serve_it_refuses(given, options, message):
    assert_refuses(BackendError, message, attention, *given, backend="triton", **options)


def test_too_many_programs_are_refused():
    q = torch.empty(1, dtype=torch.bfloat16, device=KERNEL_DEVICE).expand(2**16, 2**14, 2, 40)
    rows = q[:1, :1, :1].expand(1, 2**31 - 1023, 1, 40)
    assert "at most 2147482624 are supported" in kernel.refusal(Attention(rows, rows[:, 1:], rows[:, 1:]))
    assert kernel.refusal(Attention(*(rows[:, 1:],) * 3)) is None
    assert "at most 2147482624 are supported" in kernel.refusal(Attention(q, q, q))
    assert kernel.refusal(Attention(q[:-1], q[:-1], q[:-1])) is None


@pytest.mark.skipif(KERNEL_DEVICE != "cpu", reason="on a CUDA device auto takes the kernel")
def test_auto_on_a_cpu_stays_the_reference():
    assert choose("attention", "auto", Attention(*qkv(1))) == "reference"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
def test_tiles_are_powers_of_two(head_dim, capability):
    for queries in (1, 64, 65, 17776):
        chosen = kernel.tiles(queries, head_dim, capability)
        assert all(n & (n - 1) == 0 and n >= 16 for n in (chosen.queries, chosen.keys))


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (12, 0), (12, 1)])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_tiles_fit_the_99_kilobytes_that_some_devices_have(head_dim, capability):
    """Where q stays in registers shared memory holds the keys and values whose loads are under way."""
    for queries in (1, 64, 65, 17776):
        chosen = kernel.tiles(queries, head_dim, capability)
        channels = sum(width for _, width in kernel.parts(head_dim))
        assert chosen.stages * 2 * chosen.keys * channels * 2 <= 101376 - 2**14
        assert chosen == kernel.tiles(queries, head_dim, (8, 0))


def test_the_reference_that_rounds_as_the_kernel_is_close_to_the_one_that_defines():
    given = Attention(*qkv(2, queries=70, dim=72), **everything(70, 72), store_dtype=torch.int8)
    out, stored = reference.online_attention(given, step=32)
    expected, _ = reference.compute(given)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    assert isinstance(stored, Quantized)
    assert_same(stored, quantize(out, torch.int8, group=72))
