"""Slots: the kept outputs of sublayers, and the arena that holds those of one context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..ops.dequantize import dequantize
from ..ops.quantize import quantize
from ..ops.quantized import GROUP, Quantized

CACHE_DTYPES = {None: None, "int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}
"""What slots are kept in, by its name in a config; None is the model's own dtype."""


class Key(NamedTuple):
    """What a slot's reader must have in common with its writer: the sublayer's input, but for its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: torch.Tensor) -> Key:
        """The key of a sublayer whose input is `x`."""
        return cls(x.shape, x.dtype, x.device)

    def matches(self, x: torch.Tensor) -> bool:
        """Whether `x` has this key."""
        return x.shape == self.shape and x.dtype is self.dtype and x.device == self.device


@dataclass(eq=False)
class Slot:
    """One sublayer's kept output.

    Args:
        value: a tensor, a `Quantized`, or any nest of them.
        key: of the input that it was computed from.
        source: the step that wrote it.
        nbytes: its size.
        dtype: of the tensor that `value` was before it was quantised; None if it is a nest.
    """

    value: Any
    key: Key
    source: int
    nbytes: int
    dtype: torch.dtype | None = None


@dataclass(eq=False)
class Extrapolation:
    """Several outputs of a sublayer, read together at a later step: `c_0 + sum_k w_k (c_0 - c_k)`, in float32 (float64
    where they are) and rounded once.

    Args:
        slots: the newest outputs, c_0 first, computed from inputs of one key.
        weights: w_1, w_2, ..., each one float32 number on the slots' device.
    """

    slots: tuple[Slot, ...]
    weights: tuple[torch.Tensor, ...]

    @property
    def key(self) -> Key:
        """Of the inputs that they were computed from."""
        return self.slots[0].key


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Quantized)


def is_quantised(t: torch.Tensor) -> bool:
    """Whether an 8-bit slot keeps `t` quantised: a floating-point tensor `[..., C]`."""
    return t.is_floating_point() and t.ndim > 0


def pack(value: Any, dtype: torch.dtype | None) -> Any:
    """`value` as it is kept: quantised to `dtype` where it `is_quantised`, if one is given."""
    if dtype is None:
        return value
    return pytree.tree_map(
        lambda v: quantize(v, dtype, GROUP) if isinstance(v, torch.Tensor) and is_quantised(v) else v,
        value,
        is_leaf=_is_leaf,
    )


def unpack(value: Any, dtype: torch.dtype) -> Any:
    """What `pack` was given, in `dtype` where it was quantised."""
    return pytree.tree_map(lambda v: dequantize(v, dtype) if isinstance(v, Quantized) else v, value, is_leaf=_is_leaf)


def nbytes(value: Any) -> int:
    """Bytes of all tensors in `value`."""
    if isinstance(value, (torch.Tensor, Quantized)):
        return value.nbytes
    if type(value) in (tuple, list):
        return sum([nbytes(v) for v in value])
    if value is None or isinstance(value, (int, float, str, torch.dtype)):
        return 0
    return sum(
        v.nbytes for v in pytree.tree_leaves(value, is_leaf=_is_leaf) if isinstance(v, (torch.Tensor, Quantized))
    )


def slot_bytes(shape: tuple[int, ...], dtype: torch.dtype, cache_dtype: str | None) -> int:
    """Bytes of a slot of `shape` `[..., C]`, from its shape alone."""
    rows = 1
    for n in shape[:-1]:
        rows *= n
    if cache_dtype is None:
        return rows * shape[-1] * dtype.itemsize
    return rows * (shape[-1] + 4 * -(-shape[-1] // GROUP))


class Meter:
    """Bytes held now and at the peak."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def add(self, count: int) -> None:
        """Count bytes in, or out where `count` is negative."""
        self.now += count
        if self.now > self.peak:
            self.peak = self.now


class Arena:
    """The slots of one context of one generation: the newest outputs of each sublayer, by its name.

    Args:
        meter: of the bytes of all contexts.
    """

    fixed = False
    """Whether slots lie where they lay in other generations."""

    def __init__(self, meter: Meter) -> None:
        self.closed = False
        self.meters: dict[str, Meter] = {}  # of this arena, by kind
        self.weights: Mapping[
            str, tuple[torch.Tensor, ...]
        ] = {}  # of what is extrapolated, by place, where it is `fixed`
        self._meter = meter
        self._kinds: dict[str, str] = {}
        self._slots: dict[str, tuple[Slot, ...]] = {}  # the newest first

    def put(
        self, name: str, kind: str, value: Any, key: Key, source: int, dtype: torch.dtype | None = None, most: int = 1
    ) -> None:
        """Keep `value` for sublayer `name`, of `kind`, as the newest of at most `most` outputs.

        Older ones are let go first.
        """
        if self.closed:
            return
        self.release(name, most - 1)
        slot = Slot(value, key, source, nbytes(value), dtype)
        self._kinds[name] = kind
        meter = self.meters.setdefault(kind, Meter())  # before the slot, whose release asks for it
        self._slots[name] = (slot, *self._slots.get(name, ()))
        self._meter.add(slot.nbytes)
        meter.add(slot.nbytes)

    def held(self, name: str) -> tuple[Slot, ...]:
        """The slots of sublayer `name`, the newest first."""
        return self._slots.get(name, ())

    def get(self, name: str) -> Slot | None:
        """The newest slot of sublayer `name`, if one is held."""
        slots = self._slots.get(name)
        return slots[0] if slots else None

    def release(self, name: str, most: int = 0) -> None:
        """Let go of the slots of sublayer `name`, but for the `most` newest ones."""
        slots = self._slots.get(name)
        if slots is None or len(slots) <= most:
            return
        if most:
            self._slots[name] = slots[:most]
        else:
            del self._slots[name]
        freed = slots[0].nbytes if len(slots) == 1 else sum([slot.nbytes for slot in slots[most:]])
        self._meter.now -= freed
        self.meters[self._kinds[name]].now -= freed

    def clear(self) -> None:
        """Let go of every slot."""
        for name in list(self._slots):
            self.release(name)

    def close(self) -> None:
        """Let go of every slot, and keep no further one: a call may go on whose generation has ended."""
        self.closed = True
        self.clear()

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))
