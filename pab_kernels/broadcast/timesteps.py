"""Where a call stands in its generation's schedule, told by its timestep without waiting for a device."""

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
        value: its largest element: frames and tokens that are given are clean, at timestep 0.
        dtype: that it was rounded to; None for a number.
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
        host: as numbers, or None where only their count is known.
        table: the scheduler's own tensor of them, of which loops pass views.
    """

    def __init__(self, host: Sequence[float] | None, table: Any = None) -> None:
        self._host = host
        self.table = table if isinstance(table, torch.Tensor) and not table.is_meta else None
        self._divisor = 1
        self._rounded = cache(self._round)

    def moment(self, timestep: Any, *, wait: bool = False) -> Moment | None:
        """The moment of a call with this timestep; None where it is not known.

        Known are numbers, tensors in the host's memory, and views of the scheduler's timesteps wherever they are.

        Args:
            timestep: number or tensor of any shape.
            wait: whether the host may wait for the device to read it.
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
        """Which entry of the scheduler's tensor `timestep` is a view of."""
        table = self.table
        if table is None or self._host is None or table.dtype != timestep.dtype or table.ndim != 1:
            return None
        if table.untyped_storage()._cdata != timestep.untyped_storage()._cdata or not table.stride(0):
            return None
        place, rest = divmod(int(timestep.storage_offset()) - int(table.storage_offset()), int(table.stride(0)))
        return place if not rest and 0 <= place < len(self._host) else None

    def _round(self, dtype: torch.dtype | None, divisor: int) -> tuple[float, ...]:
        """What the model is called with at each step, rounded as a tensor of `dtype` is."""
        host = torch.tensor(self._host or (), dtype=torch.float64)
        return tuple(((host if dtype is None else host.to(dtype)) / divisor).tolist())

    def recognise(self, moment: Moment | None) -> list[int]:
        """The steps at which a run can be that is called first at `moment`; from then on models are taken to be called
        alike.

        Models are called with the timestep, or with a thousandth of it. Where both are in the schedule (1 is the last
        of many, and a thousandth of the first), the run is at its beginning.
        """
        found = {}
        for divisor in (1, 1000):
            self._divisor = divisor
            found[divisor] = self.places(moment)
        self._divisor = min(found, key=lambda divisor: (not found[divisor], found[divisor]))
        return found[self._divisor]

    def places(self, moment: Moment | None) -> list[int]:
        """The steps of this timestep: none where it is not in the schedule, two of some in schedules of second order.

        Where none has it exactly, as it was rounded on another way, it is that of the nearest step within bfloat16's
        precision.
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
        """Whether there are timesteps to compare with."""
        return self._host is not None


def _of_numbers(timestep: Any) -> Moment | None:
    """That of a number of any library, or of a list of numbers."""
    try:
        values = [float(t) for t in timestep] if isinstance(timestep, (list, tuple)) else [float(timestep)]
    except (TypeError, ValueError):
        return None
    return Moment(max(values), single=len(set(values)) == 1) if values else None


def _on_host(timestep: torch.Tensor) -> bool:
    return timestep.device.type == "cpu"
