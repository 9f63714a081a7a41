"""`attention` computes what a diffusers processor does, from wherever q, k and v lie, and refuses what it cannot
serve."""

from __future__ import annotations

import importlib

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from pab_kernels.ops import QKNorm, Quantized, Rope, attention, dequantize, quantize
from tests.ops.attention_cases import (
    HEAD_DIMS,
    LENGTHS,
    OPTIONS_REFUSED,
    QKV_REFUSED,
    Q,
    refused,
    softmax_attention,
)
from tests.ops.tensors import (
    DTYPES,
    assert_accurate,
    assert_refuses,
    assert_same,
    called_when_compiled,
    draws,
    opcheck,
    parts,
)

OP = torch.ops.pab_kernels.attention.default


def qkv(*batch, queries=7, keys=None, heads=2, dim=40, dtype=torch.float32, seed=0):
    draw = draws(dtype, seed)
    return [draw(*batch, n, heads, dim) for n in (queries, keys or queries, keys or queries)]


def packed(order, dtype=torch.float32, b=2, t=5, s=3, h=2, d=40):
    """q, k, v: views of a packed projection."""
    whole = draws(dtype)(b, t, s, 3, h, d)
    return [whole.select(3, i) if order == "spatial" else whole.select(3, i).transpose(1, 2) for i in range(3)]


def angles(positions, pairs, seed=3):
    """[positions, pairs], those of neighbouring positions unlike."""
    return draws(torch.float64, seed)(positions, pairs) * 3


def tables(theta, interleaved):
    return Rope(theta.cos().float(), theta.sin().float(), interleaved)


def turned(x, theta, interleaved):
    """The rotary embedding by complex numbers, in float64."""
    x, half = x.double(), theta.shape[-1]
    rotary, rest = x[..., : 2 * half], x[..., 2 * half :]
    pairs = rotary.unflatten(-1, (half, 2)) if interleaved else rotary.unflatten(-1, (2, half)).transpose(-1, -2)
    product = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(theta), theta).unsqueeze(1)
    pairs = torch.view_as_real(product)
    return torch.cat(((pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2), rest), -1)


def everything(dtype=torch.float32):
    """Options of all kinds for 2 x 5 x 7 queries and keys, 2 heads of 40."""
    draw = draws(dtype, 1)
    return {
        "softmax_scale": 0.2,
        "key_lengths": torch.tensor([[7, 1, 0, 4, 5], [2, 7, 7, 0, 3]]),
        "q_norm": QKNorm("rms", draw(40), None, 1e-5),
        "k_norm": QKNorm("layer", draw(40), draw(40), 1e-5),
        "rope": tables(angles(7, 12), interleaved=True),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (127, 1), (1, 127), (16, 17)])
def test_plain_it_is_what_a_diffusers_processor_computes_bit_for_bit(queries, keys, dim, dtype):
    q, k, v = qkv(2, queries=queries, keys=keys, dim=dim, dtype=dtype)
    expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), dropout_p=0.0, is_causal=False)
    expected = expected.transpose(1, 2).reshape(2, -1, 2 * dim)
    out, stored = attention(q, k, v)
    assert stored is None
    assert torch.equal(out.flatten(-2), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (7, 7), (127, 127), (5, 1), (3, 17)])
def test_error_against_float64(queries, keys, dim, dtype):
    q, k, v = qkv(2, queries=queries, keys=keys, dim=dim, dtype=dtype)
    same = softmax_attention(q, k, v)
    exact = softmax_attention(q.double(), k.double(), v.double())
    assert_accurate(attention(q, k, v)[0], same, exact)
    exact = softmax_attention(q.double(), k.double(), v.double(), 0.3)
    assert_accurate(attention(q, k, v, softmax_scale=0.3)[0], softmax_attention(q, k, v, 0.3), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["spatial", "temporal"])
def test_packed_projections_are_read_where_they_lie(order, dtype):
    q, k, v = packed(order, dtype)
    out, stored = attention(q, k, v, store_dtype=dtype)
    rows = [t.contiguous().flatten(0, 1) for t in (q, k, v)]
    assert_same(out, attention(*rows)[0].unflatten(0, q.shape[:2]), strides=False)
    natural = out if order == "spatial" else out.transpose(1, 2)
    assert natural.is_contiguous() and natural.flatten(-2).data_ptr() == out.data_ptr()
    assert stored.stride() == out.stride()


