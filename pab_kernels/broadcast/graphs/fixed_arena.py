"""Slots at fixed addresses, as CUDA graphs need them: an arena that keeps its memory from one generation to the
next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..signature import copy_into, like, signature
from ..slots import Arena, Key, Meter, Slot


class FixedPlace:
    """Memory for the outputs of one sublayer in one context.

    Args:
        value: an output.
        outputs: how many are kept.
    """

    def __init__(self, value: Any, outputs: int) -> None:
        self.values = [like(value) for _ in range(outputs)]
        """The newest first."""

    def write(self, value: Any) -> None:
        """Make `value` the newest.

        That is always at the same address, so that one graph reads it at every step: the older ones move.
        """
        for older, newer in zip(self.values[:0:-1], self.values[-2::-1], strict=True):
            copy_into(older, newer)
        copy_into(self.values[0], value)

    def moved(self, slot: Slot) -> Slot:
        """A slot here, after a further output was written."""
        ages = [age for age, value in enumerate(self.values[:-1]) if value is slot.value]
        return replace(slot, value=self.values[ages[0] + 1]) if ages else slot


Places = dict[tuple[str, Hashable], FixedPlace]
"""By the name of a sublayer and what its outputs look like."""


@dataclass(frozen=True)
class Change:
    """What a call did to an arena: `Arena.put` or, without a place, `Arena.release`. How many outputs it left follows
    from the step."""

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
        outputs: how many outputs of a sublayer are read at once, by its name.
        writes: whether outputs are written to their places.
    """

    fixed = True

    def __init__(self, meter: Meter, places: Places, outputs: Callable[[str], int], *, writes: bool = True) -> None:
        super().__init__(meter)
        self.places = places
        self.changes: list[Change] = []
        self._outputs = outputs
        self._writes = writes
        self._rehearsed = False

    def rehearsal(self, *, writes: bool) -> FixedArena:
        """An arena with these slots, for a call that is repeated as it was: one that does something else is an
        error."""
        copy = FixedArena(Meter(), self.places, self._outputs, writes=writes)
        copy.meters = {kind: Meter() for kind in self.meters}
        copy.weights, copy._kinds, copy._slots, copy._rehearsed = (
            self.weights,
            dict(self._kinds),
            dict(self._slots),
            True,
        )
        return copy

    def put(
        self, name: str, kind: str, value: Any, key: Key, source: int, dtype: torch.dtype | None = None, most: int = 1
    ) -> None:
        """See `Arena.put`; `value` is copied.

        Raises:
            TypeError: there is something in `value` that cannot be kept at a fixed address.
        """
        looks = name, signature(value, f"the output of {name}")
        if looks not in self.places:
            if self._rehearsed:
                raise RuntimeError(f"{name} gave another output than in a call before with the same inputs")
            self.places[looks] = FixedPlace(value, self._outputs(name.partition("#")[0]))
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
            self._slots[name] = tuple(map(place.moved, self._slots[name]))
        super().put(name, change.kind, place.values[0], change.key, source, change.dtype, most)
        self.changes.append(change)
