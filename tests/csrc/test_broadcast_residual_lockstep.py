"""The unmodified kernel of broadcast_residual on the CPU: the bits of the reference that rounds where kernels do, but
for the order of the norm's sums; every element written once, no other touched."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels.ops import Line, Norm, Quantized, quantize
from tests.csrc.machine import NUMBERS, Machine, library
from tests.ops.broadcast_residual_cases import (
    LINES,
    NORMS,
    assert_right,
    call,
    exact,
    move_slot,
    poisoned,
    rounded_once,
)
from tests.ops.tensors import DTYPES, EIGHT_BITS, assert_accurate, draws, parts

OPERANDS, DIMS = 20, 4


class Arguments(ctypes.Structure):
    """`BroadcastResidualArguments` of csrc/broadcast_residual.h."""

    _fields_ = [
        ("operands", ctypes.c_void_p * OPERANDS),
        ("strides", ctypes.c_int64 * DIMS * OPERANDS),
        ("sizes", ctypes.c_int64 * DIMS),
        ("dims", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("weights", ctypes.c_void_p * 3),
        ("norm_weight", ctypes.c_void_p),
        ("norm_bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("slots", ctypes.c_int),
        ("norm", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("slot_dtypes", ctypes.c_int * 6),
    ]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return library("broadcast_residual.cu", tmp_path_factory.mktemp("lockstep"), ["broadcast_residual_plan.cpp"])


def aligned(t: Tensor, offset: int = 0) -> Tensor:
    """A copy so many elements beyond a multiple of 16 bytes, with room around it."""
    buffer = torch.zeros(t.numel() + 64 + offset).to(t.dtype)
    begin = -buffer.data_ptr() % 16 // buffer.element_size() + offset
    return buffer[begin : begin + t.numel()].view(t.shape).copy_(t)


def launch(
    kernels: Any, args: Any, options: dict[str, Any], outputs: tuple[Tensor | None, Tensor | None], order: bool = False
) -> Any:
    """The kernel on these tensors where they are, into `outputs`; it must write them, once, and nothing else."""
    (x, slots), norm = args, options.get("norm")
    lines = [s if isinstance(s, Line) else Line(s, None, None) for s in slots] + [Line(None, None, None)] * (
        3 - len(slots)
    )
    held = [line.newest for line in lines] + [line.before for line in lines]
    data, scales = zip(*((s.data, s.scale) if isinstance(s, Quantized) else (s, None) for s in held), strict=True)
    weights = [line.weight for line in lines]
    operands = [
        x,
        *outputs,
        options.get("scale"),
        options.get("shift"),
        *data,
        *options["gates"],
        *[None] * (3 - len(slots)),
        *scales,
    ]
    given = Arguments(
        channels=x.shape[-1], slots=len(slots), dtype=NUMBERS[x.dtype], norm=NORMS.index(norm and norm.kind)
    )
    for i, t in enumerate(operands):
        given.operands[i] = None if t is None else t.data_ptr()
    for i, slot in enumerate(data):
        given.slot_dtypes[i] = 0 if slot is None else NUMBERS[slot.dtype]
    for i, weight in enumerate(weights):
        given.weights[i] = None if weight is None else weight.data_ptr()
    dims = [dim for dim in range(x.ndim - 1) if x.shape[dim] != 1][::-1] or [0]
    given.dims = len(dims)
    for place, dim in enumerate(dims):
        given.sizes[place] = x.shape[dim]
        for i, t in enumerate(operands):
            if t is not None and (own := dim - x.ndim + t.ndim) >= 0 and t.shape[own] != 1:
                given.strides[i][place] = t.stride(own)
    affine = [] if norm is None else [t for t in (norm.weight, norm.bias) if t is not None]
    if norm is not None:
        given.eps = norm.eps
        given.norm_weight, given.norm_bias = (None if t is None else t.data_ptr() for t in (norm.weight, norm.bias))
    written = [t for t in outputs if t is not None]
    read = [t for t in (*operands, *weights, *affine) if t is not None and all(t is not w for w in written)]
    Machine(kernels, order).launch("pab_broadcast_residual", given, read, written)
    return x if outputs[0] is None else outputs[0], outputs[1]


def run(kernels: Any, args: Any, options: dict[str, Any], offset: int = 0, order: bool = False) -> None:
    """All tensors aligned, or `offset` elements beyond that; the results are right, the new x bit for bit."""

    def place(value: Any) -> Any:
        return aligned(value, offset) if isinstance(value, Tensor) else value

    def outputs() -> Tensor:
        return poisoned(args[0]) if offset == 8 else aligned(torch.full_like(args[0], torch.nan), offset)

    placed = (place(args[0]), [move_slot(slot, place) for slot in args[1]])
    given = {
        name: [place(t) for t in value] if isinstance(value, list) else place(value) for name, value in options.items()
    }
    if (norm := options.get("norm")) is not None:
        given["norm"] = Norm(norm.kind, place(norm.weight), place(norm.bias), norm.eps)
    outs = outputs() if args[1] else None, None if norm is None else outputs()
    got = launch(kernels, placed, given, outs, order)
    assert_right(got, args, options)
    assert torch.equal(got[0], rounded_once(*args, **options)[0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kinds", ["", "m", "i", "f", "mi", "fim", "mmm", *LINES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option(kernels, dtype, kinds, norm):
    if kinds or norm:
        for channels, offset in ((136, 0), (136, 1), (137, 0)):
            run(kernels, *call((2, 3, channels), kinds, norm, dtype, affine=channels == 136, device="cpu"), offset)


@pytest.mark.parametrize(
    "channels", [1, 7, 8, 128, 512, 520, 1152, 1536, 1920, 2304, 3072, 4096, 5120, 6000, 8191, 8192]
)
def test_every_width(kernels, channels):
    for kinds, norm, dtype in (
        ("i", "layer", torch.bfloat16),
        ("mfm", "rms", torch.float16),
        ("", "layer", torch.float32),
        ("MI", "rms", torch.bfloat16),
    ):
        run(kernels, *call((1, 2, channels), kinds, norm, dtype, device="cpu"))


@pytest.mark.parametrize("channels", [1152, 1536])
def test_the_order_of_threads_changes_nothing(kernels, channels):
    args, options = call((2, 3, channels), "mi", "layer", torch.bfloat16, device="cpu")
    results = []
    for order in (False, True):
        outs = aligned(torch.full_like(args[0], torch.nan)), aligned(torch.full_like(args[0], torch.nan))
        results.append(launch(kernels, args, options, outs, order))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("tokens", [1, 4, 5, 9])
def test_any_number_of_tokens(kernels, tokens):
    run(kernels, *call((1, tokens, 264), "f", "layer", torch.float16, device="cpu"))


@pytest.mark.parametrize(
    "shape", [(152,), (2, 1, 1, 152), (1, 3, 1, 152), (2, 3, 1, 152), (2, 3, 4, 152), (4, 152), (1, 1, 4, 152)]
)
def test_gate_shift_and_scale_broadcast_by_row_frame_or_token(kernels, shape):
    draw = draws(torch.bfloat16, 1)
    x, slot = draw(2, 3, 4, 152), draw(2, 3, 4, 152)
    run(kernels, (x, [slot]), {"gates": [draw(*shape)], "norm": Norm(), "shift": draw(*shape), "scale": draw(152)})


@pytest.mark.parametrize("by", [8, 3])
def test_views_are_read_and_written_in_place(kernels, by):
    (x, slots), options = call((2, 5, 136), "mi", "layer", torch.bfloat16, device="cpu")
    x, *rest = (
        poisoned(t)[..., by - 8 : by - 8 or None] if by == 8 else poisoned(t)
        for t in (x, options["shift"], options["scale"])
    )
    options |= {"shift": rest[0], "scale": rest[1]}
    turned = Quantized(slots[1].data.transpose(0, 1).contiguous().transpose(0, 1), slots[1].scale)
    outs = [torch.full((5, 2, 136 + by), torch.nan, dtype=torch.bfloat16)[..., :136].transpose(0, 1) for _ in range(2)]
    assert_right(launch(kernels, (x, [slots[0], turned]), options, tuple(outs)), (x, [slots[0], turned]), options)


def test_x_may_be_written_in_place(kernels):
    (x, slots), options = call((2, 3, 136), "mi", "layer", torch.bfloat16, device="cpu")
    before, y = x.clone(), torch.full_like(x, torch.nan)
    assert_right(launch(kernels, (x, slots), options, (x, y)), (before, slots), options)


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_of_zeros_a_ragged_one_and_what_is_not_finite(kernels, dtype, kind):
    (x, _), options = call((2, 5, 200), "i", None, dtype, device="cpu")
    values = draws(dtype, 5)(2, 5, 200)
    values[0, 0, :128] = 0
    run(kernels, (x, [quantize(values, kind)]), options)
    x[1, 1, 3], x[1, 2, 4] = torch.nan, torch.inf
    values[0, 1, 150] = torch.nan
    slot, outs = quantize(values, kind), torch.full_like(x, torch.nan)
    expected = rounded_once(x, [slot], **options)[0]
    launch(kernels, (x, [slot]), options, (outs, None))
    assert torch.equal(outs.isnan(), expected.isnan()) and torch.equal(outs.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_on_a_line_is_given_back_as_it_is(kernels, dtype):
    c, x, weight = torch.full((2, 136), 4e4, dtype=dtype), torch.zeros(2, 136, dtype=dtype), torch.tensor(3 / 4)
    values = draws(dtype, 7)(2, 136)
    for newest, gates in ((c, [None]), (values, [None]), (c, [None, torch.full((136,), 2**-8, dtype=dtype), None])):
        lines = [Line(newest, newest.clone(), weight)] * len(gates)
        out = torch.full_like(x, torch.nan)
        launch(kernels, (x if len(gates) == 1 else -c, lines), {"gates": gates}, (out, None))
        assert torch.equal(out, newest if len(gates) == 1 else c + 2**-8 * c)


def test_the_mean_does_not_swallow_the_variance(kernels):
    """Two passes: numbers far from 0 that hardly differ."""
    x = 1000 + draws(torch.float32)(3, 1152)
    options = {"gates": [], "norm": Norm()}
    y = launch(kernels, (x, []), options, (None, torch.full_like(x, torch.nan)))[1]
    assert_accurate(y, torch.nn.functional.layer_norm(x, (1152,), eps=1e-6), exact(x, [], **options)[1])


def test_what_the_planner_refuses_is_not_launched(kernels):
    x = torch.zeros(2, 8193)
    given = Arguments(channels=8193, dims=1, norm=1)
    given.operands[0] = given.operands[2] = x.data_ptr()
    given.sizes[0] = 2
    assert kernels.pab_broadcast_residual(ctypes.byref(given), None) == 1  # cudaErrorInvalidValue
    assert parts([x])[0].sum() == 0
