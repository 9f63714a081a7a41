"""Slots at fixed addresses, as CUDA graphs need them: an arena that keeps its memory from one generation to the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .signature import copy_into, like, signature
from .slots import Arena, Key, Meter


class FixedPlace:
    """Memory for the outputs of one sublayer in one context.

    Args:
        value: an output.
        two: whether the one before the newest is kept too.
    """

    def __init__(self, value: Any, two: bool) -> None:
        self.newest = like(value)
        self.before = like(value) if two else None

    def write(self, value: Any) -> None:
        """Make `value` the newest. That is always at the same address, so that one graph reads it at every step: the older one moves."""
        if self.before is not None:
            copy_into(self.before, self.newest)
        copy_into(self.newest, value)


Places = dict[tuple[str, Hashable], FixedPlace]
"""By the name of a sublayer and what its outputs look like."""


@dataclass(frozen=True)
class Change:
    """What a call did to an arena: `Arena.put` or, without a place, `Arena.release`. How many outputs it left follows from the step."""

    name: str
    place: FixedPlace | None = None
    kind: str = ""
    key: Key | None = None
    dtype: torch.dtype | None = None


class FixedArena(Arena):
    """An arena whose slots lie in `places`. Letting go of a slot leaves its memory for the next one.

    Args:
        meter: of the bytes of all contexts; counts what is held, not what is kept for later.
        places: of the context; those that are missing are made.
        linear: names of the sublayers whose reuse reads two outputs.
        writes: whether outputs are written to their places.
    """

    fixed = True

    def __init__(self, meter: Meter, places: Places, linear: Collection[str], *, writes: bool = True) -> None:
        super().__init__(meter)
        self.places = places
        self.changes: list[Change] = []
        self._linear = linear
        self._writes = writes
        self._rehearsed = False

    def rehearsal(self, *, writes: bool) -> FixedArena:
        """An arena with these slots, for a call that is repeated as it was: one that does something else is an error."""
        copy = FixedArena(Meter(), self.places, self._linear, writes=writes)
        copy.weights, copy._kinds, copy._slots, copy._rehearsed = self.weights, dict(self._kinds), dict(self._slots), True
        return copy

    def put(self, name: str, kind: str, value: Any, key: Key, source: int, dtype: torch.dtype | None = None, most: int = 1) -> None:
        """See `Arena.put`; `value` is copied.

        Raises:
            TypeError: there is something in `value` that cannot be kept at a fixed address.
        """
        looks = name, signature(value, f"the output of {name}")
        if looks not in self.places:
            if self._rehearsed:
                raise RuntimeError(f"{name} gave another output than in a call before with the same inputs")
            self.places[looks] = FixedPlace(value, name.partition("#")[0] in self._linear)
        place = self.places[looks]
        if self._writes:
            place.write(value)
        self._hold(Change(name, place, kind, key, dtype), source, most)

    def release(self, name: str, most: int = 0) -> None:
        """See `Arena.release`."""
        self.changes.append(Change(name))
        super().release(name, most)

    def repeat(self, changes: Sequence[Change], step: int, held: Callable[[str], int]) -> None:
        """Make the changes of a call like this one, whose outputs are written already.

        Args:
            changes: of the call.
            step: of this one.
            held: how many outputs of a sublayer stay after it.
        """
        stored = {change.name for change in changes if change.place is not None}
        for change in changes:
            most = held(change.name.partition("#")[0])
            if change.place is None:
                super().release(change.name, max(0, most - (change.name in stored)))
            else:
                self._hold(change, step, most)

    def _hold(self, change: Change, source: int, most: int) -> None:
        place, name = change.place, change.name
        assert place is not None and change.key is not None
        if name in self._slots:
            self._slots[name] = tuple(replace(s, value=place.before) if s.value is place.newest else s for s in self._slots[name])
        super().put(name, change.kind, place.newest, change.key, source, change.dtype, most)
        self.changes.append(change)
