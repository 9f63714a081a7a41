"""`broadcast_residual` in Triton: accurate, rounded where it says, in one launch, touching nothing but its outputs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from pab_kernels.ops import BackendError, Norm, broadcast_residual, quantize
from pab_kernels.ops.backend import choose
from pab_kernels.ops.broadcast_residual import BroadcastResidual
from tests.ops.broadcast_residual_cases import LINES, NORMS, call, call_of, poisoned
from tests.ops.broadcast_residual_cases import check as check_backend
from tests.ops.tensors import (
    DTYPES,
    KERNEL_DEVICE,
    MANY,
    QUANTISED,
    Guarded,
    assert_refuses,
    assert_same,
    called_when_compiled,
    draws,
    launch,
    opcheck,
    parts,
)
from tests.pairs import pairs

pytest.importorskip("triton")

from pab_kernels.ops.broadcast_residual import triton as kernel


def check(args: Any, options: dict[str, Any]) -> None:
    check_backend(args, options, "triton")


@pytest.mark.parametrize(
    ("dtype", "kinds", "norm"),
    pairs(DTYPES, ["m", "mi", "fim", "qQ", *LINES], NORMS)
    + [(dtype, "", norm) for dtype in DTYPES for norm in NORMS[1:]],
)
def test_it_is_accurate(dtype: torch.dtype, kinds: str, norm: str | None) -> None:
    check(*call((2, 7, 136), kinds, norm, dtype))


@pytest.mark.parametrize("channels", [8, 128, 1152, 1536, 1920, 2304, 3072, 5120, 8192])
def test_any_width(channels: int) -> None:
    check(*call((1, 3, channels), "mi", "layer", torch.bfloat16))


@pytest.mark.parametrize("tokens", [1, 7, 127, MANY])
def test_any_number_of_tokens(tokens: int) -> None:
    check(*call((1, tokens, 136 if tokens > 100 else 1152), "f", "layer", torch.bfloat16, affine=False))


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_ragged_last_group_and_a_group_of_zeros(kind: torch.dtype) -> None:
    (x, _), options = call((2, 5, 200), "i", None, torch.float16)
    values = draws(torch.float16, 5, KERNEL_DEVICE)(2, 5, 200)
    values[0, 0, :128] = 0
    check((x, [quantize(values, kind)]), options)


GATE_SHAPES = [
    (152,),
    (2, 1, 1, 152),
    (1, 3, 1, 152),
    (2, 3, 1, 152),
    (2, 3, 4, 152),
    (4, 152),
    (3, 1, 152),
    (1, 1, 4, 152),
]


@pytest.mark.parametrize("shape", GATE_SHAPES)
def test_gate_shift_and_scale_broadcast_by_row_frame_or_token(shape: tuple[int, ...]) -> None:
    draw = draws(torch.bfloat16, 1, KERNEL_DEVICE)
    x, slot = draw(2, 3, 4, 152), draw(2, 3, 4, 152)
    options = {"gates": [draw(*shape)], "norm": Norm("layer"), "shift": draw(*shape), "scale": draw(152)}
    check((x, [slot]), options)
    check((x, [slot]), options | {"gates": [None], "scale": draw(*shape), "shift": draw(2, 1, 1, 152)})


@pytest.mark.parametrize("offset", [8, 3])
def test_views_with_padded_strides_are_read_in_place(offset: int) -> None:
    (x, slots), options = call((2, 7, 136), "mm", "layer", torch.bfloat16)
    views = [poisoned(t) for t in (x, *slots)]
    if offset == 3:  # nothing is a multiple of 8 any more
        views = [torch.nn.functional.pad(t, (3, 2))[..., 3:-2] for t in (x, *slots)]
    for key in ("shift", "scale"):
        options[key] = poisoned(options[key])
    before = [t.clone() for t in views]
    check((views[0], views[1:]), options)
    for view, kept in zip(views, before, strict=True):
        assert torch.equal(view, kept)


def test_operands_in_another_order_of_dimensions_and_expanded_ones() -> None:
    draw = draws(torch.bfloat16, 2, KERNEL_DEVICE)
    x, slot = draw(5, 2, 136).transpose(0, 1), draw(1, 1, 136).expand(2, 5, 136)
    check((x, [slot]), {"gates": [draw(2, 1, 136).expand(2, 5, 136)], "norm": Norm("rms")})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_are_written_whole_and_nothing_around_them(dtype: torch.dtype) -> None:
    args, options = call((2, 7, 136), "mi", "layer", dtype)
    places = [Guarded(2, 7, 136, dtype=dtype, device=KERNEL_DEVICE) for _ in range(2)]
    inputs = [t.clone() for t in parts([args, list(options.values())]) if isinstance(t, Tensor)]
    launch("broadcast_residual", "triton", call_of(*args, **options), *(place.tensor for place in places))
    for place, value in zip(places, broadcast_residual(*args, **options, backend="triton"), strict=True):
        place.assert_written()
        assert torch.equal(place.tensor, value)
    for t, kept in zip(
        [t for t in parts([args, list(options.values())]) if isinstance(t, Tensor)], inputs, strict=True
    ):
        assert torch.equal(t.float(), kept.float())


def test_without_slots_x_itself_is_returned() -> None:
    (x, _), options = call((2, 7, 136), "", "layer", torch.bfloat16)
    assert broadcast_residual(x, (), **options, backend="triton")[0] is x


def test_no_tokens_launch_nothing() -> None:
    x = torch.empty(0, 7, 136, device=KERNEL_DEVICE)
    with mock.patch.object(kernel, "_broadcast_residual_kernel") as launched:
        out, y = broadcast_residual(x, [x], norm=Norm(), backend="triton")
    assert out.shape == y.shape == x.shape and not launched.mock_calls


def test_one_launch_and_no_copies() -> None:
    args, options = call((2, 7, 136), "mif", "layer", torch.bfloat16)
    args = (args[0].transpose(0, 1), args[1][:1])
    args[1][0] = args[1][0].transpose(0, 1)
    options |= {"gates": [None], "shift": None, "scale": None}
    original, seen = kernel._broadcast_residual_kernel, []

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *a, **k: (seen.append([t.data_ptr() for t in (a[0], *a[5])]), original[grid](*a, **k))

    with mock.patch.object(kernel, "_broadcast_residual_kernel", Counting()):
        broadcast_residual(*args, **options, backend="triton")
    assert seen == [[args[0].data_ptr(), args[1][0].data_ptr()]]


def test_it_is_deterministic() -> None:
    args, options = call((3, 50, 1152) if KERNEL_DEVICE == "cuda" else (3, 5, 264), "mi", "layer", torch.bfloat16)
    assert_same(
        broadcast_residual(*args, **options, backend="triton"), broadcast_residual(*args, **options, backend="triton")
    )


@pytest.mark.parametrize("kinds, norm", [("", "rms"), ("Mi", "layer"), ("I", None)])
def test_registered_fake_and_compiled(kinds: str, norm: str | None) -> None:
    args, options = call((2, 7, 136), kinds, norm, torch.bfloat16)
    opcheck(torch.ops.pab_kernels.broadcast_residual.default, (*call_of(*args, **options).flatten(), "triton"))
    result, called = called_when_compiled(lambda *a: broadcast_residual(*a, **options, backend="triton"), *args)
    assert_same(result, broadcast_residual(*args, **options, backend="triton"))
    assert called == ["pab_kernels.broadcast_residual"]


def test_what_it_cannot_serve_is_refused_with_the_reason() -> None:
    x = torch.zeros(1, 2, 136, dtype=torch.float64, device=KERNEL_DEVICE)
    assert_refuses(
        BackendError, "x is torch.float64; float16, bfloat16 and float32", broadcast_residual, x, [x], backend="triton"
    )
    wide = torch.zeros(1, 1, 8200, device=KERNEL_DEVICE)
    assert_refuses(BackendError, "x has 8200 channels; up to 8192", broadcast_residual, wide, [wide], backend="triton")
    meta = torch.zeros(1, 2, 136, device="meta")
    assert_refuses(BackendError, "run on CUDA devices", broadcast_residual, meta, [meta], backend="triton")


def test_auto_on_a_cpu_stays_the_reference() -> None:
    assert choose("broadcast_residual", "auto", BroadcastResidual(torch.zeros(1, 136))) == "reference"


def test_chunks_cover_the_channels_without_the_padding_of_a_power_of_two() -> None:
    for channels in range(128, 8193, 8):
        chosen = kernel.tile(channels, 2)
        chunks = -(-channels // chosen.width)
        assert chunks <= 5 and chosen.rows >= 1 and chosen.rows * chosen.width == 32 * 8 * chosen.warps
    assert [-(-c // kernel.tile(c, 2).width) * kernel.tile(c, 2).width for c in (1152, 1536, 2304, 3072, 5120)] == [
        1280,
        1536,
        2560,
        3072,
        5120,
    ]
