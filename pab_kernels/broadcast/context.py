"""Contexts: the branches of classifier-free guidance, each with its slots and its counts."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch

from .costs import Arguments
from .slots import Arena, Meter
from .stopwatch import REST, Stopwatch


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
        seconds: from a sublayer's turn to the next one, or to its block's end, where it was asked for: see `pab.enable`.
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
        """How often the model was called with such arguments, reusing outputs of these places, sparing FLOPs of these kinds."""
        self._tallies: dict[str, Tally] = {}
        self._inputs: Hashable = None
        self._condition: weakref.ref[torch.Tensor] | None = None

    def enter(self, inputs: Hashable, condition: torch.Tensor | None) -> None:
        """A call of the model begins. Where it does not continue the last one, every slot is let go.

        Args:
            inputs: shapes, dtypes and devices of the model's inputs, and the flags among them.
            condition: the prompt's tensor, if the context has only the order of the calls for a name: another one than in the last call
                tells that a branch came or went. One made anew for each call is gone by then, and tells nothing.
        """
        last = None if self._condition is None else self._condition()
        changed = condition is not None and last is not None and condition is not last
        if changed or self._inputs not in (None, inputs):
            self.arena.clear()
        self._inputs = inputs
        self._condition = None if condition is None else weakref.ref(condition)

    def tally(self, kind: str) -> Tally:
        """The counts of a kind."""
        return self._tallies.setdefault(kind, Tally())

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
            kind: replace(tally, cache_bytes=meters[kind].now, peak_cache_bytes=meters[kind].peak) if kind in meters else replace(tally)
            for kind, tally in tuple(self._tallies.items())
        }
        if self.stopwatch is not None:
            seconds = self.stopwatch.seconds()
            found = {kind: replace(tally, seconds=seconds.get(kind, 0.0)) for kind, tally in found.items()}
        return found

    def rest_seconds(self) -> float | None:
        """Of the model outside of its sublayers, where seconds are measured."""
        return None if self.stopwatch is None else self.stopwatch.seconds().get(REST, 0.0)
