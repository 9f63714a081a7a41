"""Slots: the kept outputs of sublayers, and the arena that holds the slots of one context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from ..ops.dequantize import dequantize
from ..ops.quantize import quantize
from ..ops.quantized import FORMATS, INT4, Quantized, width_of

CACHE_DTYPES = {None: None, "int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn, "int4": INT4}
"""Dtypes of slots by their names in a config; None is the model's own dtype."""


class Key(NamedTuple):
    """Shape, dtype and device of a sublayer's input, which a slot's reader and writer must have in common."""

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


@dataclass(eq=False, slots=True)
class Slot:
    """One sublayer's kept output.

    Args:
        value: a tensor, a `Quantized`, or any pytree of them.
        key: key of the input that it was computed from.
        source: the step that wrote it.
        nbytes: its size in bytes.
        dtype: dtype of the tensor before it was quantised; None if `value` is a pytree.
        on_host: whether `value` is in host memory, although the sublayer runs on a device.
        sent: the copy that brings `value` to host memory; None if it came there in another way.
        versions: tensors of `value` that others may hold too, with their versions when they were kept.
    """

    value: Any
    key: Key
    source: int
    nbytes: int
    dtype: torch.dtype | None = None
    on_host: bool = False
    sent: Any = None
    versions: Sequence[tuple[torch.Tensor, int]] = ()

    @property
    def written(self) -> bool:
        """Whether somebody wrote to its tensors."""
        found = False
        for tensor, version in self.versions:  # a loop: a comprehension costs more, and most values are one tensor
            found = found or tensor._version != version
        return found


@dataclass(eq=False)
class Extrapolation:
    """Several outputs of a sublayer that one reuse reads together: `c_0 + sum_k w_k (c_0 - c_k)`.

    Computed in float32 (float64 for float64 outputs) and rounded once.

    Args:
        slots: the slots of c_0, c_1, ..., newest first, computed from inputs of one key.
        weights: w_1, w_2, ..., each a float32 scalar tensor on the slots' device.
    """

    slots: tuple[Slot, ...]
    weights: tuple[torch.Tensor, ...]

    @property
    def key(self) -> Key:
        """The key of the inputs that they were computed from."""
        return self.slots[0].key

    @property
    def written(self) -> bool:
        """Whether somebody wrote to one of the outputs."""
        return any(slot.written for slot in self.slots)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Quantized)


def is_quantised(t: torch.Tensor) -> bool:
    """Whether a slot of 8 or 4 bits quantises `t`: a floating-point tensor `[..., C]`."""
    return t.is_floating_point() and t.ndim > 0


def pack(value: Any, dtype: torch.dtype | None) -> Any:
    """`value` with its floating-point tensors quantised to `dtype`; unchanged if that is None."""
    if dtype is None:
        return value
    return pytree.tree_map(
        lambda v: quantize(v, dtype) if isinstance(v, torch.Tensor) and is_quantised(v) else v,
        value,
        is_leaf=_is_leaf,
    )


