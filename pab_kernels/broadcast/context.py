"""Contexts: the branches of classifier-free guidance, each with its slots and its counts."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .costs import Arguments
from .inputs import Inputs
from .slots import Arena, Meters
from .stopwatch import REST, Stopwatch


class _Seen:
    """An argument of the last call, and whether the call before had the same one.

    A view is identified by its base, offset, shape and strides, so a view made for each call counts as the same one.

    Args:
        value: a tensor, which is not kept alive, or a number.
    """

    __slots__ = ("_tensor", "_where", "_version", "again")

    def __init__(self, value: Any) -> None:
        self.again = False
        self._tensor: weakref.ref[torch.Tensor] | None = None
        self._where, self._version = value, 0
        if isinstance(value, torch.Tensor):
            base, self._where, self._version = _anchor(value)
            self._tensor = weakref.ref(base)

    def same(self, value: Any) -> bool:
        """Whether `value` is the same argument, not written to since."""
        if not isinstance(value, torch.Tensor):
            return self._tensor is None and bool(self._where == value)
        base, where, version = _anchor(value)
        return self._tensor is not None and self._tensor() is base and (self._where, self._version) == (where, version)

    def exchanged(self, value: Any) -> bool:
        """Whether `value` shows a new prompt: it differs, and the old one still exists or came in two calls."""
        if self.same(value):
            return False
        if self.again or self._tensor is None or not isinstance(value, torch.Tensor):
            return self.again
        last, (base, where, _) = self._tensor(), _anchor(value)
        return last is not None and (last is not base or self._where != where)

    def then(self, value: Any) -> _Seen:
        """The record after a call with `value`."""
        if not self.same(value):
            return _Seen(value)
        self.again = True
        return self


def _anchor(tensor: torch.Tensor) -> tuple[torch.Tensor, Hashable, int]:
    """The base of a view (or the tensor itself), where the view lies in it, and its version counter."""
    if tensor.is_inference():  # has no version counter
        return tensor, None, 0
    base = tensor._base if tensor._is_view() else None
    if base is None:
        return tensor, None, tensor._version
    return base, (tensor.storage_offset(), tuple(tensor.shape), tensor.stride()), tensor._version


@dataclass
class Tally:
    """Counts of the sublayers of one kind in one context.

    Args:
        computed: number of runs, including those stored or forced. Those of sublayers that are never reused are not
            seen: they are as many as in a counted call, or one a call if FLOPs are not known.
        stored: number of runs whose output was kept.
        reused: number of runs replaced by kept outputs.
        forced: number of runs that the plan had as a reuse, but whose source was not there.
        flops: FLOPs of the runs; 0 if they are not known.
        flops_without: FLOPs of the same calls without reuse.
        cache_bytes: bytes of slots held now on the device.
        peak_cache_bytes: the most bytes held at once on the device.
        host_bytes, peak_host_bytes: the same in host memory.
        seconds: time from a sublayer's turn to the next one or to its block's end, see `pab.enable`; None if it was not
            measured.
    """

    computed: int = 0
    stored: int = 0
    reused: int = 0
    forced: int = 0
    flops: int = 0
    flops_without: int = 0
    cache_bytes: int = 0
    peak_cache_bytes: int = 0
    host_bytes: int = 0
    peak_host_bytes: int = 0
    seconds: float | None = None

    @property
    def flops_saved(self) -> int:
        """FLOPs of the runs that were replaced, including those inside reused blocks."""
        return self.flops_without - self.flops


class Context:
    """One CFG branch of one generation: its slots and its counts.

    Args:
        name: its name in `summary`.
        meter: counts the generation's bytes.
        timed: whether seconds are measured.
    """

    def __init__(self, name: str, meter: Meters, *, timed: bool = False) -> None:
        self.name = name
        self.arena = Arena(meter)
        self.outputs = Arena(meter)
        """Outputs of the whole model, where it has a rule."""
        self.changed = False
        """Whether the last call had other inputs than the one before it."""
        self.stopwatch = Stopwatch() if timed else None
        self.calls: Counter[tuple[Arguments | None, tuple[str, ...], tuple[tuple[str, int], ...]]] = Counter()
        """Number of calls by arguments, places of reused outputs, and FLOPs saved inside running sublayers by kind."""
        self._tallies: dict[str, Tally] = {}
        self._looks: Hashable = None
        self._steady: list[_Seen] = []

    def exchanged(self, inputs: Inputs) -> Any:
        """The argument that shows that a call does not continue the last one of this context, or None.

        The prompt, its mask, rotary tables, ... are the same tensors at every step; the latents and the timestep are
        not. A different tensor shows a new prompt if the old one still exists, or if it came in two calls in a row. A
        tensor that is made for each call and freed after it shows nothing.
        """
        return next((t for seen, t in zip(self._steady, inputs.steady, strict=False) if seen.exchanged(t)), None)

    def continues(self, inputs: Inputs) -> bool:
        """Whether a call has the shapes and flags of the last one, and no steady argument was exchanged."""
        return self._looks in (None, inputs.looks) and self.exchanged(inputs) is None

    def holds(self, inputs: Inputs) -> bool:
        """Whether the last call had the same steady tensors and numbers, and at least one of them."""
        pairs = list(zip(self._steady, inputs.steady, strict=False))
        return self._looks == inputs.looks and bool(pairs) and all(seen.same(value) for seen, value in pairs)

    def enter(self, inputs: Inputs) -> Any:
        """Begin a call of the model; every slot is released if it does not continue the last call.

        Returns:
            The argument that was exchanged, or None.
        """
        same_looks = self._looks in (None, inputs.looks)
        exchanged = self.exchanged(inputs) if same_looks else None
        self.changed = exchanged is not None or not same_looks
        if self.changed:
            self.arena.clear()
            self.outputs.clear()
        if self._looks != inputs.looks or len(self._steady) != len(inputs.steady):
            self._looks, self._steady = inputs.looks, [_Seen(t) for t in inputs.steady]
        else:
            self._steady = [seen.then(t) for seen, t in zip(self._steady, inputs.steady, strict=True)]
        return exchanged

    def tally(self, kind: str) -> Tally:
        """The counts of a kind, to add to."""
        found = self._tallies.get(kind)
        if found is None:
            found = self._tallies[kind] = Tally()
        return found

    def add(self, other: Context) -> None:
        """Add the counts of `other`."""
        self.calls.update(other.calls)
        for kind, counted in other._tallies.items():
            tally = self.tally(kind)
            for name in ("computed", "stored", "reused", "forced"):
                setattr(tally, name, getattr(tally, name) + getattr(counted, name))

    @property
    def meters(self) -> dict[str, Meters]:
        """Counts the bytes of its slots, by kind."""
        return self.arena.meters | self.outputs.meters

    def tallies(self) -> dict[str, Tally]:
        """A copy of all counts by kind, with bytes and seconds; if seconds are measured, this waits for the device."""
        found, meters = {}, self.meters
        for kind, tally in tuple(self._tallies.items()):
            meter = meters.get(kind, Meters())
            host = {"host_bytes": meter.host.now, "peak_host_bytes": meter.host.peak}
            found[kind] = replace(tally, cache_bytes=meter.now, peak_cache_bytes=meter.peak, **host)
        if self.stopwatch is not None:
            seconds = self.stopwatch.seconds()
            found = {kind: replace(tally, seconds=seconds.get(kind, 0.0)) for kind, tally in found.items()}
        return found

    def rest_seconds(self) -> float | None:
        """Seconds of the model outside its sublayers; None if they are not measured."""
        return None if self.stopwatch is None else self.stopwatch.seconds().get(REST, 0.0)
