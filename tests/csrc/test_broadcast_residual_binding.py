"""The unmodified binding of broadcast_residual to torch, compiled for CPU tensors around the kernel under the lockstep
machine: what the public function does with `backend="cuda"`, all the way down."""

from __future__ import annotations

import ctypes
from importlib import import_module
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from pab_kernels.ops import BackendError, Line, Norm, Quantized, broadcast_residual, broadcast_residual_out
from pab_kernels.ops.backend import load
from pab_kernels.ops.broadcast_residual import BroadcastResidual
from pab_kernels.ops.overlap import overlap, overlaps_itself
from tests.csrc.binding import bound
from tests.ops.broadcast_residual_cases import LINES, NORMS, assert_rounded_once, call, poisoned
from tests.ops.tensors import assert_refuses, draws, parts

cuda = import_module("pab_kernels.ops.broadcast_residual.cuda")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The machine, under the binding that is loaded into torch."""
    return bound("broadcast_residual", tmp_path_factory.mktemp("binding"))


@pytest.fixture
def kernels(machine, monkeypatch):
    monkeypatch.setattr(cuda, "refuse", lambda t: None)
    return machine


@pytest.fixture(params=["checked in Python", "checked in C++"])
def mode(request, monkeypatch):
    """Both ways to the kernel; neither may fall back to the other."""
    in_cpp = request.param == "checked in C++"
    if in_cpp:
        monkeypatch.setattr(BroadcastResidual, "check", lambda *args: pytest.fail("C++ did not take the call"))
    else:
        monkeypatch.setattr(cuda, "attempt", lambda *args: pytest.fail("the call was not checked in Python"))
    load.cache_clear()  # it keeps the functions of a backend
    with torch.set_grad_enabled(not in_cpp):
        yield
    load.cache_clear()


def run(kernels: ctypes.CDLL, x: Tensor, slots: list, **options) -> None:
    """The public function; its results are right, and it wrote nothing but them."""
    norm = options.get("norm")
    x_out, y_out = (torch.full(x.shape, torch.nan, dtype=x.dtype) if there else None for there in (slots, norm))
    affine = [] if norm is None else [norm.weight, norm.bias]
    read = [x, *parts(slots), *parts([*options["gates"], options.get("shift"), options.get("scale"), *affine])]
    kernels.lockstep_forget()
    named = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in read}
    for t in parts([x_out, y_out]):
        kernels.lockstep_buffer(t.data_ptr(), t.nbytes, 1)
    for begin, size in named.items():
        kernels.lockstep_buffer(begin, size, 0)
    broadcast_residual_out(x, slots, x_out=x_out, y_out=y_out, **options, backend="cuda")
    assert_rounded_once((x if x_out is None else x_out, y_out), (x, slots), options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kinds", ["", "m", "i", "mi", "fim", *LINES])
def test_every_option_comes_to_its_place(kernels, mode, kinds, norm):
    if kinds or norm:
        for affine in (True, False):
            (x, slots), options = call((2, 3, 136), kinds, norm, torch.bfloat16, affine=affine, device="cpu")
            run(kernels, x, slots, **options)


@pytest.mark.parametrize("only", ["shift", "scale"])
def test_shift_or_scale_alone(kernels, mode, only):
    draw = draws(torch.float16)
    run(kernels, draw(2, 3, 136), [], gates=[], norm=Norm(), **{only: draw(2, 1, 136)})


@pytest.mark.parametrize("shape", [(152,), (2, 1, 1, 152), (1, 3, 1, 152), (2, 3, 4, 152), (4, 152), (3, 1, 152)])
def test_what_is_broadcast(kernels, mode, shape):
    draw = draws(torch.float32, 1)
    x, slot = draw(2, 3, 4, 152), draw(2, 3, 4, 152)
    run(kernels, x, [slot], gates=[draw(*shape)], norm=Norm("rms"), shift=draw(*shape), scale=draw(152))


def test_any_strides_and_any_number_of_dimensions(kernels, mode):
    draw = draws(torch.bfloat16, 2)
    nothing = {"gates": [None], "norm": Norm()}
    run(kernels, poisoned(draw(2, 5, 136)), [draw(5, 2, 136).transpose(0, 1)], **nothing)
    run(kernels, draw(136), [draw(136)], **nothing)
    run(kernels, draw(2, 3, 2, 5, 136).permute(3, 1, 0, 2, 4), [draw(5, 3, 2, 2, 136)], **nothing)
    run(kernels, draw(1, 1, 1, 1, 40), [draw(1, 1, 1, 1, 40)], **nothing)


def test_without_tokens_nothing_is_launched(kernels, mode):
    x = torch.empty(0, 7, 136)
    out, y = broadcast_residual(x, [x], norm=Norm(), backend="cuda")
    assert out.shape == y.shape == x.shape


X, G = draws()(2, 3, 136), draws(seed=1)(2, 1, 136)
ONE, ROOM = torch.tensor(1.0), torch.zeros(1000)
EIGHT = Quantized(torch.zeros(2, 3, 136, dtype=torch.int8), torch.zeros(2, 3, 2))


@pytest.mark.parametrize(
    "wrong",
    [
        {"slots": [X[:1]]},
        {"slots": [X.half()]},
        {"slots": [X.transpose(0, 1)]},
        {"slots": [X.to("meta")]},
        {"slots": [Quantized(EIGHT.data, EIGHT.scale[..., :1])]},
        {"slots": [Quantized(EIGHT.data, EIGHT.scale.double())]},
        {"slots": [Quantized(EIGHT.data, EIGHT.scale, 64)]},
        {"slots": [Quantized(X, EIGHT.scale)]},
        {"slots": [EIGHT.data]},
        {"slots": [None]},
        {"slots": X},
        {"slots": [X] * 4, "gates": None},
        {"slots": [], "gates": []},
        {"gates": [G, G]},
        {"gates": G},
        {"gates": [G[..., :8]]},
        {"gates": [torch.cat([G, G], 1)]},
        {"gates": [G.half()]},
        {"gates": [3]},
        {"gates": [G.new_zeros(136, 2).t()[:, None]]},
        {"slots": [Line(X, X, ONE.double())]},
        {"slots": [Line(X, X, torch.ones(2))]},
        {"slots": [Line(X, X, torch.ones(1, 1))]},
        {"slots": [Line(X, X, None)]},
        {"slots": [Line(X, X, 0.5)]},
        {"slots": [Line(X, X[:1], ONE)]},
        {"slots": [Line(X, X.half(), ONE)]},
        {"slots": [Line(X, None, ONE)]},
        {"slots": [Line(None, X, ONE)]},
        {"slots": [Line(X, Quantized(EIGHT.data, EIGHT.scale, 64), ONE)]},
        {"slots": [Line(EIGHT, Quantized(EIGHT.data, EIGHT.scale[..., :1]), ONE)]},
        {"slots": [Line(EIGHT, EIGHT.data, ONE)]},
        {"norm": Norm("batch")},
        {"norm": "layer"},
        {"norm": Norm([])},
        {"norm": Norm(eps=float("nan"))},
        {"norm": Norm(eps=float("inf"))},
        {"norm": Norm(eps=-1.0)},
        {"norm": Norm(eps=10**400)},
        {"norm": Norm("rms", bias=X[0, 0])},
        {"norm": Norm(weight=X[0, 0, :8])},
        {"norm": Norm(weight=X[0])},
        {"norm": Norm(weight=X.new_zeros(136, 2)[:, 0])},
        {"slots": [], "gates": None, "norm": None, "shift": None, "x_out": None, "y_out": None},
        {"norm": None, "y_out": None},
        {"shift": G[..., :8]},
        {"x_out": None},
        {"x_out": X[:, :1].expand(2, 3, 136)},
        {"x_out": X.half()},
        {"x_out": ROOM[:816].as_strided((2, 3, 136), (3, 1, 1))},
        {"x_out": G.expand(2, 3, 136)},
        {"x_out": torch.zeros(2, 3, 136, requires_grad=True)},
        {"x_out": ROOM[:816].view(2, 3, 136), "y_out": ROOM[8:824].view(2, 3, 136)},
        {"x": ROOM[:816].view(2, 3, 136), "x_out": ROOM[8:824].view(2, 3, 136)},
        {"y_out": X},
        {"slots": [ROOM[:816].view(2, 3, 136)], "x_out": ROOM[:816].view(2, 3, 136)},
        {"gates": [ROOM[64:336].view(2, 1, 136)], "y_out": ROOM[:816].view(2, 3, 136)},
        {"slots": [Quantized(EIGHT.data, ROOM[8:20].view(2, 3, 2))], "y_out": ROOM[:816].view(2, 3, 136)},
        {"slots": [Line(X, ROOM[:816].view(2, 3, 136), ONE)], "y_out": ROOM[:816].view(2, 3, 136)},
        {"slots": [Line(X, X, ROOM[7])], "y_out": ROOM[:816].view(2, 3, 136)},
        {"norm": Norm(bias=ROOM[8:144]), "y_out": ROOM[:816].view(2, 3, 136)},
        {"y_out": torch.empty(2, 3, 136, device="meta")},
        {"x": X[0, 0, 0]},
        {"x": None},
    ],
)
def test_what_is_wrong_is_refused_by_c_and_told_by_python(kernels, wrong):
    kernels.lockstep_forget()  # a launch would fail, and the machine say so
    right = {
        "x": X,
        "slots": [X],
        "gates": [G],
        "norm": Norm(),
        "shift": G,
        "scale": None,
        "x_out": torch.empty_like(X),
    }
    given = right | {"y_out": torch.empty_like(X)} | wrong
    with torch.no_grad(), pytest.raises((TypeError, ValueError)) as told:
        broadcast_residual_out(**given, backend="cuda")
    assert kernels.lockstep_error() == b"", "it was launched"
    assert str(told.value).startswith("broadcast_residual: ")


def test_what_it_cannot_serve_is_refused_with_the_reason(kernels):
    kernels.lockstep_forget()
    for x, message in (
        (torch.zeros(1, 2, 136, dtype=torch.float64), "x is torch.float64; float16, bfloat16 and float32"),
        (torch.zeros(1, 8200), "x has 8200 channels; up to 8192"),
        (torch.zeros(1, 1, 1, 1, 1, 8), "x has 6 dimensions; up to 5"),
        (torch.zeros(1, 1, dtype=torch.bfloat16).expand(2**31, 1), "x has 2147483648 tokens; up to 2147483643"),
    ):
        unchecked = (
            mock.patch.object(BroadcastResidual, "check_outputs"),
            mock.patch("pab_kernels.ops.dispatch.check_apart"),
        )
        with torch.no_grad(), unchecked[0], unchecked[1]:  # one of them is too large to be there
            assert_refuses(BackendError, message, broadcast_residual_out, x, norm=Norm(), y_out=x, backend="cuda")
        assert kernels.lockstep_error() == b"", "it was launched"


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_it_finds_the_overlaps_that_python_finds(kernels, data):
    sizes = data.draw(st.sampled_from([(3, 4), (2, 3, 4), (1, 5, 1), (4, 1)]))
    views = []
    for _ in range(3):
        strides = data.draw(
            st.lists(st.sampled_from([4, 5, 8, 10, 12, 16, 24]), min_size=len(sizes) - 1, max_size=len(sizes) - 1)
        )
        views.append(ROOM.as_strided(sizes, (*strides, 1), data.draw(st.integers(0, 24))))
    x, x_out, y_out = views
    kernels.lockstep_forget()
    slot = torch.zeros(sizes)
    kernels.lockstep_buffer(ROOM.data_ptr(), ROOM.nbytes, 1)
    kernels.lockstep_buffer(slot.data_ptr(), slot.nbytes, 0)
    same = x.data_ptr() == x_out.data_ptr() and all(
        a == b or n < 2 for a, b, n in zip(x.stride(), x_out.stride(), sizes, strict=True)
    )
    refused = overlaps_itself(x_out) or overlaps_itself(y_out) or overlap(x_out, y_out) or overlap(x, y_out)
    refused |= overlap(x, x_out) and not same
    assert cuda.attempt(BroadcastResidual(x, ((slot, None),), Norm()), (x_out, y_out)) is not refused


def test_with_a_gradient_it_is_refused(kernels):
    x = X.clone().requires_grad_()
    assert_refuses(BackendError, "a gradient would be recorded", broadcast_residual, x, [X], backend="cuda")
