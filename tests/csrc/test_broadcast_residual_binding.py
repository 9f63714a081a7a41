"""The unmodified binding of broadcast_residual to torch, compiled for CPU tensors around the kernel under the lockstep
machine: what the public function does with `backend="cuda"`, all the way down."""

from __future__ import annotations

import ctypes
from importlib import import_module
from unittest import mock

import pytest
import torch
from torch import Tensor

from pab_kernels.ops import BackendError, Line, Norm, Quantized, broadcast_residual
from pab_kernels.ops.broadcast_residual import BroadcastResidual
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


def allocating(*outputs: Tensor | None):
    """The operation writes into these outputs instead of new ones."""
    return mock.patch.object(BroadcastResidual, "empty", lambda call: outputs)


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
    with allocating(x_out, y_out):
        broadcast_residual(x, slots, **options, backend="cuda")
    assert_rounded_once((x if x_out is None else x_out, y_out), (x, slots), options)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kinds", ["", "m", "i", "mi", "fim", *LINES])
def test_every_option_comes_to_its_place(kernels, kinds, norm):
    if kinds or norm:
        for affine in (True, False):
            (x, slots), options = call((2, 3, 136), kinds, norm, torch.bfloat16, affine=affine, device="cpu")
            run(kernels, x, slots, **options)


@pytest.mark.parametrize("only", ["shift", "scale"])
def test_shift_or_scale_alone(kernels, only):
    draw = draws(torch.float16)
    run(kernels, draw(2, 3, 136), [], gates=[], norm=Norm(), **{only: draw(2, 1, 136)})


@pytest.mark.parametrize("shape", [(152,), (2, 1, 1, 152), (1, 3, 1, 152), (2, 3, 4, 152), (4, 152), (3, 1, 152)])
def test_what_is_broadcast(kernels, shape):
    draw = draws(torch.float32, 1)
    x, slot = draw(2, 3, 4, 152), draw(2, 3, 4, 152)
    run(kernels, x, [slot], gates=[draw(*shape)], norm=Norm("rms"), shift=draw(*shape), scale=draw(152))


def test_any_strides_and_any_number_of_dimensions(kernels):
    draw = draws(torch.bfloat16, 2)
    nothing = {"gates": [None], "norm": Norm()}
    run(kernels, poisoned(draw(2, 5, 136)), [draw(5, 2, 136).transpose(0, 1)], **nothing)
    run(kernels, draw(136), [draw(136)], **nothing)
    run(kernels, draw(2, 3, 2, 5, 136).permute(3, 1, 0, 2, 4), [draw(5, 3, 2, 2, 136)], **nothing)
    run(kernels, draw(1, 1, 1, 1, 40), [draw(1, 1, 1, 1, 40)], **nothing)


def test_without_tokens_nothing_is_launched(kernels):
    x = torch.empty(0, 7, 136)
    out, y = broadcast_residual(x, [x], norm=Norm(), backend="cuda")
    assert out.shape == y.shape == x.shape


X, G = draws()(2, 3, 136), draws(seed=1)(2, 1, 136)
ONE = torch.tensor(1.0)
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
        {"slots": [], "gates": None, "norm": None, "shift": None},
        {"norm": None},
        {"shift": G[..., :8]},
        {"x": X[0, 0, 0]},
        {"x": None},
    ],
)
def test_what_is_wrong_is_told_by_python_and_refused_by_c(kernels, wrong):
    kernels.lockstep_forget()  # a launch would fail, and the machine say so
    given = {"x": X, "slots": [X], "gates": [G], "norm": Norm(), "shift": G, "scale": None} | wrong
    with torch.no_grad(), pytest.raises((TypeError, ValueError)) as told:
        broadcast_residual(**given, backend="cuda")
    assert str(told.value).startswith("broadcast_residual: ")
    slots, gates = given["slots"], given["gates"]
    seen = not any(
        word in str(told.value) for word in ("group", "meta")
    )  # C++ is not given the group, nor meta tensors
    if seen and isinstance(slots, list) and isinstance(gates, list) and len(slots) == len(gates):
        added = tuple(zip(slots, gates, strict=True))
        call = BroadcastResidual(given["x"], added, given["norm"], given["shift"], given["scale"])
        with torch.no_grad(), pytest.raises((AttributeError, KeyError, OverflowError, RuntimeError, TypeError)):
            cuda.launch(call, (torch.empty_like(X), torch.empty_like(X)))
    assert kernels.lockstep_error() == b"", "it was launched"


@pytest.mark.parametrize(
    "wrong",
    [
        {"x_out": None},
        {"x_out": X[:1]},
        {"x_out": X.half()},
        {"x_out": X.transpose(0, 1)},
        {"x_out": X.new_zeros(2, 136, 3).mT},
        {"y_out": None},
    ],
)
def test_an_output_that_does_not_fit_is_not_written(kernels, wrong):
    kernels.lockstep_forget()
    outputs = {"x_out": torch.empty_like(X), "y_out": torch.empty_like(X)} | wrong
    with torch.no_grad(), pytest.raises(RuntimeError, match="broadcast_residual: a "):
        cuda.launch(BroadcastResidual(X, ((X, None),), Norm()), tuple(outputs.values()))
    with torch.no_grad(), pytest.raises(RuntimeError, match="a place no result"):
        cuda.launch(BroadcastResidual(X, (), Norm()), (torch.empty_like(X), torch.empty_like(X)))
    assert kernels.lockstep_error() == b"", "it was launched"


def test_what_it_cannot_serve_is_refused_with_the_reason(kernels):
    kernels.lockstep_forget()
    for x, message in (
        (torch.zeros(1, 2, 136, dtype=torch.float64), "x is torch.float64; float16, bfloat16 and float32"),
        (torch.zeros(1, 8200), "x has 8200 channels; up to 8192"),
        (torch.zeros(1, 1, 1, 1, 1, 8), "x has 6 dimensions; up to 5"),
        (torch.zeros(1, 1, dtype=torch.bfloat16).expand(2**31, 1), "x has 2147483648 tokens; up to 2147483643"),
    ):
        with torch.no_grad(), allocating(None, x):  # one of them is too large to be there
            assert_refuses(BackendError, message, broadcast_residual, x, norm=Norm(), backend="cuda")
        assert kernels.lockstep_error() == b"", "it was launched"


def test_with_a_gradient_it_is_refused(kernels):
    x = X.clone().requires_grad_()
    assert_refuses(BackendError, "a gradient would be recorded", broadcast_residual, x, [X], backend="cuda")
