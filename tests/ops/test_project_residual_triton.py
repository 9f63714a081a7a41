"""`project_residual` in Triton: accurate, rounded where it says, in one launch, touching nothing but its outputs."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from pab_kernels.ops import BackendError, Quantized, dequantize, project_residual, quantize
from pab_kernels.ops.backend import choose
from pab_kernels.ops.cached_outputs import cached_outputs
from pab_kernels.ops.project_residual import ProjectResidual, reference
from pab_kernels.ops.quantized import FORMATS
from tests.ops.broadcast_residual_cases import draw_slots, slot_in_float64
from tests.ops.tensors import (
    DTYPES,
    HALF,
    KERNEL_DEVICE,
    MANY,
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
from tests.pairs import pairs

pytest.importorskip("triton")

from pab_kernels.ops.project_residual import triton as kernel

STORES = [
    (None, None),
    ("pre_gate", None),
    ("post_gate", None),
    ("pre_gate", torch.int8),
    ("post_gate", torch.float8_e4m3fn),
    ("post_gate", torch.int4),
]


def call(
    shape: tuple[int, ...] = (2, 7, 136),
    kinds: str = "",
    dtype: torch.dtype = torch.bfloat16,
    k: int = 40,
    **options: Any,
) -> tuple[list[Any], dict[str, Any]]:
    """Arguments with a bias and a gate a batch row; the first slot has a gate."""
    draw = draws(dtype, 0, KERNEL_DEVICE)
    row = (shape[0], *(1,) * (len(shape) - 2), shape[-1])
    args = [draw(*shape[:-1], k), draw(shape[-1], k) / k**0.5, draw(shape[-1]), draw(*shape)]
    given: dict[str, Any] = {
        "gate": draw(*row),
        "slots": draw_slots(draw, shape, kinds),
        "gates": [draw(*row) if i == 0 else None for i in range(len(kinds))],
    }
    return args, given | options


def exact(
    a: Tensor, weight: Tensor, bias: Any, x: Tensor, *, gate: Any, slots: Any, gates: Any, store: Any
) -> list[Any]:
    """The mathematics in float64; the new x, and what is stored of it before it is quantised."""
    p = torch.nn.functional.linear(a.double(), weight.double(), None if bias is None else bias.double())
    gated = p if gate is None else gate.double() * p
    total = x.double() + gated
    for slot, slot_gate in zip(slots, gates, strict=True):
        total = total + slot_in_float64(slot) * (1 if slot_gate is None else slot_gate.double())
    return [total, p if store == "pre_gate" else gated]


def call_of(args: list[Any], options: dict[str, Any]) -> ProjectResidual:
    """The call as backends take it."""
    cached = cached_outputs("test", options["slots"], options["gates"], 2)
    return ProjectResidual(*args, options["gate"], options.get("store"), options.get("store_dtype"), cached)


def value(stored: Tensor | Quantized) -> Tensor:
    return dequantize(stored, torch.float32) if isinstance(stored, Quantized) else stored


def check(args: list[Any], options: dict[str, Any], identical: bool = False) -> None:
    """Accurate against float64, and equal to the reference that rounds in the same places but for the order of sums, or
    `identical`."""
    got = project_residual(*args, **options, backend="triton")
    plain = project_residual(*args, **options, backend="reference")
    rounded = reference.rounded_once(call_of(args, options))
    if identical:
        assert_same(got, rounded)
    true = exact(*args, **{name: options.get(name) for name in ("gate", "slots", "gates", "store")})
    assert_accurate(got[0], plain[0], true[0])
    assert all(t.is_contiguous() for t in parts(got))
    if got[1] is None:
        assert plain[1] is None
        return
    assert_accurate(value(got[1]), value(plain[1]), true[1])
    for a, b in zip(parts(got), parts(rounded), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        # Sums in another order, as other processors have them, move a number to the other side of a rounding now and
        # then, no more.
        assert a.dtype == torch.float32 or (a.float() != b.float()).sum() <= max(1, 0.02 * a.numel())


@pytest.mark.parametrize(("dtype", "kinds", "stored"), pairs(DTYPES, ["", "m", "if", "M", "XF", "qQ"], STORES))
def test_it_is_accurate(dtype: torch.dtype, kinds: str, stored: tuple[Any, Any]) -> None:
    store, store_dtype = stored
    check(*call(kinds=kinds, dtype=dtype, store=store, store_dtype=store_dtype))


@pytest.mark.parametrize(("store", "store_dtype"), STORES)
@pytest.mark.parametrize("dtype", HALF)
def test_it_rounds_where_it_says(dtype: torch.dtype, store: Any, store_dtype: Any) -> None:
    """With numbers whose sums are exact in any order the reference that rounds in the same places gives the same
    bits."""
    shape = (2, 65, 200)
    args, options = call(shape, "mm", dtype, 72, store=store, store_dtype=store_dtype)
    generator = torch.Generator().manual_seed(3)

    def draw(*sizes: int) -> Tensor:
        return (torch.randint(-24, 25, sizes, generator=generator) / 8).to(dtype).to(KERNEL_DEVICE)

    args = [draw(*t.shape) for t in args]
    options |= {"gate": draw(2, 1, 200), "slots": [draw(*shape), draw(*shape)], "gates": [draw(2, 1, 200), None]}
    check(args, options, identical=True)


@pytest.mark.parametrize("tokens", [1, 7, 127, MANY])
def test_any_number_of_tokens(tokens: int) -> None:
    check(*call((1, tokens, 136), "i", k=24, store="pre_gate", store_dtype=torch.int8))


@pytest.mark.parametrize("channels", [8, 128, 136, 200, 1152])
@pytest.mark.parametrize("k", [1, 20, 72, 192])
def test_any_width_and_depth(channels: int, k: int) -> None:
    check(*call((1, 5, channels), "f", torch.float16, k, store="post_gate"))


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_every_tile_gives_the_same_numbers(capability: tuple[int, int], rows: int) -> None:
    """At a depth of 1152, with more bands of tiles than one, in fewer programs than tiles."""
    args, options = call((3, 7, 264), "m", k=1152, store="pre_gate")
    chosen = kernel.tile(21, 264, 2, capability, 1 if rows == 128 else 1000)
    assert chosen.rows == rows
    with mock.patch.object(kernel, "tile", lambda *_: chosen):
        check(args, options)


def test_tiles_of_several_bands() -> None:
    check(*call((1, 64 * 9 + 1, 136), k=8, store="pre_gate"))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_ragged_last_group_a_group_of_zeros_and_one_of_infinity(kind: torch.dtype) -> None:
    args, options = call((2, 5, 200), store="pre_gate", store_dtype=kind)
    args[1][:128] = 0
    args[2][:128] = 0
    args[0][..., 0], args[1][-1], args[1][-1, 0], args[2][-1] = (
        1,
        0,
        64,
        -64,
    )  # the last channel is small with its bias alone
    check(args, options)
    stored = project_residual(*args, **options, backend="triton")[1]
    assert (stored.scale[..., : 128 // stored.group] == 0).all() and (value(stored)[..., :128] == 0).all()
    args[2][130] = torch.inf
    assert value(project_residual(*args, **options, backend="triton")[1])[..., 128:].isnan().any(-1).all()


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_is_added_is_the_same_whatever_is_stored(kind: torch.dtype) -> None:
    args, options = call(kinds="m")
    plain = project_residual(*args, **options, backend="triton")[0]
    for store in ("pre_gate", "post_gate"):
        for dtype in (None, kind):
            assert torch.equal(
                project_residual(*args, **options, store=store, store_dtype=dtype, backend="triton")[0], plain
            )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_bias_and_gate_may_be_absent(bias: bool, gated: bool) -> None:
    args, options = call(store="post_gate", store_dtype=torch.int8)
    args[2] = args[2] if bias else None
    check(args, options | ({} if gated else {"gate": None}))


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
def test_gates_broadcast_by_row_frame_or_token(shape: tuple[int, ...]) -> None:
    draw = draws(torch.bfloat16, 1, KERNEL_DEVICE)
    args, options = call((2, 3, 4, 152), "mm", store="post_gate")
    check(args, options | {"gate": draw(*shape), "gates": [draw(2, 1, 1, 152), draw(*shape)]})


def poisoned(t: Tensor, offset: int) -> Tensor:
    """`t` as a view of a larger tensor of NaN: strides that are padded, and NaN on all sides."""
    around = t.new_full((*(n + 2 for n in t.shape[:-1]), t.shape[-1] + 2 * offset), torch.nan)
    inside = around[(*(slice(1, -1) for _ in t.shape[:-1]), slice(offset, -offset))]
    inside.copy_(t)
    return inside


@pytest.mark.parametrize("k", [40, 44])
@pytest.mark.parametrize("offset", [8, 3])
def test_views_with_padded_strides_are_read_in_place(offset: int, k: int) -> None:
    args, options = call(kinds="mm", k=k, store="pre_gate", store_dtype=torch.int8)
    args = [poisoned(t, offset) for t in args]
    options |= {"gate": poisoned(options["gate"], offset), "slots": [poisoned(t, offset) for t in options["slots"]]}
    options["slots"][1] = Quantized(
        *(poisoned(t.float(), offset).to(t.dtype) for t in parts(quantize(options["slots"][1], torch.int8)))
    )
    before = [t.clone() for t in parts([args, options["slots"]])]
    check(args, options)
    for view, kept in zip(parts([args, options["slots"]]), before, strict=True):
        assert torch.equal(view, kept)


def test_operands_in_another_order_of_dimensions_and_expanded_ones() -> None:
    draw = draws(torch.bfloat16, 2, KERNEL_DEVICE)
    args, options = call((2, 5, 136), "mm", store="post_gate")
    args[0], args[3] = draw(5, 2, 40).transpose(0, 1), draw(1, 1, 136).expand(2, 5, 136)
    options["slots"] = [draw(5, 2, 136).transpose(0, 1), draw(2, 1, 136).expand(2, 5, 136)]
    check(args, options | {"gate": draw(5, 136).expand(2, 5, 136)})


@pytest.mark.parametrize(("store", "store_dtype"), STORES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_are_written_whole_and_nothing_around_them(dtype: torch.dtype, store: Any, store_dtype: Any) -> None:
    args, options = call((2, 7, 136), "mi", dtype)
    place, stored, guards = Guarded(2, 7, 136, dtype=dtype, device=KERNEL_DEVICE), None, []
    if store_dtype is not None:
        stored, guards = guarded_quantized(
            2, 7, 136, dtype=store_dtype, group=FORMATS[store_dtype].group, device=KERNEL_DEVICE
        )
    elif store is not None:
        guards = [Guarded(2, 7, 136, dtype=dtype, device=KERNEL_DEVICE)]
        stored = guards[0].tensor
    inputs = [t.clone() for t in parts([args, list(options.values())])]
    given = call_of(args, options | {"store": store, "store_dtype": store_dtype})
    launch("project_residual", "triton", given, place.tensor, stored)
    for guard in (place, *guards):
        guard.assert_written()
    expected = project_residual(*args, **options, store=store, store_dtype=store_dtype, backend="triton")
    assert_same((place.tensor, stored), expected, strides=False)
    for t, kept in zip(parts([args, list(options.values())]), inputs, strict=True):
        assert torch.equal(t.float(), kept.float())


def test_no_tokens_launch_nothing() -> None:
    args, options = call((0, 7, 136), store="pre_gate", store_dtype=torch.int8)
    with mock.patch.object(kernel, "_project_residual_kernel") as launched:
        x, stored = project_residual(*args, **options, backend="triton")
    assert x.shape == stored.shape == (0, 7, 136) and not launched.mock_calls


def test_one_launch_and_no_copies() -> None:
    args, options = call(kinds="mm", store="pre_gate", store_dtype=torch.int8)
    args[0], args[3], options["slots"][0] = (
        t.transpose(0, 1).contiguous().transpose(0, 1) for t in (args[0], args[3], options["slots"][0])
    )
    original, seen = kernel._project_residual_kernel, []

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *a, **k: (seen.append([t.data_ptr() for t in (*a[:4], *a[8])]), original[grid](*a, **k))

    with mock.patch.object(kernel, "_project_residual_kernel", Counting()):
        project_residual(*args, **options, backend="triton")
    assert seen == [[t.data_ptr() for t in (*args, *options["slots"])]]


def test_it_is_deterministic() -> None:
    args, options = call((3, 50, 264), "mi", k=200, store="post_gate", store_dtype=torch.float8_e4m3fn)
    assert_same(*(project_residual(*args, **options, backend="triton") for _ in range(2)))


@pytest.mark.parametrize(("kinds", "store", "store_dtype"), [("mi", "pre_gate", torch.int8), ("", None, None)])
def test_registered_fake_and_compiled(kinds: str, store: Any, store_dtype: Any) -> None:
    args, options = call(kinds=kinds, store=store, store_dtype=store_dtype)
    arguments = (*call_of(args, options).flatten(), "triton")
    opcheck(torch.ops.pab_kernels.project_residual.default, arguments)
    result, called = called_when_compiled(lambda *a: project_residual(*a, **options, backend="triton"), *args)
    assert_same(result, project_residual(*args, **options, backend="triton"))
    assert called == ["pab_kernels.project_residual"]


def test_what_it_cannot_serve_is_refused_with_the_reason() -> None:
    def refused(message: str, a: Tensor, weight: Tensor, x: Tensor) -> None:
        assert_refuses(BackendError, message, project_residual, a, weight, None, x, backend="triton")

    x, weight = torch.zeros(1, 2, 136, device=KERNEL_DEVICE), torch.zeros(136, 136, device=KERNEL_DEVICE)
    refused("x is torch.float64; float16, bfloat16 and float32", x.double(), weight.double(), x.double())
    refused("a has no channels; one or more", x[..., :0], weight[:, :0], x)
    many = torch.zeros(1, 136, device=KERNEL_DEVICE).expand(2**31, 136)
    refused("x has 2147483648 tokens; up to", many, weight, many)
    refused("run on CUDA devices", x.to("meta"), weight.to("meta"), x.to("meta"))


def test_auto_on_a_cpu_stays_the_reference() -> None:
    x = torch.zeros(1, 136)
    assert choose("project_residual", "auto", ProjectResidual(x, x, None, x)) == "reference"


def test_tiles_are_halved_where_there_are_too_few_for_the_device() -> None:
    assert kernel.tile(47700, 1152, 2, (9, 0), 132) == kernel.Tile(128, 64, 8, 3, 1, True)
    assert kernel.tile(512, 1152, 2, (9, 0), 132) == kernel.Tile(64, 64, 4, 3, 1, True)
