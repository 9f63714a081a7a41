"""Slots at fixed addresses for CUDA graphs: an arena whose memory stays from one generation to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..signature import copy_into, like, signature
from ..slots import Arena, Key, Meters, Slot


class FixedPlace:
    """Memory for the outputs of one sublayer in one context.

    Args:
        value: an output, as an example.
        outputs: the number of outputs to keep.
    """

    def __init__(self, value: Any, outputs: int) -> None:
        self.values = [like(value) for _ in range(outputs)]
        """Newest first."""

    def write(self, value: Any) -> None:
        """Copy `value` in as the newest output, and move the older ones on.

        The newest output is always at the same address, so one graph can read it at every step.
        """
        for older, newer in zip(self.values[:0:-1], self.values[-2::-1], strict=True):
            copy_into(older, newer)
        copy_into(self.values[0], value)

    def moved(self, slot: Slot) -> Slot:
        """`slot` with its value at the new place, after a further output was written."""
        ages = [age for age, value in enumerate(self.values[:-1]) if value is slot.value]
        return replace(slot, value=self.values[ages[0] + 1]) if ages else slot


Places = dict[tuple[str, Hashable], FixedPlace]
"""Places by the name of a sublayer and the signature of its output."""


@dataclass(frozen=True)
class Change:
    """One change of a call to an arena: `Arena.put` or, without a place, `Arena.release`.

    The number of outputs held after it depends on the step, so it is not part of the change.
    """

    name: str
    place: FixedPlace | None = None
    kind: str = ""
    key: Key | None = None
    dtype: torch.dtype | None = None


class FixedArena(Arena):
    """An arena whose slots lie in `places`; releasing a slot keeps its memory for the next one.

    Args:
        meter: counts the bytes of slots of all contexts, without places that hold no slot.
        places: the places of the context; missing ones are added.
        outputs: returns how many outputs of a sublayer are read at once, by its name.
        writes: whether outputs are written to their places.
    """

    fixed = True

    def __init__(self, meter: Meters, places: Places, outputs: Callable[[str], int], *, writes: bool = True) -> None:
        super().__init__(meter)
        self.places = places
        self.changes: list[Change] = []
        self._outputs = outputs
        self._writes = writes
        self._rehearsed = False

    def rehearsal(self, *, writes: bool) -> FixedArena:
        """A copy of the arena for repeating a call, in which an output without a place is an error.

        Args:
            writes: whether outputs are written to their places.
        """
        copy = FixedArena(Meters(), self.places, self._outputs, writes=writes)
        copy.meters = {kind: Meters() for kind in self.meters}
        copy.weights, copy._kinds, copy._slots = self.weights, dict(self._kinds), dict(self._slots)
        copy._rehearsed = True
        return copy

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
        """See `Arena.put`; `value` is copied to its place.

        Raises:
            TypeError: `value` contains an object that is neither a tensor nor a plain value.
            RuntimeError: in a rehearsal, the output has no place.
        """
        assert sent is None, "refused with CUDA graphs"
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
        """Apply the changes of a captured call after its replay, which has written the outputs.

        Args:
            changes: the changes of the captured call.
            step: the step of the replay.
            held: returns how many outputs of a sublayer are held after the step, by its name.
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
