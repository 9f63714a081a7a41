"""The residual stream: a block written as if nothing were fused, run as few fused operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import ops
from .generation import Call, Store
from .slots import Slot

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
        self._x = x if x.stride(-1) == 1 else x.contiguous()
        self._call = call
        self._projection: tuple[torch.Tensor, nn.Linear, torch.Tensor | None, Store | None] | None = None
        self._pending: list[tuple[Any, torch.Tensor | None]] = []

    def read(self) -> torch.Tensor:
        """The stream itself, everything added."""
        self._flush()
        return self._x

    def norm_modulate(self, norm: nn.Module, shift: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> torch.Tensor:
        """`norm(x) * (1 + scale) + shift`, after all additions; one kernel where `norm` is a plain LayerNorm or RMSNorm."""
        if self._projection is not None:
            self._flush()
        if not self._call.fuses(norm, self._x):
            y = norm(self.read())
            y = y if scale is None else y * (1 + scale)
            return y if shift is None else y + shift
        values, gates = self._take()
        self._x, y = ops.broadcast_residual(self._x, values, gates=gates, norm=_norm_of(norm, self._x), shift=shift, scale=scale)
        assert y is not None
        return y

    def project(self, a: torch.Tensor, linear: nn.Module, gate: torch.Tensor | None = None, store: Store | None = None) -> None:
        """Add `gate * linear(a)`, and keep the projection in `store`."""
        if not self._call.fuses(linear, a) or a.dtype != self._x.dtype:
            self.add(linear(a), gate, store)
            return
        assert isinstance(linear, nn.Linear)
        self._flush()
        self._projection = (a, linear, gate, store)

    def add(self, out: torch.Tensor, gate: torch.Tensor | None = None, store: Store | None = None) -> None:
        """Add `gate * out`, an output that was projected elsewhere, and keep it in `store`."""
        if store is not None and store.point == "post_gate" and gate is not None:
            out, gate = gate * out, None
        if store is not None:
            store.put(out)
        self._hold(out, gate)

    def reuse(self, slot: Slot, gate: torch.Tensor | None = None) -> None:
        """Add `gate * slot`: nothing runs until the stream is read. Leave `gate` out where the slot was kept after it."""
        self._hold(slot.value, gate)

    def _hold(self, value: Any, gate: torch.Tensor | None) -> None:
        dtypes = {t.dtype for t in (value, gate) if isinstance(t, torch.Tensor)}
        if dtypes - {self._x.dtype}:  # autocast: the terms have other dtypes than the stream
            self._flush()
            self._x = (value if gate is None else gate * value) + self._x
            return
        if len(self._pending) == (MOST_PENDING - 1 if self._projection is not None else MOST_PENDING):
            self._flush()
        self._pending.append((value, gate))

    def _take(self) -> tuple[list[Any], list[torch.Tensor | None]]:
        values, gates = [value for value, _ in self._pending], [gate for _, gate in self._pending]
        self._pending.clear()
        return values, gates

    def _flush(self) -> None:
        values, gates = self._take()
        if self._projection is not None:
            a, linear, gate, store = self._projection
            self._projection = None
            self._x, kept = ops.project_residual(
                a,
                linear.weight,
                linear.bias,
                self._x,
                gate=gate,
                store=None if store is None else store.point,
                store_dtype=None if store is None else store.dtype,
                slots=values,
                gates=gates,
            )
            if store is not None:
                store.put(kept)
        elif values:
            self._x, _ = ops.broadcast_residual(self._x, values, gates=gates)


def _norm_of(norm: nn.Module, x: torch.Tensor) -> ops.Norm:
    if isinstance(norm, nn.LayerNorm):
        return ops.Norm("layer", norm.weight, norm.bias, norm.eps)
    assert isinstance(norm, nn.RMSNorm)
    return ops.Norm("rms", norm.weight, None, torch.finfo(x.dtype).eps if norm.eps is None else norm.eps)
