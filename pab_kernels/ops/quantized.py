"""Slots of 8 and 4 bits: symmetric quantisation with a scale for each group of neighbouring channels of a token.

A byte holds two 4-bit values, two's complement, of neighbouring channels: 2i in its low half and 2i + 1 in its high
half. Neighbours are in one thread in every layout of a kernel (16 bytes of the stream are 8 channels, a lane of a
product has pairs), so packing and unpacking move nothing between threads; and where a pair lies does not depend on
groups, which may be ragged. An odd number of channels leaves the last high half 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_operand, check_tensor, none_of

INT4 = torch.int4  # type: ignore[attr-defined]  # which torch's stubs lack
"""The dtype that stands for 4 bits; no tensor has it."""


@dataclass(frozen=True)
class Format:
    """How a quantised dtype keeps values.

    Args:
        least, most: the smallest and largest number that is used of it. In 4 bits the value of largest magnitude is
            `least`, with the sign in the scale.
        group: channels that share a scale in a slot of the residual stream.
        scale: dtype of the scales.
        data: dtype of the tensor of values; torch.uint8 holds two in a byte.
    """

    least: float
    most: float
    group: int
    scale: torch.dtype
    data: torch.dtype


FORMATS = {
    torch.int8: Format(-127.0, 127.0, 128, torch.float32, torch.int8),
    torch.float8_e4m3fn: Format(-448.0, 448.0, 128, torch.float32, torch.float8_e4m3fn),
    INT4: Format(-8.0, 7.0, 32, torch.bfloat16, torch.uint8),
}

QUANTISED = tuple(FORMATS)

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)

GROUP = 128
"""Channels that share a scale in an 8-bit slot of the residual stream."""

PACKED = torch.uint8
"""The dtype of two 4-bit values in a byte."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor of 8 or 4 bits and its scales: `value = data * scale`, a scale for each `group` channels of a token.

    Args:
        data: `[..., C]`, int8 or float8_e4m3fn; or uint8 `[..., ceil(C / 2)]`, two 4-bit values in a byte, of which
            channel 2i has the low half and 2i + 1 the high one.
        scale: `[..., ceil(C / group)]`, float32, or bfloat16 for 4 bits; the last group may be shorter than the others.
        group: channels to a scale; a group wider than C is all channels.
        channels: C; None where data has no half of a byte to spare.
    """

    data: Tensor
    scale: Tensor
    group: int = GROUP
    channels: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What it is quantised to: torch.int8, torch.float8_e4m3fn or torch.int4."""
        return INT4 if self.data.dtype == PACKED else self.data.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the values, `[..., C]`."""
        if self.data.dtype != PACKED:
            return self.data.shape
        *leading, width = self.data.shape
        return torch.Size((*leading, 2 * width if self.channels is None else self.channels))

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


def stored_of(
    data: Tensor | None = None, scale: Tensor | None = None, *, channels: int, group: int | None = None
) -> Tensor | Quantized | None:
    """The slot of these tensors, by default in the groups of the residual stream: the inverse of `data_and_scale`."""
    if data is None or scale is None:
        return data
    dtype = INT4 if data.dtype == PACKED else data.dtype
    return Quantized(data, scale, group or FORMATS[dtype].group, channels)


def head_group(dtype: torch.dtype, head_dim: int) -> int:
    """Channels to a scale in a slot of attention, whose groups end with a head: all of them in 8 bits."""
    return FORMATS[dtype].group if dtype == INT4 else head_dim


def check_store_dtype(op: str, dtype: Any, own: torch.dtype) -> None:
    """None, the dtype of the activations, or a quantised one."""
    if dtype is not None and dtype != own and dtype not in QUANTISED:
        raise TypeError(none_of(op, "store_dtype", dtype, (None, own, *QUANTISED)))


def check_quantized_dtype(op: str, name: str, dtype: Any) -> None:
    """One of the quantised dtypes."""
    if dtype not in QUANTISED:
        raise TypeError(none_of(op, name, dtype, QUANTISED))


def refuse_four_bits(name: str, dtype: torch.dtype | None) -> str | None:
    """Why a CUDA kernel cannot access a slot of this name and dtype; None where it can."""
    return f"{name} is torch.int4; torch.int8 and torch.float8_e4m3fn are supported" if dtype == INT4 else None


def width_of(dtype: torch.dtype, channels: int) -> int:
    """Elements of `data` for this many channels."""
    return -(-channels // 2) if dtype == INT4 else channels


def packed(values: Tensor) -> Tensor:
    """Whole numbers from -8 to 7, `[..., C]` int8, as two in a byte: `[..., ceil(C / 2)]`."""
    channels = values.shape[-1]
    halves = values.view(PACKED) & 15
    if channels % 2:
        halves = F.pad(halves, (0, 1))
    low, high = halves.unflatten(-1, (-(-channels // 2), 2)).unbind(-1)
    return low | high << 4


def unpacked(data: Tensor, channels: int) -> Tensor:
    """The numbers of `packed`, `[..., C]`, in float32."""
    halves = torch.stack((data & 15, data >> 4), -1).flatten(-2)[..., :channels]
    return (halves ^ 8).float() - 8


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


def check_quantized(
    op: str, name: str, q: Quantized, shape: Sequence[int], group: int | None, device: torch.device
) -> None:
    """A `Quantized` of this shape, group (None: as in the residual stream) and device, with scales to match."""
    check_tensor(op, f"{name}.data", q.data)
    if q.dtype not in QUANTISED:
        raise TypeError(none_of(op, f"{name}.data's dtype", q.data.dtype, [f.data for f in FORMATS.values()]))
    used = FORMATS[q.dtype]
    if group is None:
        group = used.group
    if q.group != group:
        advice = f"quantise it with group={group}"
        raise ValueError(f"{op}: {name} has groups of {q.group} channels; {group} is supported here: {advice}")
    *leading, channels = shape
    check_operand(op, f"{name}.data", q.data, (*leading, width_of(q.dtype, channels)), used.data, device)
    check_operand(op, f"{name}.scale", q.scale, (*leading, -(-channels // group)), used.scale, device)
    if q.shape[-1] != channels:
        given = f"{name} has {q.shape[-1]} channels"
        raise ValueError(f"{op}: {given}; {channels} are supported here: quantise a tensor of this shape")


def empty_quantized(
    shape: Sequence[int], dtype: torch.dtype, group: int | None = None, device: torch.device | str | None = None
) -> Quantized:
    """An uninitialised `Quantized`.

    Args:
        shape: `[..., C]`, of the values.
        dtype: torch.int8, torch.float8_e4m3fn or torch.int4.
        group: channels to a scale; default 128, and 32 for 4 bits.
        device: of data and scales.

    Returns:
        Contiguous data and scales, as `Quantized` has them.

    Raises:
        TypeError: the dtype is not one of these.
        ValueError: the shape or group is not one.
    """
    check_quantized_dtype("empty_quantized", "dtype", dtype)
    used = FORMATS[dtype]
    group = used.group if group is None else group
    check_group("empty_quantized", group)
    try:
        *leading, channels = shape
        return Quantized(
            torch.empty((*leading, width_of(dtype, channels)), dtype=used.data, device=device),
            torch.empty((*leading, -(-channels // group)), dtype=used.scale, device=device),
            group,
            channels,
        )
    except (TypeError, ValueError, RuntimeError):
        if isinstance(shape, (tuple, list)) and shape and all(isinstance(n, int) and n >= 0 for n in shape):
            raise
        supported = "at least one size, each 0 or more, is supported"
        raise ValueError(f"empty_quantized: shape is {shape!r}; {supported}: pass [..., channels]") from None
