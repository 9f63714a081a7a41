"""`broadcast_residual` rounds where the model does, and refuses what it cannot serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from pab_kernels.ops import Line, Norm, QKNorm, broadcast_residual, dequantize, quantize
from pab_kernels.ops.broadcast_residual import BroadcastResidual
from pab_kernels.ops.broadcast_residual.reference import compute
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

SHAPES = [(1, 1, 136), (2, 7, 1152), (127, 40), (3, 2, 5, 8)]
OP = torch.ops.pab_kernels.broadcast_residual.default


def slots_of(draw, shape, count):
    """bf16, fp8 and int8 slots, in this order."""
    plain = [draw(*shape) for _ in range(count)]
    return [t if i == 0 else quantize(t, EIGHT_BITS[i % 2]) for i, t in enumerate(plain)]


def everything(dtype=torch.float32, shape=(2, 7, 136), seed=0):
    """A call with all that there is."""
    draw = draws(dtype, seed)
    x, gate = draw(*shape), draw(shape[0], *(1,) * (len(shape) - 2), shape[-1])
    slots = slots_of(draw, shape, 3)
    slots[1:] = (
        Line(slots[1], draw(*shape), torch.tensor(0.3)),
        Line(slots[2], quantize(draw(*shape), torch.int8), torch.tensor([1.7])),
    )
    return (x, slots), {
        "gates": [gate, None, draw(*shape)],
        "norm": Norm("layer", draw(shape[-1]), draw(shape[-1]), 1e-5),
        "shift": draw(*gate.shape),
        "scale": draw(shape[-1]),
    }


def layer_norm(x, eps):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()


def rms_norm(x, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("kind", ["layer", "rms", None])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_the_models_own_arithmetic_bit_for_bit(dtype, count, kind):
    if kind is None and not count:
        return
    for shape in SHAPES:
        draw = draws(dtype)
        x, slots = draw(*shape), slots_of(draw, shape, count)
        shift, scale, gate = (draw(shape[0], *(1,) * (len(shape) - 2), shape[-1]) for _ in range(3))
        before, weight = quantize(draw(*shape), torch.int8), torch.tensor(0.7)
        slots[2:] = [Line(slot, before, weight) for slot in slots[2:]]
        got = broadcast_residual(
            x,
            slots,
            gates=[gate, None, None][:count],
            norm=kind and Norm(kind),
            shift=shift if kind else None,
            scale=scale if kind else None,
        )
        expected = x
        if count > 0:
            expected = gate * slots[0] + expected
        if count > 1:
            expected = dequantize(slots[1], dtype) + expected
        if count > 2:
            newest, before = (dequantize(slot, torch.float32) for slot in (slots[2].newest, slots[2].before))
            expected = (newest + weight * (newest - before)).to(dtype) + expected
        assert_same(got[0], expected)
        if kind is None:
            assert got[1] is None
            continue
        norm = F.layer_norm if kind == "layer" else F.rms_norm
        assert_same(got[1], norm(expected, shape[-1:], eps=1e-6) * (1 + scale) + shift)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_against_float64(shape, dtype, kind):
    draw = draws(dtype)
    x, a, b = draw(*shape), draw(*shape), draw(*shape)
    gate, shift, scale = draw(*shape), draw(*shape), draw(*shape)
    weight, bias, factor = draw(shape[-1]), None if kind == "rms" else draw(shape[-1]), torch.tensor(1.3)
    eight, before = quantize(b, torch.int8), draw(*shape)
    got = broadcast_residual(
        x,
        [Line(a, before, factor), eight],
        gates=[None, gate],
        norm=Norm(kind, weight, bias, 1e-3),
        shift=shift,
        scale=scale,
    )
    norm64 = layer_norm if kind == "layer" else rms_norm

    def formula(to, norm):
        terms = [t.to(to) for t in (x, a, before, factor, dequantize(eight, torch.float64), gate)]
        new = terms[0] + (terms[1] + terms[3] * (terms[1] - terms[2])) + terms[5] * terms[4]
        y = norm(new) * weight.to(to) + (0 if bias is None else bias.to(to))
        return new, y * (1 + scale.to(to)) + shift.to(to)

    exact = formula(torch.float64, lambda t: norm64(t, 1e-3))
    same = formula(dtype, lambda t: (F.layer_norm if kind == "layer" else F.rms_norm)(t, shape[-1:], eps=1e-3))
    for i in range(2):
        assert_accurate(got[i], same[i], exact[i])


def test_without_slots_x_is_returned_as_it_is():
    draw = draws()
    x = draw(2, 7, 136)
    kept = x.clone()
    x_new, y = broadcast_residual(x, norm=Norm())
    assert x_new is x and torch.equal(x, kept) and x._version == 0
    assert_same(y, F.layer_norm(x, (136,), eps=1e-6))


def test_nothing_that_is_given_is_written_or_returned():
    (x, slots), options = everything()
    given = [x, *parts(slots), *parts(options["gates"]), options["shift"], options["scale"]]
    kept = [t.clone() for t in given]
    results = broadcast_residual(x, slots, **options)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(given, kept, strict=True)) and {
        t._version for t in given
    } == {0}
    assert {t.untyped_storage().data_ptr() for t in given}.isdisjoint({t.untyped_storage().data_ptr() for t in results})


@pytest.mark.parametrize(
    "gate_shape", [(2, 1, 1, 8), (2, 3, 1, 8), (2, 3, 5, 8), (1, 3, 1, 8), (3, 1, 8), (5, 8), (8,)]
)
def test_gates_shifts_and_scales_broadcast(gate_shape):
    draw = draws()
    x, slot = draw(2, 3, 5, 8), draw(2, 3, 5, 8)
    gate, shift, scale = draw(*gate_shape), draw(*gate_shape), draw(*gate_shape)
    got = broadcast_residual(x, [slot], gates=[gate], norm=Norm("rms"), shift=shift, scale=scale)
    full = [t.expand(2, 3, 5, 8).contiguous() for t in (gate, shift, scale)]
    assert_same(got, broadcast_residual(x, [slot], gates=full[:1], norm=Norm("rms"), shift=full[1], scale=full[2]))


@pytest.mark.parametrize("only", ["shift", "scale"])
def test_shift_or_scale_alone(only):
    draw = draws()
    x, t = draw(2, 7, 8), draw(2, 1, 8)
    y = F.layer_norm(x, (8,), eps=1e-6)
    assert_same(broadcast_residual(x, norm=Norm(), **{only: t})[1], y + t if only == "shift" else y * (1 + t))


def views(t):
    """The same values as a padded slice, and as a transposed view."""
    padded = torch.full((*t.shape[:-1], t.shape[-1] + 8), float("nan"))
    padded[..., :-8] = t
    return padded[..., :-8], t.transpose(0, 1).contiguous().transpose(0, 1)


def test_strided_views_give_contiguous_results():
    draw = draws()
    x, slot, gate = draw(2, 7, 136), draw(2, 7, 136), draw(2, 7, 136)
    options = {"norm": Norm(), "shift": gate}
    expected = broadcast_residual(x, [slot], gates=[gate], **options)
    for x_view, slot_view, gate_view in zip(views(x), views(slot), views(gate), strict=True):
        options["shift"] = gate_view
        got = broadcast_residual(x_view, [slot_view], gates=[gate_view], **options)
        assert got[0].is_contiguous() and got[1].is_contiguous()
        assert_same(got, expected)
        for norm in (Norm("layer"), Norm("rms")):
            assert_same(broadcast_residual(x_view, norm=norm)[1], broadcast_residual(x, norm=norm)[1])


def test_it_gives_the_same_twice():
    (x, slots), options = everything(torch.bfloat16)
    assert_same(broadcast_residual(x, slots, **options), broadcast_residual(x, slots, **options))


def test_meta_and_fake_tensors():
    (x, slots), options = everything()
    real = broadcast_residual(x, slots, **options)

    def on(device):
        def move(t):
            if isinstance(t, Line):
                return Line(move(t.newest), move(t.before), move(t.weight))
            return (
                type(t)(t.data.to(device), t.scale.to(device), t.group)
                if hasattr(t, "group")
                else t
                if t is None
                else t.to(device)
            )

        norm = Norm("layer", move(options["norm"].weight), move(options["norm"].bias))
        rest = {k: [move(t) for t in v] if isinstance(v, list) else move(v) for k, v in options.items() if k != "norm"}
        return broadcast_residual(move(x), [move(s) for s in slots], norm=norm, **rest)

    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = on("cpu")
    for result in (on("meta"), fake):
        assert [(t.shape, t.dtype, t.stride()) for t in result] == [(t.shape, t.dtype, t.stride()) for t in real]


def sample(count, kind, quantized=True):
    """Arguments of the registered operation."""
    draw = draws()
    x, slots = draw(2, 7, 136), slots_of(draw, (2, 7, 136), count)
    data = [s if isinstance(s, torch.Tensor) else s.data for s in slots]
    scales = [None if isinstance(s, torch.Tensor) else s.scale for s in slots]
    gates, weights = [draw(2, 1, 136), None, None][:count], [None, torch.tensor(0.5), None][:count]
    if count > 1:  # the second is a line
        data, scales = [*data, None, draw(2, 7, 136), None], [*scales, None, None, None]
    modulate = (draw(2, 1, 136), draw(2, 1, 136)) if kind else (None, None)
    return (x, data, scales, gates, weights, kind, draw(136) if kind else None, None, 1e-6, *modulate, "auto")


@pytest.mark.parametrize(("count", "kind"), [(0, "rms"), (3, "layer")])
def test_the_registered_operation_passes_opcheck(count, kind):
    opcheck(OP, sample(count, kind))


@pytest.mark.parametrize(("count", "kind"), [(0, "rms"), (3, "layer"), (1, None)])
def test_the_registered_operation_returns_what_the_reference_does(count, kind):
    args = sample(count, kind)
    results = OP(*args)
    assert len(results) == bool(count) + bool(kind)
    assert_same(results, [t for t in compute(BroadcastResidual.unflatten(*args[:-1])) if t is not None])


def test_compiled_it_has_the_same_result(opaque):
    (x, slots), options = everything(torch.bfloat16)
    result, called = called_when_compiled(broadcast_residual, x, slots, **options)
    assert called == ["pab_kernels.broadcast_residual"] * opaque
    assert_same(result, broadcast_residual(x, slots, **options))


def test_compiled_without_slots_it_returns_x(opaque):
    x = draws()(2, 7, 136)
    (x_new, y), called = called_when_compiled(lambda t: broadcast_residual(t, norm=Norm("rms")), x)
    assert called == ["pab_kernels.broadcast_residual"] * opaque
    assert x_new is x
    assert_same(y, broadcast_residual(x, norm=Norm("rms"))[1])


def test_gradients_flow_through_the_reference_and_not_through_the_rest():
    draw = draws()
    x, slot = draw(2, 7, 8).requires_grad_(), draw(2, 7, 8).requires_grad_()
    for t in broadcast_residual(x, [Line(slot, torch.zeros_like(slot), torch.tensor(2.0))], norm=Norm()):
        t.sum().backward(retain_graph=True)
    assert torch.allclose(x.grad, torch.ones_like(x), atol=1e-5) and torch.allclose(slot.grad, 3 * x.grad, atol=1e-5)
    args = sample(1, "layer")
    assert_refuses(RuntimeError, "has no gradient", lambda: OP(args[0].requires_grad_(), *args[1:])[0].sum().backward())


X = draws()(2, 7, 136)
EIGHT = quantize(X, torch.int8)
META = X.to("meta")
ONE = torch.tensor(1.0)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (([1.0], [X]), {}, TypeError, "x is a list"),
        ((X.int(), [X]), {}, TypeError, "x has dtype torch.int32"),
        ((torch.ones(()), [X]), {}, ValueError, "x has no dimensions"),
        ((X.transpose(1, 2), [X]), {}, ValueError, "x has stride 136 in its last dimension"),
        ((X,), {}, ValueError, "neither slots nor norm"),
        ((X, X), {}, TypeError, "slots is a Tensor"),
        ((X, EIGHT), {}, TypeError, "slots is a Quantized"),
        ((X, None), {}, TypeError, "slots is a NoneType"),
        ((X, [X] * 4), {}, ValueError, "slots has length 4; up to 3"),
        ((X, [None]), {}, TypeError, "slots[0] is a NoneType"),
        ((X, [X, X[:1]]), {}, ValueError, "slots[1] has shape (1, 7, 136)"),
        ((X, [X.half()]), {}, TypeError, "slots[0] has dtype torch.float16"),
        ((X, [META]), {}, ValueError, "slots[0] is on meta"),
        ((X, [X.mT.contiguous().mT]), {}, ValueError, "slots[0] has stride 7"),
        ((X, [quantize(X, torch.int8, group=64)]), {}, ValueError, "slots[0] has groups of 64 channels"),
        ((X, [quantize(X[:1], torch.int8)]), {}, ValueError, "slots[0].data has shape (1, 7, 136)"),
        ((X, [type(EIGHT)(EIGHT.data, EIGHT.scale[..., :1])]), {}, ValueError, "slots[0].scale has shape (2, 7, 1)"),
        ((X, [type(EIGHT)(EIGHT.data, EIGHT.scale.half())]), {}, TypeError, "slots[0].scale has dtype torch.float16"),
        ((X, [type(EIGHT)(EIGHT.data.short(), EIGHT.scale)]), {}, TypeError, "slots[0].data's dtype is torch.int16"),
        ((X, [type(EIGHT)(None, EIGHT.scale)]), {}, TypeError, "slots[0].data is a NoneType"),
        ((X, [X]), {"gates": X}, TypeError, "gates is a Tensor"),
        ((X, [X]), {"gates": []}, ValueError, "gates has length 0"),
        ((X, [X]), {"gates": [0.5]}, TypeError, "gates[0] is a float"),
        ((X, [X]), {"gates": [X.half()]}, TypeError, "gates[0] has dtype torch.float16"),
        ((X, [X]), {"gates": [META]}, ValueError, "gates[0] is on meta"),
        ((X, [X]), {"gates": [X[:, :3]]}, ValueError, "gates[0] has shape (2, 3, 136)"),
        ((X, [X]), {"gates": [X[..., :1]]}, ValueError, "gates[0] has shape (2, 7, 1)"),
        ((X, [X]), {"gates": [X[None]]}, ValueError, "gates[0] has shape (1, 2, 7, 136)"),
        ((X, [X]), {"gates": [X.mT.contiguous().mT]}, ValueError, "gates[0] has stride 7"),
        ((X, [Line(X, X, 0.5)]), {}, TypeError, "slots[0].weight is a float"),
        ((X, [Line(X, X, None)]), {}, TypeError, "slots[0].weight is a NoneType"),
        ((X, [Line(X, X, ONE.half())]), {}, TypeError, "slots[0].weight has dtype torch.float16"),
        ((X, [Line(X, X, ONE.to("meta"))]), {}, ValueError, "slots[0].weight is on meta"),
        ((X, [Line(X, X, torch.ones(2))]), {}, ValueError, "slots[0].weight has shape (2,)"),
        ((X, [Line(X, X, torch.ones(1, 1))]), {}, ValueError, "slots[0].weight has shape (1, 1)"),
        ((X, [X, Line(None, X, ONE)]), {}, TypeError, "slots[1].newest is a NoneType"),
        ((X, [Line(X, X[:1], ONE)]), {}, ValueError, "slots[0].before has shape (1, 7, 136)"),
        ((X, [Line(EIGHT, X.half(), ONE)]), {}, TypeError, "slots[0].before has dtype torch.float16"),
        (
            (X, [Line(X, quantize(X, torch.int8, group=64), ONE)]),
            {},
            ValueError,
            "slots[0].before has groups of 64 channels",
        ),
        ((X, [Line(Line(X, X, ONE), X, ONE)]), {}, TypeError, "slots[0].newest is a Line"),
        ((X,), {"norm": "layer"}, TypeError, "norm is a str"),
        ((X,), {"norm": QKNorm()}, TypeError, "norm is a QKNorm"),
        ((X,), {"norm": Norm("batch")}, ValueError, "norm.kind is 'batch'"),
        ((X,), {"norm": Norm(eps=-1e-6)}, ValueError, "norm.eps is -1e-06; a finite number from 0 on"),
        ((X,), {"norm": Norm(eps=float("nan"))}, ValueError, "norm.eps is nan"),
        ((X,), {"norm": Norm(eps=float("inf"))}, ValueError, "norm.eps is inf"),
        ((X,), {"norm": Norm(eps=10**400)}, ValueError, "norm.eps is too large for a float"),
        ((X,), {"norm": Norm(eps="1e-6")}, TypeError, "norm.eps is a str"),
        ((X,), {"norm": Norm(eps=ONE)}, TypeError, "norm.eps is a Tensor"),
        ((X,), {"norm": Norm("rms", bias=X[0, 0])}, ValueError, "norm.bias is given with kind 'rms'"),
        ((X,), {"norm": Norm("rms", torch.ones(8))}, ValueError, "norm.weight has shape (8,)"),
        ((X,), {"norm": Norm("layer", bias=X[0, 0].half())}, TypeError, "norm.bias has dtype torch.float16"),
        ((X,), {"norm": Norm("layer", META[0, 0])}, ValueError, "norm.weight is on meta"),
        ((X, [X]), {"shift": X}, ValueError, "shift is given without norm"),
        ((X, [X]), {"scale": X}, ValueError, "scale is given without norm"),
        ((X,), {"norm": Norm(), "shift": X[:, :2]}, ValueError, "shift has shape (2, 2, 136)"),
        ((X,), {"norm": Norm(), "scale": X.half()}, TypeError, "scale has dtype torch.float16"),
    ],
)
def test_refused(args, options, error, message):
    assert_refuses(error, message, broadcast_residual, *args, **options)
