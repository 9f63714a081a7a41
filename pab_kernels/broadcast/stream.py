"""The residual stream: lets an adapter write a block without fusion, and runs it as a few fused operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from ..limits import MOST_ADDED
from ..ops.broadcast_residual import BroadcastResidual
from ..ops.cached_outputs import CachedOutput, extrapolate, term_value
from ..ops.checks import broadcasts
from ..ops.dispatch import run_checked
from ..ops.project_residual import ProjectResidual
from ..ops.quantized import FORMATS, Quantized
from .call import Call
from .fusing import norm_of
from .slots import Extrapolation, Slot
from .turn import Turn


class ResidualStream:
    """The residual stream `x` of a block under PAB.

    Additions stay pending until something reads the stream: `norm_modulate` then adds, normalises and modulates in one
    `broadcast_residual`, and a projection does the additions that follow it in its `project_residual`. The tensor
    passed in is never written.

    The arguments of these operations are correct by construction, so their checks are skipped. Anything that they do
    not support, such as a gate that broadcasts the stream to a larger shape or an output on another device, runs as the
    plain expression.

    Args:
        x: `[..., C]`.
        call: the call of the model that the block belongs to.
    """

    def __init__(self, x: torch.Tensor, call: Call) -> None:
        self._x = _dense(x)
        self.call = call
        self._projection: tuple[torch.Tensor, nn.Linear, torch.Tensor | None, Turn | None, str | None] | None = None
        self._pending: list[CachedOutput] = []

    def read(self) -> torch.Tensor:
        """The stream, with all additions done."""
        self._flush()
        return self._x

    def norm_modulate(
        self, norm: nn.Module, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`norm(x) * (1 + scale) + shift`, with all additions done; one kernel for a plain LayerNorm or RMSNorm over C.

        Args:
            norm: any module.
            shift, scale: broadcast against x; None to leave them out.
        """
        if self._projection is not None:
            self._flush()
        x = self._x
        if self.call.fuses(norm, x) and _fits(shift, x) and _fits(scale, x):
            return self._add_pending(norm_of(norm, x), shift, scale)
        y = norm(self.read())
        y = y if scale is None else y * (1 + scale)
        return y if shift is None else y + shift

    def project(
        self, a: torch.Tensor, linear: nn.Module, gate: torch.Tensor | None = None, store: Turn | None = None
    ) -> None:
        """Add `gate * linear(a)`, and keep the projection in the slot of the turn `store`, if given."""
        x = self._x
        alike = a.dtype == x.dtype and a.device == x.device and a.shape[:-1] == x.shape[:-1] and a.stride(-1) == 1
        if not (alike and _fits(gate, x) and self.call.fuses(linear, a) and _width(linear) == x.shape[-1]):
            self.add(linear(a), gate, store)
            return
        assert isinstance(linear, nn.Linear)
        self._flush()
        self._projection = (a, linear, gate, store, self.call.measured)

    def add(self, out: torch.Tensor | Quantized, gate: torch.Tensor | None = None, store: Turn | None = None) -> None:
        """Add `gate * out` for an output computed elsewhere, and keep it in the slot of the turn `store`, if given.

        Another rank may have quantised it already, as it is kept.
        """
        if isinstance(out, Quantized):
            if store is None or gate is None or not store.gated:
                if store is not None:
                    store.put(out)
                self._hold(out, gate)
                return
            out = term_value(out, self._x.dtype)
        if store is not None and store.gated and gate is not None:
            out, gate = gate * out, None
        out = _dense(out)
        if store is not None:
            store.put(out.clone() if _share_memory(out, self._x) else out)
        self._hold(out, gate)

    def reuse(self, slot: Slot | Extrapolation, gate: torch.Tensor | None = None) -> None:
        """Add `gate * slot`; nothing runs until the stream is read. Leave out `gate` if the slot includes it.

        An extrapolation of two outputs is one addition, `gate * (newest + w (newest - before))`, with the value in
        brackets rounded once.
        """
        slots = slot.slots if isinstance(slot, Extrapolation) else (slot,)
        own, value = _dtype(slots[0], self._x), slots[0].value
        fits = all(_dtype(each, self._x) == self._x.dtype for each in slots)
        if isinstance(slot, Extrapolation):
            older = [each.value for each in slots[1:]]
            line = len(older) == 1
            value = ops.Line(value, older[0], slot.weights[0]) if line else extrapolate(value, older, slot.weights, own)
        # Under autocast the slot is dequantised to its own dtype, so the sum is promoted as when it was computed.
        self._hold(value if fits else term_value(value, own), gate)

    def _hold(self, value: Any, gate: torch.Tensor | None) -> None:
        # Not a term under autocast, or if a module computes in float32.
        if not (_is_term(value, self._x) and _fits(gate, self._x)):
            self._flush()
            value = term_value(value, self._x.dtype)
            self._x = _dense((value if gate is None else gate * value) + self._x)
            return
        if len(self._pending) == (MOST_ADDED if self._projection is None else MOST_ADDED - 1):
            self._flush()
        self._pending.append((value, gate))

    def _take(self) -> tuple[CachedOutput, ...]:
        """Remove and return the pending additions."""
        pending, self._pending = self._pending, []
        return tuple(pending)

    def _add_pending(
        self, norm: ops.Norm | None = None, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> Any:
        """Do the pending additions; return the stream normed and modulated, if there is a norm."""
        x, y = run_checked("broadcast_residual", BroadcastResidual(self._x, self._take(), norm, shift, scale))
        self._x = self._x if x is None else x
        return y

    def _flush(self) -> None:
        if self._projection is not None:
            a, linear, gate, store, kind = self._projection
            self._projection, flushing = None, self.call.measured
            self.call.mark(kind)
            call = ProjectResidual(
                a,
                linear.weight,
                linear.bias,
                self._x,
                gate,
                store=None if store is None else "post_gate" if store.gated else "pre_gate",
                store_dtype=None if store is None else store.dtype,
                cached=self._take(),
            )
            self._x, kept = run_checked("project_residual", call)
            if store is not None:
                store.put(kept)
            self.call.mark(flushing)
        elif self._pending:
            self._add_pending()


def _width(linear: nn.Module) -> int:
    assert isinstance(linear, nn.Linear)
    return linear.weight.shape[0]


def _is_term(value: Any, x: torch.Tensor) -> bool:
    """Whether the operations support `value` (a tensor, a `Quantized` or a line) as an addition to `x`."""
    if isinstance(value, ops.Line):
        return _is_term(value.newest, x) and _is_term(value.before, x)
    if value.shape != x.shape or value.device != x.device:
        return False
    if isinstance(value, Quantized):
        return value.group == FORMATS[value.dtype].group
    return value.dtype == x.dtype and value.stride(-1) == 1


def _fits(t: torch.Tensor | None, x: torch.Tensor) -> bool:
    """Whether the operations support `t` as a gate, scale or shift on `x`."""
    return t is None or broadcasts(t, x)


def _dtype(slot: Slot, x: torch.Tensor) -> torch.dtype:
    """The dtype of the output in a slot; that of x if the slot is quantised and its own dtype is unknown."""
    return slot.value.dtype if isinstance(slot.value, torch.Tensor) else slot.dtype or x.dtype


def _dense(t: torch.Tensor) -> torch.Tensor:
    """`t` with channels of stride 1."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the tensors share a storage; always False in a compiled graph, where that is unknown."""
    return not torch.compiler.is_compiling() and a.untyped_storage()._cdata == b.untyped_storage()._cdata