def unpack(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its quantised tensors dequantised to `dtype`."""
    return pytree.tree_map(lambda v: dequantize(v, dtype) if isinstance(v, Quantized) else v, value, is_leaf=_is_leaf)


def nbytes(value: Any) -> int:
    """Bytes of all tensors in `value`."""
    if isinstance(value, (torch.Tensor, Quantized)):
        return value.nbytes
    if type(value) in (tuple, list):
        count = 0
        for v in value:  # a loop: a comprehension costs more, and most values have the dtypes of their tensors
            if type(v) is not torch.dtype:
                count += nbytes(v)
        return count
    if value is None or isinstance(value, (int, float, str, torch.dtype)):
        return 0
    return sum(
        v.nbytes for v in pytree.tree_leaves(value, is_leaf=_is_leaf) if isinstance(v, (torch.Tensor, Quantized))
    )


def slot_bytes(shape: tuple[int, ...], dtype: torch.dtype, cache_dtype: str | None) -> int:
    """Bytes of a slot of an output of `shape` `[..., C]`, without making it."""
    rows = 1
    for n in shape[:-1]:
        rows *= n
    kept, channels = CACHE_DTYPES[cache_dtype], shape[-1]
    if kept is None:
        return rows * channels * dtype.itemsize
    used = FORMATS[kept]
    return rows * (width_of(kept, channels) * used.data.itemsize + -(-channels // used.group) * used.scale.itemsize)


@dataclass
class Meter:
    """Counts the bytes held now and at the peak."""

    now: int = 0
    peak: int = 0

    def add(self, count: int) -> None:
        """Add `count` bytes, which may be negative."""
        self.now += count
        if self.now > self.peak:
            self.peak = self.now


@dataclass
class Meters(Meter):
    """Counts the bytes on the device, and beside them those in host memory."""

    host: Meter = field(default_factory=Meter)

    def of(self, slot: Slot) -> Meter:
        """The meter of the place where a slot is."""
        return self.host if slot.on_host else self

    @property
    def everywhere(self) -> int:
        """The bytes held now in both places."""
        return self.now + self.host.now


class Arena:
    """The slots of one context of one generation: the newest outputs of each sublayer, by its name.

    Args:
        meter: counts the bytes of all contexts of the generation.
    """

    fixed = False
    """Whether slots keep their addresses from one generation to the next."""

    def __init__(self, meter: Meters) -> None:
        self.closed = False
        self.meters: dict[str, Meters] = {}  # bytes of this arena, by kind
        # Weights of the extrapolations by place, if the arena is `fixed`.
        self.weights: Mapping[str, tuple[torch.Tensor, ...]] = {}
        self._meter = meter
        self._kinds: dict[str, str] = {}
        self._slots: dict[str, tuple[Slot, ...]] = {}  # the newest first

    def put(
        self,
        name: str,
        kind: str,
        value: Any,
        key: Key,
        source: int,
        dtype: torch.dtype | None = None,
        most: int = 1,
        sent: Any = None,
    ) -> None:
        """Keep `value` as the newest of at most `most` outputs of sublayer `name`; older ones are released first.

        Args:
            name: of the sublayer, with a number from its second run in a call on.
            kind: of the sublayer.
            value, key, source, dtype: of the slot; see `Slot`.
            most: the most outputs held after it.
            sent: the copy that brings `value` to host memory; None on the device.
        """
        if self.closed:
            return
        self.release(name, most - 1)
        slot = Slot(value, key, source, nbytes(value), dtype, sent is not None, sent)
        self._kinds[name] = kind
        meter = self.meters.setdefault(kind, Meters())  # before the slot, as `release` of the slot needs it
        self._slots[name] = (slot, *self._slots.get(name, ()))
        self._meter.of(slot).add(slot.nbytes)
        meter.of(slot).add(slot.nbytes)

    def held(self, name: str) -> tuple[Slot, ...]:
        """The slots of sublayer `name`, newest first."""
        return self._slots.get(name, ())

    def get(self, name: str) -> Slot | None:
        """The newest slot of sublayer `name`, or None."""
        slots = self._slots.get(name)
        return slots[0] if slots else None

    def release(self, name: str, most: int = 0) -> None:
        """Release the slots of sublayer `name` except the `most` newest ones."""
        slots = self._slots.get(name)
        if slots is None or len(slots) <= most:
            return
        if most:
            self._slots[name] = slots[:most]
        else:
            del self._slots[name]
        meter = self.meters[self._kinds[name]]
        for slot in slots[most:]:
            self._meter.of(slot).now -= slot.nbytes
            meter.of(slot).now -= slot.nbytes

    def places_held(self) -> list[str]:
        """The names under which slots are kept."""
        return list(self._slots)

    def change(self, name: str, changed: Callable[[Slot], tuple[Any, bool]]) -> None:
        """Give the slots of `name` other values, each with whether it is in host memory; not those that are lost."""
        meter = self.meters[self._kinds[name]]
        for slot in self.held(name):
            if slot.written:
                continue
            value, on_host = changed(slot)
            for of_all in (self._meter, meter):
                of_all.of(slot).add(-slot.nbytes)
            if value is not slot.value:
                slot.value, slot.versions = value, ()
            slot.nbytes, slot.on_host, slot.sent = nbytes(value), on_host, None
            for of_all in (self._meter, meter):
                of_all.of(slot).add(slot.nbytes)

    def clear(self) -> None:
        """Release every slot."""
        for name in self.places_held():
            self.release(name)

    def close(self) -> None:
        """Release every slot and accept no more: a call may still run after its generation has ended."""
        self.closed = True
        self.clear()

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))
