"""`project_residual` rounds where the model does, stores what it should, and refuses what it cannot serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pab_kernels.ops import Line, broadcast_residual, dequantize, project_residual, quantize
from tests.ops.tensors import (
    DTYPES,
    EIGHT_BITS,
    assert_accurate,
    assert_refuses,
    assert_same,
    called_when_compiled,
    draws,
    opcheck,
    parts,
)

OP = torch.ops.pab_kernels.project_residual.default
STORES = [
    (None, None),
    ("pre_gate", None),
    ("post_gate", None),
    ("pre_gate", torch.int8),
    ("post_gate", torch.float8_e4m3fn),
]


def inputs(dtype=torch.float32, shape=(2, 7, 136), k=40, seed=0):
    """a, weight, bias, x."""
    draw = draws(dtype, seed)
    return draw(*shape[:-1], k), draw(shape[-1], k) / k**0.5, draw(shape[-1]), draw(*shape)


def rest(dtype=torch.float32, shape=(2, 7, 136)):
    """A gate, a line and a cached output with a gate."""
    draw = draws(dtype, 1)
    return {
        "gate": draw(shape[0], *(1,) * (len(shape) - 2), shape[-1]),
        "slots": [Line(draw(*shape), draw(*shape), torch.tensor(0.6)), quantize(draw(*shape), torch.int8)],
        "gates": [None, draw(*shape)],
    }


@pytest.mark.parametrize(("store", "store_dtype"), STORES)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_models_own_arithmetic_bit_for_bit(dtype, gated, store, store_dtype):
    for shape in ((1, 1, 136), (2, 7, 1152), (127, 40)):
        a, weight, bias, x = inputs(dtype, shape)
        gate = rest(dtype, shape)["gate"] if gated else None
        x_new, stored = project_residual(a, weight, bias, x, gate=gate, store=store, store_dtype=store_dtype)
        p = F.linear(a, weight, bias)
        g = gate * p if gated else p
        assert_same(x_new, g + x)
        if store is None:
            assert stored is None
            continue
        kept = p if store == "pre_gate" else g
        assert_same(stored, kept if store_dtype is None else quantize(kept, store_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 136), (2, 7, 1152), (127, 40)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_error_against_float64(shape, dtype, with_bias):
    a, weight, bias, x = inputs(dtype, shape)
    bias = bias if with_bias else None
    more = rest(dtype, shape)
    x_new, stored = project_residual(a, weight, bias, x, store="post_gate", **more)

    def formula(to):
        linear = [None if t is None else t.to(to) for t in (a, weight, bias)]
        g = more["gate"].to(to) * F.linear(*linear)
        line, second = more["slots"][0], dequantize(more["slots"][1], torch.float64).to(to)
        first = line.newest.to(to) + 0.6 * (line.newest.to(to) - line.before.to(to))
        return g + x.to(to) + first + more["gates"][1].to(to) * second, g

    for got, same, exact in zip((x_new, stored), formula(dtype), formula(torch.float64), strict=True):
        assert_accurate(got, same, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_outputs_are_added_as_broadcast_residual_adds_them(dtype):
    a, weight, bias, x = inputs(dtype)
    more = rest(dtype)
    gate = more.pop("gate")
    expected, _ = broadcast_residual(project_residual(a, weight, bias, x, gate=gate)[0], **more)
    assert_same(project_residual(a, weight, bias, x, gate=gate, **more)[0], expected)


@pytest.mark.parametrize("store_dtype", EIGHT_BITS)
def test_what_is_added_is_not_quantised(store_dtype):
    a, weight, bias, x = inputs()
    expected, _ = project_residual(a, weight, bias, x)
    assert_same(project_residual(a, weight, bias, x, store="pre_gate", store_dtype=store_dtype)[0], expected)


@pytest.mark.parametrize(("store", "store_dtype"), STORES)
@pytest.mark.parametrize("gated", [True, False])
def test_results_are_memory_of_their_own(store, store_dtype, gated):
    a, weight, bias, x = inputs()
    gate = torch.ones(136) if gated else None
    given, results = (
        [a, weight, bias, x],
        parts(project_residual(a, weight, bias, x, gate=gate, store=store, store_dtype=store_dtype)),
    )
    memory = [t.untyped_storage().data_ptr() for t in (*given, *results)]
    assert len(set(memory)) == len(memory) and {t._version for t in given} == {0}


def test_strided_views_give_contiguous_results():
    a, weight, bias, x = inputs()
    gate = draws()(2, 7, 136)
    expected = project_residual(a, weight, bias, x, gate=gate, store="post_gate")
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (a, x, gate)]
    wide = torch.cat((weight, weight), 1)[:, :40]
    got = project_residual(turned[0], wide, bias, turned[1], gate=turned[2], store="post_gate")
    assert all(t.is_contiguous() for t in got)
    for t, e in zip(got, expected, strict=True):
        assert torch.allclose(t, e, atol=1e-5)


def test_it_gives_the_same_twice():
    calls = [project_residual(*inputs(torch.bfloat16), store="pre_gate", **rest(torch.bfloat16)) for _ in range(2)]
    assert_same(*calls)


@pytest.mark.parametrize(("store", "store_dtype"), STORES)
def test_meta_tensors(store, store_dtype):
    real = parts(project_residual(*inputs(), store=store, store_dtype=store_dtype))
    meta = parts(project_residual(*(t.to("meta") for t in inputs()), store=store, store_dtype=store_dtype))
    assert [(t.shape, t.dtype, t.stride()) for t in meta] == [(t.shape, t.dtype, t.stride()) for t in real]


def sample(store, store_dtype):
    """Arguments of the registered operation, and its results."""
    a, weight, bias, x = inputs()
    more = rest()
    line, eight = more["slots"]
    cached = (
        [line.newest, eight.data, line.before, None],
        [None, eight.scale, None, None],
        more["gates"],
        [line.weight, None],
    )
    args = (a, weight, bias, x, more["gate"], store, store_dtype or x.dtype, *cached, "auto")
    return args, parts(project_residual(a, weight, bias, x, store=store, store_dtype=store_dtype, **more))


@pytest.mark.parametrize(("store", "store_dtype"), STORES)
def test_the_registered_operation_returns_what_the_public_function_does(store, store_dtype):
    args, expected = sample(store, store_dtype)
    assert_same(OP(*args), expected)


@pytest.mark.parametrize(("store", "store_dtype"), [STORES[1], STORES[3]])
def test_the_registered_operation_passes_opcheck(store, store_dtype):
    opcheck(OP, sample(store, store_dtype)[0])


@pytest.mark.parametrize(("store", "store_dtype"), [STORES[0], STORES[4]])
def test_compiled_it_has_the_same_result(store, store_dtype, opaque):
    options = {"store": store, "store_dtype": store_dtype, **rest(torch.bfloat16)}
    result, called = called_when_compiled(project_residual, *inputs(torch.bfloat16), **options)
    assert called == ["pab_kernels.project_residual"] * opaque
    assert_same(result, project_residual(*inputs(torch.bfloat16), **options))


def test_gradients_flow_through_the_reference_and_not_through_the_rest():
    a, weight, bias, x = (t.requires_grad_() for t in inputs())
    project_residual(a, weight, bias, x, gate=torch.full((136,), 3.0))[0].sum().backward()
    assert torch.allclose(x.grad, torch.ones_like(x)) and torch.allclose(bias.grad, torch.full((136,), 42.0))
    args, _ = sample(None, None)
    assert_refuses(RuntimeError, "has no gradient", lambda: OP(args[0].requires_grad_(), *args[1:])[0].sum().backward())


A, W, B, X = inputs()


def call(**changes):
    given = {"a": A, "weight": W, "bias": B, "x": X, **changes}
    return [given.pop(name) for name in ("a", "weight", "bias", "x")], given


REFUSED = [
    ({"x": None}, TypeError, "x is a NoneType"),
    ({"x": X.int()}, TypeError, "x has dtype torch.int32"),
    ({"x": X.mT.contiguous().mT}, ValueError, "x has stride 7"),
    ({"a": None}, TypeError, "a is a NoneType"),
    ({"a": A[:1]}, ValueError, "a has shape (1, 7, 40); (2, 7, 40)"),
    ({"a": A[0]}, ValueError, "a has shape (7, 40); (2, 7, 40)"),
    ({"a": A.half()}, TypeError, "a has dtype torch.float16"),
    ({"a": A.to("meta")}, ValueError, "a is on meta"),
    ({"a": A.mT.contiguous().mT}, ValueError, "a has stride 7"),
    ({"weight": W[:, :8]}, ValueError, "weight has shape (136, 8); (136, 40)"),
    ({"weight": W[:8]}, ValueError, "weight has shape (8, 40); (136, 40)"),
    ({"weight": W.half()}, TypeError, "weight has dtype torch.float16"),
    ({"weight": W.T.contiguous().T}, ValueError, "weight has stride 136"),
    ({"bias": B[:8]}, ValueError, "bias has shape (8,); (136,)"),
    ({"bias": B.half()}, TypeError, "bias has dtype torch.float16"),
    ({"gate": X[:, :3]}, ValueError, "gate has shape (2, 3, 136)"),
    ({"gate": 1.0}, TypeError, "gate is a float"),
    ({"store": "unprojected"}, ValueError, "store is 'unprojected'"),
    ({"slots": [X] * 3}, ValueError, "slots has length 3; up to 2"),
    ({"slots": [X], "gates": [None, None]}, ValueError, "gates has length 2"),
    ({"slots": [Line(X, X, 2.0)]}, TypeError, "slots[0].weight is a float"),
    ({"slots": [Line(X, X[:1], torch.tensor(2.0))]}, ValueError, "slots[0].before has shape (1, 7, 136)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED)
def test_refused(changes, error, message):
    args, options = call(**changes)
    assert_refuses(error, message, project_residual, *args, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"store_dtype": torch.int8}, ValueError, "store_dtype is torch.int8 and store is None"),
        ({"store": "pre_gate", "store_dtype": torch.int16}, TypeError, "store_dtype is torch.int16"),
        ({"store": "pre_gate", "store_dtype": torch.float16}, TypeError, "store_dtype is torch.float16"),
    ],
)
def test_store_dtypes_refused(changes, error, message):
    args, options = call(**changes)
    assert_refuses(error, message, project_residual, *args, **options)
