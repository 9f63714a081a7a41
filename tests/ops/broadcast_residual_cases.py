"""Calls of `broadcast_residual`, and what a kernel's results must be: accurate against float64, and rounded where the
reference says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pab_kernels.limits import MOST_ADDED
from pab_kernels.ops import Line, Norm, Quantized, broadcast_residual, dequantize, quantize
from pab_kernels.ops.broadcast_residual import BroadcastResidual, reference
from pab_kernels.ops.cached_outputs import cached_outputs
from tests.ops.tensors import KERNEL_DEVICE, assert_accurate, draws

NORMS = (None, "layer", "rms")


LINES = ("M", "F", "mI", "MiF", "XMI")
"""Terms of which some are lines, as `draw_slots` has them."""


def draw_slots(draw: Any, shape: tuple[int, ...], kinds: str, weight: float = 0.7) -> list[Any]:
    """One term a letter: `m` a slot in the model's dtype, `i` in int8, `f` in float8, `q` in 4 bits; `M`, `I`, `F`, `Q`
    a line through two such; `X` a line through an int8 slot and one in the model's dtype."""
    quantised = {"i": torch.int8, "f": torch.float8_e4m3fn, "q": torch.int4}
    made = {"m": lambda t: t} | {kind: partial(quantize, dtype=dtype) for kind, dtype in quantised.items()}
    slots: list[Any] = []
    for kind in kinds:
        newest = draw(*shape)
        if kind.islower():
            slots.append(made[kind](newest))
            continue
        reads = "im" if kind == "X" else 2 * kind.lower()
        values = [made[read](t) for read, t in zip(reads, (newest, draw(*shape)), strict=True)]
        slots.append(Line(*values, torch.tensor(weight, device=newest.device)))
    return slots


def move_slot(slot: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """A slot or a line, each tensor moved; scales and weights stay."""
    if isinstance(slot, Line):
        return Line(move_slot(slot.newest, move), move_slot(slot.before, move), slot.weight)
    return replace(slot, data=move(slot.data)) if isinstance(slot, Quantized) else move(slot)


def slot_in_float64(slot: Any) -> Tensor:
    """The value of a slot or a line."""
    if isinstance(slot, Line):
        newest, before = slot_in_float64(slot.newest), slot_in_float64(slot.before)
        return newest + slot.weight.double() * (newest - before)
    return dequantize(slot, torch.float64) if isinstance(slot, Quantized) else slot.double()


def call(
    shape: tuple[int, ...],
    kinds: str,
    norm: str | None,
    dtype: torch.dtype,
    affine: bool = True,
    seed: int = 0,
    device: str = KERNEL_DEVICE,
) -> tuple[Any, dict]:
    """Arguments with a gate, scale and shift a batch row, by turns."""
    draw = draws(dtype, seed, device)
    row = (shape[0], *(1,) * (len(shape) - 2), shape[-1])
    options: dict[str, Any] = {"gates": [draw(*row) if i != 1 else None for i in range(len(kinds))]}
    if norm:
        weight, bias = (draw(shape[-1]), draw(shape[-1]) if norm == "layer" else None) if affine else (None, None)
        options |= {"norm": Norm(norm, weight, bias, 1e-5), "shift": draw(*row), "scale": draw(*row)}
    return (draw(*shape), draw_slots(draw, shape, kinds)), options


def poisoned(t: Tensor) -> Tensor:
    """`t` as a view of a larger tensor of NaN: strides that are padded, and NaN on all sides."""
    around = t.new_full((*(n + 2 for n in t.shape[:-1]), t.shape[-1] + 16), torch.nan)
    inside = around[(*(slice(1, -1) for _ in t.shape[:-1]), slice(8, -8))]
    inside.copy_(t)
    return inside


def exact(
    x: Tensor, slots: list[Any], *, gates: Any, norm: Any = None, shift: Any = None, scale: Any = None
) -> list[Any]:
    """The mathematics in float64; y from the x that was rounded."""
    total = x.double()
    for slot, gate in zip(slots, gates, strict=True):
        total = total + slot_in_float64(slot) * (1 if gate is None else gate.double())
    if norm is None:
        return [total, None]
    z = total.to(x.dtype).double()
    if norm.kind == "layer":
        z = z - z.mean(-1, keepdim=True)
    z = z / (z.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    z = z if norm.weight is None else z * norm.weight.double()
    z = z if norm.bias is None else z + norm.bias.double()
    z = z if scale is None else z * (1 + scale.double())
    return [total, z if shift is None else z + shift.double()]


def call_of(
    x: Tensor, slots: list[Any], *, gates: Any, norm: Any = None, shift: Any = None, scale: Any = None
) -> BroadcastResidual:
    """The call as backends take it."""
    return BroadcastResidual(x, cached_outputs("test", slots, gates, MOST_ADDED), norm, shift, scale)


def rounded_once(x: Tensor, slots: list[Any], **options: Any) -> tuple[Tensor, Tensor | None]:
    """What the reference gives that rounds where kernels do."""
    x_new, y = reference.rounded_once(call_of(x, slots, **options))
    return x if x_new is None else x_new, y


def assert_rounded_once(got: Any, args: Any, options: dict[str, Any]) -> None:
    """Equal to the reference that rounds in the same places but for the order of sums."""
    for a, b in zip(got, rounded_once(*args, **options), strict=True):
        if a is None:
            assert b is None
            continue
        step, single = torch.finfo(a.dtype).eps, a.dtype == torch.float32
        atol = 16 * step * float(b.abs().max()) if single else 2 * step  # sums in another order
        torch.testing.assert_close(a.double(), b.double(), atol=atol, rtol=step)
        # They move a number to the other side of a rounding now and then, no more.
        assert single or (a != b).sum() <= 2 + 0.02 * a.numel()


def assert_right(got: Any, args: Any, options: dict[str, Any]) -> None:
    """Accurate against float64, and rounded where the reference says."""
    reference = broadcast_residual(*args, **options, backend="reference")
    for a, b, true in zip(got, reference, exact(*args, **options), strict=True):
        if a is not None:
            assert_accurate(a, b, true)
    assert_rounded_once(got, args, options)


def check(args: Any, options: dict[str, Any], backend: str) -> None:
    """The results of a backend are right."""
    assert_right(broadcast_residual(*args, **options, backend=backend), args, options)
