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
from .slots import Arena, Meter
from .stopwatch import REST, Stopwatch


class _Seen:
    """An argument of the last call, and whether the call before it had the same.

    A view is known by what it is a view of and where it begins there: one that is made for each call is the same again.

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
        """Whether it is this one again, as it was."""
        if not isinstance(value, torch.Tensor):
            return self._tensor is None and bool(self._where == value)
        base, where, version = _anchor(value)
        return self._tensor is not None and self._tensor() is base and (self._where, self._version) == (where, version)

    def exchanged(self, value: Any) -> bool:
        """Whether another one shows that another prompt is meant: this one is still there, or was the same in two
        calls."""
        if self.same(value):
            return False
        if self.again or self._tensor is None or not isinstance(value, torch.Tensor):
            return self.again
        last, (base, where, _) = self._tensor(), _anchor(value)
        return last is not None and (last is not base or self._where != where)

    def then(self, value: Any) -> _Seen:
        """What is known after a call with `value`."""
        if not self.same(value):
            return _Seen(value)
        self.again = True
        return self


def _anchor(tensor: torch.Tensor) -> tuple[torch.Tensor, Hashable, int]:
    """The tensor that a view is of, or the tensor itself.

    Where the view lies in it; and how often it was written to.
    """
    if tensor.is_inference():  # torch does not count the writes
        return tensor, None, 0
    base = tensor._base if tensor._is_view() else None
    if base is None:
        return tensor, None, tensor._version
    return base, (tensor.storage_offset(), tuple(tensor.shape), tensor.stride()), tensor._version


@dataclass
class Tally:
    """What the sublayers of one kind did in one context.

    Args:
        computed: runs, those below included.
        stored: runs whose output was kept.
        reused: turns that read kept outputs instead.
        forced: runs that the plan had as a reuse, but what was kept was not what it planned to read.
        flops: of what ran; 0 where none are known.
        flops_without: of the same calls with nothing reused.
        cache_bytes: bytes held now.
        peak_cache_bytes: the most that were held.
        seconds: from a sublayer's turn to the next one, or to its block's end, where it was asked for: see
            `pab.enable`.
    """

    computed: int = 0
    stored: int = 0
    reused: int = 0
    forced: int = 0
    flops: int = 0
    flops_without: int = 0
    cache_bytes: int = 0
    peak_cache_bytes: int = 0
    seconds: float | None = None

    @property
    def flops_saved(self) -> int:
        """FLOPs of what was reused instead, also as a part of a reused block."""
        return self.flops_without - self.flops


class Context:
    """One CFG branch of one generation: its slots and its counts.

    Args:
        name: as `summary` has it.
        meter: of the generation's bytes.
        timed: whether seconds are measured.
    """

    def __init__(self, name: str, meter: Meter, *, timed: bool = False) -> None:
        self.name = name
        self.arena = Arena(meter)
        self.stopwatch = Stopwatch() if timed else None
        self.calls: Counter[tuple[Arguments | None, tuple[str, ...], tuple[tuple[str, int], ...]]] = Counter()
        """How often the model was called with such arguments, reusing outputs of these places, sparing FLOPs of these
        kinds."""
        self._tallies: dict[str, Tally] = {}
        self._looks: Hashable = None
        self._steady: list[_Seen] = []

    def exchanged(self, inputs: Inputs) -> Any:
        """The argument by which a call shows that it does not continue the last one of this context, or None.

        The prompt, its mask, rotary tables, ... are the same tensors at every step, and the latents and the timestep
        are not. Another tensor shows another prompt where the one before is still there, or was the same in two calls.
        One that is made for each call and gone by the next shows nothing.
        """
        return next((t for seen, t in zip(self._steady, inputs.steady, strict=False) if seen.exchanged(t)), None)

    def continues(self, inputs: Inputs) -> bool:
        """Whether a call has the shapes and flags of the last one, and nothing was exchanged."""
        return self._looks in (None, inputs.looks) and self.exchanged(inputs) is None

    def holds(self, inputs: Inputs) -> bool:
        """Whether the last call had all these tensors and numbers, and at least one."""
        pairs = list(zip(self._steady, inputs.steady, strict=False))
        return self._looks == inputs.looks and bool(pairs) and all(seen.same(value) for seen, value in pairs)

    def enter(self, inputs: Inputs) -> Any:
        """A call of the model begins. Where it does not continue the last one, every slot is released.

        Returns:
            The argument that was exchanged, or None.
        """
        same_looks = self._looks in (None, inputs.looks)
        exchanged = self.exchanged(inputs) if same_looks else None
        if exchanged is not None or not same_looks:
            self.arena.clear()
        if self._looks != inputs.looks or len(self._steady) != len(inputs.steady):
            self._looks, self._steady = inputs.looks, [_Seen(t) for t in inputs.steady]
        else:
            self._steady = [seen.then(t) for seen, t in zip(self._steady, inputs.steady, strict=True)]
        return exchanged

    def tally(self, kind: str) -> Tally:
        """The counts of a kind."""
        found = self._tallies.get(kind)
        if found is None:
            found = self._tallies[kind] = Tally()
        return found

    def add(self, other: Context) -> None:
        """Count what `other` counted once more."""
        self.calls.update(other.calls)
        for kind, counted in other._tallies.items():
            tally = self.tally(kind)
            for name in ("computed", "stored", "reused", "forced"):
                setattr(tally, name, getattr(tally, name) + getattr(counted, name))

    def tallies(self) -> dict[str, Tally]:
        """A copy of all counts by kind, with bytes and, where they are measured, seconds. These wait for the device."""
        meters = self.arena.meters
        found = {
            kind: replace(tally, cache_bytes=meters[kind].now, peak_cache_bytes=meters[kind].peak)
            if kind in meters
            else replace(tally)
            for kind, tally in tuple(self._tallies.items())
        }
        if self.stopwatch is not None:
            seconds = self.stopwatch.seconds()
            found = {kind: replace(tally, seconds=seconds.get(kind, 0.0)) for kind, tally in found.items()}
        return found

    def rest_seconds(self) -> float | None:
        """Of the model outside of its sublayers, where seconds are measured."""
        return None if self.stopwatch is None else self.stopwatch.seconds().get(REST, 0.0)
