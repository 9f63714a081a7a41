"""8-bit slots: symmetric quantisation with one float32 scale for each group of neighbouring channels of a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check_operand, check_tensor, none_of

GROUP = 128
"""Channels that share a scale in a slot of the residual stream."""

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest magnitude that is used of each 8-bit dtype."""

EIGHT_BITS = tuple(LIMITS)


@dataclass(frozen=True, eq=False)
class Quantized:
    """An 8-bit tensor and its scales: `value = data * scale`, a scale for each `group` channels of a token.

    Args:
        data: `[..., C]`, int8 or float8_e4m3fn.
        scale: `[..., ceil(C / group)]`, float32; the last group may be shorter than the others.
        group: channels to a scale; a group wider than C is all channels.
    """

    data: Tensor
    scale: Tensor
    group: int = GROUP

    @property
    def shape(self) -> torch.Size:
        """Shape of the values, `[..., C]`."""
        return self.data.shape

    @property
    def device(self) -> torch.device:
        """Device of data and scales."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of data and scales."""
        return self.data.nbytes + self.scale.nbytes


def data_and_scale(slot: Tensor | Quantized | None) -> tuple[Tensor | None, Tensor | None]:
    """The tensors of a slot, as schemas and kernels take them; no scale where it is not quantised."""
    return (slot.data, slot.scale) if isinstance(slot, Quantized) else (slot, None)


def stored_of(data: Tensor | None = None, scale: Tensor | None = None, *, group: int) -> Tensor | Quantized | None:
    """The slot of these tensors: the inverse of `data_and_scale`."""
    return data if data is None or scale is None else Quantized(data, scale, group)


def check_store_dtype(op: str, dtype: Any, own: torch.dtype) -> None:
    """None, the dtype of the activations, or an 8-bit one."""
    if dtype is not None and dtype != own and dtype not in EIGHT_BITS:
        raise TypeError(none_of(op, "store_dtype", dtype, (None, own, *EIGHT_BITS)))


def check_quantized_dtype(op: str, name: str, dtype: Any) -> None:
    """One of the 8-bit dtypes."""
    if dtype not in EIGHT_BITS:
        raise TypeError(none_of(op, name, dtype, EIGHT_BITS))


def check_group(op: str, group: Any) -> None:
    """A number of channels."""
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        advice = f"pass {GROUP} or the head dimension"
        raise ValueError(f"{op}: group is {group!r}; a whole number from 1 on is supported: {advice}")


def group_width(group: int, channels: int) -> int:
    """Channels of a group, at least 1 and at most all."""
    return max(1, min(group, channels))


def by_channel(scale: Tensor, channels: int, width: int) -> Tensor:
    """The scales of groups of this width, `[..., ceil(C / width)]`, at each of their channels: `[..., C]`."""
    rest = channels % width
    if rest and torch.compiler.is_compiling():
        # A slice of all groups expanded reads past the scales when torch 2.13's inductor vectorises it for a CPU.
        whole = by_channel(scale[..., : channels // width], channels - rest, width)
        return torch.cat((whole, scale[..., -1:].expand(*scale.shape[:-1], rest)), -1)
    spread = scale.unsqueeze(-1).expand(*scale.shape, width).flatten(-2)
    return spread[..., :channels] if rest else spread


def check_quantized(op: str, name: str, q: Quantized, shape: Sequence[int], group: int, device: torch.device) -> None:
    """A `Quantized` of this shape, group and device, with scales to match."""
    if not isinstance(q.data, Tensor) or q.data.dtype not in EIGHT_BITS:
        check_tensor(op, f"{name}.data", q.data)
        check_quantized_dtype(op, f"{name}.data's dtype", q.data.dtype)
    if q.group != group:
        advice = f"quantise it with group={group}"
        raise ValueError(f"{op}: {name} has groups of {q.group} channels; {group} is supported here: {advice}")
    check_operand(op, f"{name}.data", q.data, shape, q.data.dtype, device)
    check_operand(op, f"{name}.scale", q.scale, (*shape[:-1], -(-shape[-1] // group)), torch.float32, device)


def empty_quantized(
    shape: Sequence[int], dtype: torch.dtype, group: int = GROUP, device: torch.device | str | None = None
) -> Quantized:
    """An uninitialised `Quantized`.

    Args:
        shape: `[..., C]`, of the values.
        dtype: torch.int8 or torch.float8_e4m3fn.
        group: channels to a scale.
        device: of data and scales.

    Returns:
        Contiguous data `[..., C]` and scales `[..., ceil(C / group)]`.

    Raises:
        TypeError: the dtype does not have 8 bits.
        ValueError: the shape or group is not one.
    """
    check_quantized_dtype("empty_quantized", "dtype", dtype)
    check_group("empty_quantized", group)
    try:
        return Quantized(
            torch.empty(tuple(shape), dtype=dtype, device=device),
            torch.empty((*shape[:-1], -(-shape[-1] // group)), dtype=torch.float32, device=device),
            group,
        )
    except (TypeError, IndexError, RuntimeError):
        if isinstance(shape, (tuple, list)) and shape and all(isinstance(n, int) and n >= 0 for n in shape):
            raise
        supported = "at least one size, each 0 or more, is supported"
        raise ValueError(f"empty_quantized: shape is {shape!r}; {supported}: pass [..., channels]") from None
