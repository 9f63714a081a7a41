"""The residual stream: a block written as if nothing were fused, run as few fused operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..ops.cached_outputs import extrapolate
from .call import Call
from .slots import Extrapolation, Slot, unpack
from .turn import Turn

MOST_PENDING = 3
"""Additions that one `broadcast_residual` takes."""


class ResidualStream:
    """The residual stream `x` of a block under PAB.

    Additions are held back until something reads the stream: `norm_modulate` then adds, normalises and modulates in one
    `broadcast_residual`; a projection takes the additions that follow it into its `project_residual`. The tensor that the stream was
    given is never written.

    Args:
        x: `[..., C]`.
        call: the call of the model that the block belongs to.
    """

    def __init__(self, x: torch.Tensor, call: Call) -> None:
        self._x = _dense(x)
        self._call = call
        self._projection: tuple[torch.Tensor, nn.Linear, torch.Tensor | None, Turn | None, str | None] | None = None
        self._pending: list[tuple[Any, torch.Tensor | None]] = []  # slots or lines, and their gates

    def read(self) -> torch.Tensor:
        """The stream itself, everything added."""
        self._flush()
        return self._x

    def norm_modulate(self, norm: nn.Module, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> torch.Tensor:
        """`norm(x) * (1 + scale) + shift`, after all additions; one kernel where `norm` is a plain LayerNorm or RMSNorm over C."""
        if self._projection is not None:
            self._flush()
        form = _norm_of(norm, self._x) if self._call.fuses(norm, self._x) else None
        if form is None or not (_fits(shift, self._x) and _fits(scale, self._x)):
            y = norm(self.read())
            y = y if scale is None else y * (1 + scale)
            return y if shift is None else y + shift
        slots, gates = self._take()
        self._x, y = ops.broadcast_residual(self._x, slots, gates=gates, norm=form, shift=shift, scale=scale)
        assert y is not None
        return y

    def project(self, a: torch.Tensor, linear: nn.Module, gate: torch.Tensor | None = None, store: Turn | None = None) -> None:
        """Add `gate * linear(a)`, and keep the projection for the turn `store`."""
        if not self._call.fuses(linear, a) or a.dtype != self._x.dtype or a.stride(-1) != 1 or not _fits(gate, self._x):
            self.add(linear(a), gate, store)
            return
        assert isinstance(linear, nn.Linear)
        self._flush()
        self._projection = (a, linear, gate, store, self._call.measured)

    def add(self, out: torch.Tensor, gate: torch.Tensor | None = None, store: Turn | None = None) -> None:
        """Add `gate * out`, an output that was projected elsewhere, and keep it for the turn `store`."""
        if store is not None and store.gated and gate is not None:
            out, gate = gate * out, None
        out = _dense(out)
        if store is not None:
            store.put(out.clone() if _share_memory(out, self._x) else out)
        self._hold(out, gate)

    def reuse(self, slot: Slot | Extrapolation, gate: torch.Tensor | None = None) -> None:
        """Add `gate * slot`: nothing runs until the stream is read. Leave `gate` out where the slot was kept after it.

        Two outputs on a line are one addition: `gate * (newest + w (newest - before))`, the line rounded once.
        """
        slots = slot.slots if isinstance(slot, Extrapolation) else (slot,)
        own, value = _dtype(slots[0], self._x), slots[0].value
        fits = all(_dtype(each, self._x) == self._x.dtype for each in slots)
        if isinstance(slot, Extrapolation):
            older = [each.value for each in slots[1:]]
            line = len(older) == 1
            value = ops.Line(value, older[0], slot.weights[0]) if line else extrapolate(value, older, slot.weights, own)
        # Under autocast it is dequantised to its own dtype, and the sum is promoted as it was when computed.
        self._hold(value if fits else _unpacked(value, own), gate)

    def _hold(self, value: Any, gate: torch.Tensor | None) -> None:
        mixed = isinstance(value, torch.Tensor) and value.dtype != self._x.dtype  # autocast, or a module that computes in float32
        if mixed or value.shape != self._x.shape or not _fits(gate, self._x):
            self._flush()
            value = _unpacked(value, self._x.dtype)
            self._x = _dense((value if gate is None else gate * value) + self._x)
            return
        if len(self._pending) == (MOST_PENDING - 1 if self._projection is not None else MOST_PENDING):
            self._flush()
        self._pending.append((value, gate))

    def _take(self) -> tuple[list[Any], list[torch.Tensor | None]]:
        """Slots and gates of all that is pending; nothing is pending any more."""
        pending, self._pending = self._pending, []
        return [value for value, _ in pending], [gate for _, gate in pending]

    def _flush(self) -> None:
        slots, gates = self._take()
        if self._projection is not None:
            a, linear, gate, store, kind = self._projection
            self._projection, flushing = None, self._call.measured
            self._call.mark(kind)
            self._x, kept = ops.project_residual(
                a,
                linear.weight,
                linear.bias,
                self._x,
                gate=gate,
                store=None if store is None else "post_gate" if store.gated else "pre_gate",
                store_dtype=None if store is None else store.dtype,
                slots=slots,
                gates=gates,
            )
            if store is not None:
                store.put(kept)
            self._call.mark(flushing)
        elif slots:
            self._x, _ = ops.broadcast_residual(self._x, slots, gates=gates)


def _norm_of(norm: nn.Module, x: torch.Tensor) -> ops.Norm | None:
    """A plain LayerNorm or RMSNorm as the operations take it; None where it is over more than the channels."""
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    if tuple(norm.normalized_shape) != tuple(x.shape[-1:]):
        return None
    if isinstance(norm, nn.LayerNorm):
        return ops.Norm("layer", norm.weight, norm.bias, norm.eps)
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32  # torch takes the eps of the dtype that it computes in
    return ops.Norm("rms", norm.weight, None, torch.finfo(computed).eps if norm.eps is None else norm.eps)


def _fits(t: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Whether the operations take `t` as a gate, scale or shift on `x`; otherwise the expression is run as it stands."""
    return t is None or (t.dtype == x.dtype and t.ndim <= x.ndim and t.shape[-1:] == x.shape[-1:] and t.stride(-1) == 1)


def _dtype(slot: Slot, x: torch.Tensor) -> torch.dtype:
    """Of the output that a slot keeps; x's where it was quantised and nobody knows from what."""
    return slot.value.dtype if isinstance(slot.value, torch.Tensor) else slot.dtype or x.dtype


def _unpacked(value: Any, dtype: torch.dtype) -> Any:
    """A slot's value in `dtype` where it was quantised, or the one on a line, rounded to `dtype`."""
    return extrapolate(value.newest, [value.before], [value.weight], dtype) if isinstance(value, ops.Line) else unpack(value, dtype)


def _dense(t: torch.Tensor) -> torch.Tensor:
    """`t` with its channels side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether writing one may change the other. Not asked in a compiled graph, where it cannot be known."""
    return not torch.compiler.is_compiling() and a.untyped_storage()._cdata == b.untyped_storage()._cdata