@pytest.mark.parametrize("dims", [(0, 1, 2), (1, 0, 2), (2, 0, 1), (0, 2, 1), (1, 2, 0), (2, 1, 0)])
def test_the_output_lies_in_memory_as_q_does(dims):
    q, k, v = qkv(3, 4, queries=5)
    apart = [t.permute(*dims, 3, 4).contiguous().permute(*(dims.index(i) for i in range(3)), 3, 4) for t in (q, k, v)]
    out, stored = attention(*apart, store_dtype=torch.int8)
    assert_same(out, attention(q, k, v)[0], strides=False)
    for t in (out, stored.data, stored.scale):
        assert t.permute(*dims, 3, 4).is_contiguous()


def test_heads_before_tokens_in_memory_still_give_tokens_with_their_heads_together():
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv(2))
    assert attention(q, k, v)[0].is_contiguous()


def test_nothing_that_is_given_is_written_or_returned():
    given = qkv(2, 5)
    options = everything()
    results = parts(attention(*given, store_dtype=torch.float32, **options))
    memory = [t.untyped_storage().data_ptr() for t in (*given, *results)]
    assert len(set(memory)) == len(memory) and {t._version for t in given} == {0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_of_q_and_k(kind, dtype):
    q, k, v = qkv(2, dtype=dtype, keys=9)
    draw = draws(dtype, 5)
    weight, bias = draw(40), draw(40) if kind == "layer" else None
    norm = QKNorm(kind, weight, bias, 1e-3)

    def formula(t, to):
        x = t.to(to)
        centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
        y = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.to(to)
        return y if bias is None else y + bias.to(to)

    exact = [t.double() for t in (q, k, v)]
    for options, q_norm, k_norm in (
        ({"q_norm": norm}, True, False),
        ({"k_norm": norm}, False, True),
        ({"q_norm": norm, "k_norm": norm}, True, True),
    ):
        same = softmax_attention(formula(q, dtype) if q_norm else q, formula(k, dtype) if k_norm else k, v)
        right = softmax_attention(
            formula(q, torch.float64) if q_norm else exact[0],
            formula(k, torch.float64) if k_norm else exact[1],
            exact[2],
        )
        assert_accurate(attention(q, k, v, **options)[0], same, right)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_across_heads_takes_its_reciprocal_root(dtype):
    q, k, v = qkv(2, 3, dtype=dtype)
    weight = draws(dtype, 5)(2, 40)
    rstd = (q.float().flatten(-2).square().mean(-1) + 1e-6).rsqrt()
    rstd = rstd.transpose(1, 2).contiguous().transpose(1, 2)  # as it lies for q in temporal order
    got, _ = attention(q, k, v, q_norm=QKNorm(weight=weight, rstd=rstd))
    normed = F.rms_norm(q.flatten(-2).double(), (80,), weight.flatten().double(), 1e-6).view_as(q)
    same = F.rms_norm(q.flatten(-2), (80,), weight.flatten(), 1e-6).view_as(q)
    assert_accurate(got, softmax_attention(same, k, v), softmax_attention(normed, k.double(), v.double()))
    unweighted, _ = attention(q, k, v, q_norm=QKNorm(rstd=rstd))
    assert_same(unweighted, attention((q.float() * rstd[..., None, None]).to(dtype), k, v)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [1, 12, 20])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding(interleaved, pairs, dtype):
    q, k, v = qkv(2, 3, dtype=dtype)
    theta = angles(7, pairs).float().double()
    got, _ = attention(q, k, v, rope=tables(theta, interleaved))
    exact = softmax_attention(turned(q, theta, interleaved), turned(k, theta, interleaved), v.double())
    same = softmax_attention(turned(q, theta, interleaved).to(dtype), turned(k, theta, interleaved).to(dtype), v)
    assert_accurate(got, same, exact)


def test_the_keys_of_cross_attention_are_not_rotated():
    q, k, v = qkv(2, keys=9)
    theta = angles(7, 20)
    got, _ = attention(q, k, v, rope=tables(theta, True))
    assert torch.allclose(got.double(), softmax_attention(turned(q, theta, True), k.double(), v.double()), atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(shift=st.integers(-50, 50), interleaved=st.booleans())
def test_rotary_attention_depends_on_relative_positions_only(shift, interleaved):
    q, k, v = qkv(1)
    frequency = torch.logspace(0, -3, 20, dtype=torch.float64)
    here, there = (tables((torch.arange(7) + s).double()[:, None] * frequency, interleaved) for s in (0, shift))
    assert torch.allclose(attention(q, k, v, rope=here)[0], attention(q, k, v, rope=there)[0], atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_rounds_then_the_rotation_rounds(dtype):
    q, k, v = qkv(2, dtype=dtype)
    norm, rope = QKNorm(weight=draws(dtype, 5)(40)), tables(angles(7, 12), False)
    a, b = F.rms_norm(q, (40,), norm.weight, 1e-6)[..., :24].float().chunk(2, -1)
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(dtype)
    prepared = torch.cat((rotated, F.rms_norm(q, (40,), norm.weight, 1e-6)[..., 24:]), -1)
    one_more = torch.cat((k, k[:, :1]), 1), torch.cat((v, v[:, :1]), 1)  # so that the keys are not rotated
    assert_same(attention(q, *one_more, q_norm=norm, rope=rope)[0], attention(prepared, *one_more)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_keys_beyond_the_length_are_not_read(index, dtype):
    q, k, v = qkv(5, queries=3, keys=6, dtype=dtype)
    lengths = [6, 1, 0, 4, 9]
    for row, length in enumerate(lengths):
        k[row, length:] = float("nan")
        v[row, length:] = float("inf")
    out, _ = attention(q, k, v, key_lengths=torch.tensor(lengths, dtype=index))
    for row, length in enumerate(lengths):
        if length == 0:
            assert torch.equal(out[row], torch.zeros_like(out[row]))
            continue
        short = [t[row : row + 1, :length] for t in (k, v)]
        exact = softmax_attention(q[row : row + 1].double(), *(t.double() for t in short))
        assert_accurate(out[row : row + 1], softmax_attention(q[row : row + 1], *short), exact)


def test_lengths_of_the_first_batch_dimension_hold_for_the_second():
    q, k, v = qkv(2, 3)
    by_row = attention(q, k, v, key_lengths=torch.tensor([4, 0]))[0]
    assert_same(by_row, attention(q, k, v, key_lengths=torch.tensor([4, -(2**40)]))[0])
    assert_same(by_row, attention(q, k, v, key_lengths=torch.tensor([[4, 4, 4], [0, 0, 0]]))[0])
    assert by_row[0].abs().min() > 0 and (by_row[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_the_stored_copy(dim, dtype):
    q, k, v = qkv(2, 3, dim=dim, dtype=dtype)
    out, stored = attention(q, k, v, store_dtype=dtype)
    assert_same(stored, out)
    for fewer, most in ((torch.int8, 0.5001 / 127), (torch.float8_e4m3fn, 1 / 16), (torch.int4, 0.127)):
        again, stored = attention(q, k, v, store_dtype=fewer)
        assert_same(again, out)
        group = 32 if fewer == torch.int4 else dim
        assert isinstance(stored, Quantized) and stored.group == group and stored.shape == out.shape
        assert stored.scale.shape == (2, 3, 7, 2, -(-dim // group))
        assert_same(stored, quantize(out, fewer, group))
        error = (dequantize(stored, torch.float32) - out.float()).abs()
        assert (error <= out.float().abs().amax(-1, keepdim=True) * most).all()


def test_it_gives_the_same_twice():
    calls = [
        attention(*qkv(2, 5, dtype=torch.bfloat16), store_dtype=torch.int8, **everything(torch.bfloat16))
        for _ in range(2)
    ]
    assert_same(*calls)


def test_batches_that_torchs_kernels_cannot_take_are_split(monkeypatch):
    inputs, options = qkv(2, 5), everything()
    plain, full = attention(*inputs), attention(*inputs, **options)
    reference, sizes = importlib.import_module("pab_kernels.ops.attention.reference"), []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(reference, "MAX_BATCH", 3)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *args, **kw: (sizes.append(len(q)), sdpa(q, *args, **kw))[1]
    )
    assert_same(attention(*inputs), plain)
    assert_same(attention(*inputs, **options), full)
    assert sizes == [3, 3, 3, 1] * 2


@pytest.mark.parametrize("store_dtype", [None, torch.float32, torch.int8])
@pytest.mark.parametrize("order", ["spatial", "temporal"])
def test_meta_and_fake_tensors(order, store_dtype):
    def call(device):
        q, k, v = (t.to(device) for t in packed(order))
        n = q.shape[-3]
        options = {
            "q_norm": QKNorm(weight=torch.ones(40, device=device)),
            "key_lengths": torch.ones(2, dtype=torch.int64, device=device),
        }
        rope = Rope(torch.ones(n, 8, device=device), torch.ones(n, 8, device=device), False)
        return parts(attention(q, k, v, rope=rope, store_dtype=store_dtype, **options))

    real = [(t.shape, t.dtype, t.stride()) for t in call("cpu")]
    assert [(t.shape, t.dtype, t.stride()) for t in call("meta")] == real
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert [(t.shape, t.dtype, t.stride()) for t in call("cpu")] == real


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
        "auto",
    )


def plain(q, k, v, store_dtype):
    none = [None, None, None, 0.0, None]
    return (q, k, v, None, None, *none, *none, None, None, False, store_dtype, "auto")


@pytest.mark.parametrize("store_dtype", [None, torch.float32, torch.int8])
def test_the_registered_operation_returns_what_the_public_function_does(store_dtype):
    inputs, options = qkv(2, 5), everything()
    args, expected = flat(*inputs, store_dtype, options), parts(attention(*inputs, store_dtype=store_dtype, **options))
    assert_same(OP(*args), expected)


@pytest.mark.parametrize(
    "args", [flat(*qkv(2, 5), torch.int8, everything()), plain(*packed("temporal"), torch.float32)]
)
def test_the_registered_operation_passes_opcheck(args):
    opcheck(OP, args)


@pytest.mark.parametrize("store_dtype", [None, torch.int8])
def test_compiled_it_has_the_same_result(store_dtype, opaque):
    inputs, options = qkv(2, 5, dtype=torch.bfloat16), everything(torch.bfloat16)
    result, called = called_when_compiled(attention, *inputs, store_dtype=store_dtype, **options)
    assert called == ["pab_kernels.attention"] * opaque
    assert_same(result, attention(*inputs, store_dtype=store_dtype, **options))


def test_compiled_the_projection_is_read_where_it_lies(opaque):
    def temporal(whole):
        q, k, v = (whole.select(3, i).transpose(1, 2) for i in range(3))
        return attention(q, k, v)[0].transpose(1, 2).flatten(-2)

    whole = draws()(2, 5, 3, 3, 2, 40)
    result, called = called_when_compiled(temporal, whole)
    assert called == ["pab_kernels.attention"] * opaque
    assert_same(result, temporal(whole))


def test_gradients_flow_through_the_reference_and_not_through_the_rest():
    q, k, v = (t.requires_grad_() for t in qkv(2))
    attention(q, k, v)[0].sum().backward()
    assert torch.allclose(v.grad.sum(1), torch.full((2, 2, 40), 7.0), atol=1e-4)
    args = plain(*qkv(2), None)
    assert_refuses(RuntimeError, "has no gradient", lambda: OP(args[0].requires_grad_(), *args[1:])[0].sum().backward())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *QKV_REFUSED,
        *OPTIONS_REFUSED,
        ({"k": Q[:, :0], "v": Q[:, :0]}, ValueError, "k has no keys"),
        ({"key_lengths": [3, 4]}, TypeError, "key_lengths is a list"),
        ({"key_lengths": LENGTHS.float()}, TypeError, "key_lengths has dtype torch.float32"),
        ({"key_lengths": LENGTHS.to("meta")}, ValueError, "key_lengths is on meta"),
        ({"key_lengths": LENGTHS[:1]}, ValueError, "key_lengths has shape (1,); (2,)"),
    ],
)
def test_refused(changes, error, message):
    refused(changes, error, message, attention)


def test_store_dtypes_refused():
    for dtype in (torch.float16, torch.int16, "int8"):
        refused({"store_dtype": dtype}, TypeError, f"store_dtype is {dtype!r}", attention)
