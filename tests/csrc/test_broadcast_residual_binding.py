"""The unmodified binding of broadcast_residual to torch, compiled for CPU tensors around the kernel under the lockstep machine: what the
public function does with `backend="cuda"`, all the way down."""

from __future__ import annotations

import ctypes
from importlib import import_module
from unittest import mock

import pytest
import torch
from torch import Tensor

from pab_kernels.ops import BackendError, Norm, Quantized, broadcast_residual, broadcast_residual_out
from tests.csrc.binding import bound
from tests.ops.broadcast_residual_cases import NORMS, assert_rounded_once, call, poisoned
from tests.ops.tensors import assert_refuses, draws, parts

cuda = import_module("pab_kernels.ops.broadcast_residual.cuda")


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """The machine, under the binding that is loaded into torch."""
    return bound("broadcast_residual", tmp_path_factory.mktemp("binding"), optimised=False)


@pytest.fixture
def kernels(machine, monkeypatch):
    monkeypatch.setattr(cuda, "refuse", lambda t: None)
    return machine


@pytest.fixture(params=["checked in Python", "checked in C++"])
def mode(request, monkeypatch):
    """Both ways to the kernel; neither may fall back to the other."""
    in_cpp = request.param == "checked in C++"
    operation = import_module("pab_kernels.ops.broadcast_residual")
    if in_cpp:
        monkeypatch.setattr(operation, "_check", lambda *args: pytest.fail("C++ did not take the call"))
    else:
        monkeypatch.setattr(cuda, "attempt", lambda *args: pytest.fail("the call was not checked in Python"))
    with torch.set_grad_enabled(not in_cpp):
        yield


def run(kernels: ctypes.CDLL, x: Tensor, slots: list, **options) -> None:
    """The public function; its results are right, and it wrote nothing but them."""
    norm = options.get("norm")
    x_out, y_out = (torch.full(x.shape, torch.nan, dtype=x.dtype) if there else None for there in (slots, norm))
    affine = [] if norm is None else [norm.weight, norm.bias]
    read = [x, *parts(slots), *parts([*options["gates"], *options["weights"], options.get("shift"), options.get("scale"), *affine])]
    kernels.lockstep_forget()
    named = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in read}
    for t in parts([x_out, y_out]):
        kernels.lockstep_buffer(t.data_ptr(), t.nbytes, 1)
    for begin, size in named.items():
        kernels.lockstep_buffer(begin, size, 0)
    broadcast_residual_out(x, slots, x_out=x_out, y_out=y_out, **options, backend="cuda")
    assert_rounded_once((x if x_out is None else x_out, y_out), (x, slots), options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kinds", ["", "m", "i", "mi", "fim"])
def test_every_option_comes_to_its_place(kernels, mode, kinds, norm):
    if kinds or norm:
        for affine in (True, False):
            (x, slots), options = call((2, 3, 136), kinds, norm, torch.bfloat16, affine=affine, device="cpu")
            run(kernels, x, slots, **options)


@pytest.mark.parametrize("only", ["shift", "scale"])
def test_shift_or_scale_alone(kernels, mode, only):
    draw = draws(torch.float16)
    run(kernels, draw(2, 3, 136), [], gates=[], weights=[], norm=Norm(), **{only: draw(2, 1, 136)})


@pytest.mark.parametrize("shape", [(152,), (2, 1, 1, 152), (1, 3, 1, 152), (2, 3, 4, 152), (4, 152), (3, 1, 152)])
def test_what_is_broadcast(kernels, mode, shape):
    draw = draws(torch.float32, 1)
    x, slot = draw(2, 3, 4, 152), draw(2, 3, 4, 152)
    run(kernels, x, [slot], gates=[draw(*shape)], weights=[torch.tensor([0.5])], norm=Norm("rms"), shift=draw(*shape), scale=draw(152))


def test_any_strides_and_any_number_of_dimensions(kernels, mode):
    draw = draws(torch.bfloat16, 2)
    nothing = {"gates": [None], "weights": [None], "norm": Norm()}
    run(kernels, poisoned(draw(2, 5, 136)), [draw(5, 2, 136).transpose(0, 1)], **nothing)
    run(kernels, draw(136), [draw(136)], **nothing)
    run(kernels, draw(2, 3, 2, 5, 136).permute(3, 1, 0, 2, 4), [draw(5, 3, 2, 2, 136)], **nothing)
    run(kernels, draw(1, 1, 1, 1, 40), [draw(1, 1, 1, 1, 40)], **nothing)


def test_without_tokens_nothing_is_launched(kernels, mode):
    x = torch.empty(0, 7, 136)
    out, y = broadcast_residual(x, [x], norm=Norm(), backend="cuda")
    assert out.shape == y.shape == x.shape


X, G = draws()(2, 3, 136), draws(seed=1)(2, 1, 136)
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
        {"weights": [torch.tensor(1.0).double()]},
        {"weights": [torch.ones(2)]},
        {"weights": [torch.ones(1, 1)]},
        {"norm": Norm("batch")},
        {"norm": "layer"},
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
        {"y_out": torch.empty(2, 3, 136, device="meta")},
        {"x": X[0, 0, 0]},
        {"x": None},
    ],
)
def test_what_is_wrong_is_refused_by_c_and_told_by_python(kernels, wrong):
    kernels.lockstep_forget()  # a launch would fail, and the machine say so
    right = {"x": X, "slots": [X], "gates": [G], "weights": None, "norm": Norm(), "shift": G, "scale": None, "x_out": torch.empty_like(X)}
    given = right | {"y_out": torch.empty_like(X)} | wrong
    assert cuda.attempt(**given) is False and kernels.lockstep_error() == b""
    with torch.no_grad(), pytest.raises((TypeError, ValueError)) as told:
        broadcast_residual_out(**given, backend="cuda")
    assert str(told.value).startswith("broadcast_residual: ")


def test_what_it_cannot_serve_is_refused_with_the_reason(kernels):
    kernels.lockstep_forget()
    for x, message in (
        (torch.zeros(1, 2, 136, dtype=torch.float64), "x is torch.float64; float16, bfloat16 and float32"),
        (torch.zeros(1, 8200), "x has 8200 channels; up to 8192"),
        (torch.zeros(1, 1, 1, 1, 1, 8), "x has 6 dimensions; up to 5"),
        (torch.zeros(1, 1, dtype=torch.bfloat16).expand(2**31, 1), "x has 2147483648 tokens; up to 2147483643"),
    ):
        with torch.no_grad(), mock.patch("pab_kernels.ops.broadcast_residual.check_output"):  # one of them is too large to be there
            assert_refuses(BackendError, message, broadcast_residual_out, x, norm=Norm(), y_out=x, backend="cuda")
        assert kernels.lockstep_error() == b"", "it was launched"


def test_with_a_gradient_it_is_refused(kernels):
    x = X.clone().requires_grad_()
    assert_refuses(BackendError, "a gradient would be recorded", broadcast_residual, x, [X], backend="cuda")
