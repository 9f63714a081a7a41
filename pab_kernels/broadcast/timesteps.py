"""Finding the step of a call in its schedule by the timestep, without waiting for a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Moment:
    """The timestep of a call, as far as the host knows it.

    Args:
        value: its largest element: frames and tokens that condition the model are clean, at timestep 0.
        dtype: the dtype that it was rounded to; None for a number.
        single: whether it is one number for all rows and tokens.
        own: whether it is a view of the scheduler's own timesteps.
    """

    value: float
    dtype: torch.dtype | None = None
    single: bool = True
    own: bool = False


class Timesteps:
    """The timesteps of a schedule.

    Args:
        host: the timesteps as numbers; None if only their count is known.
        table: the scheduler's tensor of timesteps, whose views a sampling loop passes to the model.
    """

    def __init__(self, host: Sequence[float] | None, table: Any = None) -> None:
        self._host = host
        self.table = table if isinstance(table, torch.Tensor) and not table.is_meta else None
        self._divisor = 1
        self._rounded = cache(self._round)

    def moment(self, timestep: Any, *, wait: bool = False) -> Moment | None:
        """The moment of a call with this timestep; None if the host does not know its value.

        It knows numbers, tensors in host memory, and views of the scheduler's timesteps on any device.

        Args:
            timestep: number or tensor of any shape.
            wait: whether the host may wait for the device to read the value.
        """
        if not isinstance(timestep, torch.Tensor):
            return _of_numbers(timestep)
        if timestep.is_meta or not timestep.numel():
            return None
        single = timestep.numel() == 1 or not any(timestep.stride())
        place = self._place_in_table(timestep) if single else None
        if place is not None and self._host is not None:
            return Moment(self._host[place], timestep.dtype, own=True)
        if not (wait or _on_host(timestep)):
            return None
        with torch.no_grad():
            value = timestep.item() if timestep.numel() == 1 else timestep.amax().item()
            single = single or value == timestep.amin().item()
        return Moment(float(value), timestep.dtype, single)

    def _place_in_table(self, timestep: torch.Tensor) -> int | None:
        """The index of the entry of the scheduler's tensor that `timestep` is a view of, or None."""
        table = self.table
        if table is None or self._host is None or table.dtype != timestep.dtype or table.ndim != 1:
            return None
        if table.untyped_storage()._cdata != timestep.untyped_storage()._cdata or not table.stride(0):
            return None
        place, rest = divmod(int(timestep.storage_offset()) - int(table.storage_offset()), int(table.stride(0)))
        return place if not rest and 0 <= place < len(self._host) else None

    def _round(self, dtype: torch.dtype | None, divisor: int) -> tuple[float, ...]:
        """The timesteps that the model receives at each step: rounded to `dtype`, then divided."""
        host = torch.tensor(self._host or (), dtype=torch.float64)
        return tuple(((host if dtype is None else host.to(dtype)) / divisor).tolist())

    def recognise(self, moment: Moment | None) -> list[int]:
        """The possible steps of a run whose first call is at `moment`.

        A model is called with the timestep or with a thousandth of it; which one is decided here and kept. If both
        match a step (1 is the last timestep of many schedules, and a thousandth of the first), the earlier step wins.
        """
        found = {}
        for divisor in (1, 1000):
            self._divisor = divisor
            found[divisor] = self.places(moment)
        self._divisor = min(found, key=lambda divisor: (not found[divisor], found[divisor]))
        return found[self._divisor]

    def places(self, moment: Moment | None) -> list[int]:
        """The steps with this timestep: none if it is not in the schedule, sometimes two in second-order schedules.

        If it matches no step exactly, because it was rounded differently, the nearest step within bfloat16's precision
        counts.
        """
        if moment is None:
            return []
        times = self._rounded(moment.dtype, self._divisor)
        near = min(times, key=lambda t: abs(t - moment.value), default=math.inf)
        return [i for i, t in enumerate(times) if t == near] if math.isclose(near, moment.value, rel_tol=2**-7) else []

    def at(self, step: int, moment: Moment) -> bool:
        """Whether `moment` is the timestep of `step`."""
        return step in self.places(moment)

    @property
    def known(self) -> bool:
        """Whether the timesteps of the schedule are known."""
        return self._host is not None


def _of_numbers(timestep: Any) -> Moment | None:
    """The moment of a number of any library, or of a list of numbers."""
    try:
        values = [float(t) for t in timestep] if isinstance(timestep, (list, tuple)) else [float(timestep)]
    except (TypeError, ValueError):
        return None
    return Moment(max(values), single=len(set(values)) == 1) if values else None


def _on_host(timestep: torch.Tensor) -> bool:
    return timestep.device.type == "cpu"
