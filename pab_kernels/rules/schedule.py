"""The steps of one generation, as host data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..messages import shown

MOST_STEPS = 10_000
"""The longest schedule: ten times as many steps as models are trained with."""


@dataclass(frozen=True)
class Schedule:
    """The full schedule of a generation, and the part of it that is run.

    Args:
        num_steps: N, the steps of the full schedule.
        timesteps: the timestep of each step, descending, or None where they are not known.
        begin: the first step that is run; above 0 in image-to-image, and after another model's steps.
        end: the step at which another model takes over; None to run to the last step.

    Raises:
        ValueError: a value is out of bounds, or the number of timesteps is not `num_steps`.
    """

    num_steps: int
    timesteps: tuple[float, ...] | None = None
    begin: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"num_steps must be a whole number of at least 1, got {shown(self.num_steps)}")
        check_steps(self.num_steps, "num_steps")
        if self.timesteps is not None and len(self.timesteps) != self.num_steps:
            raise ValueError(
                f"num_steps={self.num_steps} does not fit {len(self.timesteps)} timesteps; pass one of the two"
            )
        if self.end is not None and (
            isinstance(self.end, bool) or not isinstance(self.end, int) or not 0 < self.end <= self.num_steps
        ):
            raise ValueError(f"end must be a whole number in 1..{self.num_steps}, got {shown(self.end)}")
        stop = self.num_steps if self.end is None else self.end
        if isinstance(self.begin, bool) or not isinstance(self.begin, int) or not 0 <= self.begin < stop:
            raise ValueError(f"begin must be a whole number in 0..{stop - 1}, got {shown(self.begin)}")

    @property
    def steps(self) -> range:
        """The steps that are run."""
        return range(self.begin, self.num_steps if self.end is None else self.end)

    @classmethod
    def of(
        cls,
        num_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        begin: int = 0,
        end: int | None = None,
    ) -> Schedule:
        """A schedule from a number of steps, or from timesteps (a sequence or tensor, read to the host once).

        Raises:
            ValueError: neither is given, they contradict each other, or the timesteps are not finite numbers.
        """
        if timesteps is not None:
            host = _row_of_numbers(timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps)
            return cls(num_steps if num_steps is not None else len(host), host, begin, end)
        if num_steps is None:
            raise ValueError("a plan needs num_steps= or timesteps=; got neither")
        return cls(num_steps, None, begin, end)

    def require_timesteps(self, what: str) -> tuple[float, ...]:
        """The timesteps; a ValueError if they are not known. `what` is the rule that counts in them."""
        if self.timesteps is None:
            raise ValueError(
                f"{what} counts in timesteps, but only num_steps={self.num_steps} is known; pass timesteps=, or a "
                "window in fractions"
            )
        return self.timesteps


def check_steps(steps: int, name: str = "steps") -> None:
    """Raise a ValueError if there are more than `MOST_STEPS`."""
    if steps > MOST_STEPS:
        raise ValueError(f"{name} must be at most {MOST_STEPS:,}, got {shown(steps)}")


def _row_of_numbers(values: Any) -> tuple[float, ...]:
    try:
        host = tuple(map(float, islice(values, MOST_STEPS + 1)))  # a generator may be endless
    except (OverflowError, TypeError, ValueError):
        host = ()
    check_steps(len(host), "the number of timesteps")
    if not host or not all(map(math.isfinite, host)):
        raise ValueError(f"timesteps must be a sequence of finite numbers, got {shown(values)}; pass the scheduler's")
    return host
