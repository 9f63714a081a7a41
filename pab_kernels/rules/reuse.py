"""Reuses: how kept outputs of a sublayer replace one that is not computed. Add a class here to add a reuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .schedule import Schedule


class Reuse(Protocol):
    """The value `c_0 + sum_k w_k (c_0 - c_k)` of the newest kept output c_0 and those before it, c_1, c_2, ..."""

    @property
    def outputs(self) -> int:
        """Number of outputs that are read, if that many are kept."""

    def weights(self, step: int, sources: Sequence[int], schedule: Schedule) -> tuple[float, ...]:
        """The weights w_1, w_2, ... at a step.

        Args:
            step: at which the value is read.
            sources: the steps that wrote the outputs, the newest first.
            schedule: of the generation, with its timesteps if known.
        """


class Hold:
    """The newest output: `c`."""

    outputs = 1

    def weights(self, step: int, sources: Sequence[int], schedule: Schedule) -> tuple[float, ...]:
        """None."""
        return ()


class Linear:
    """The line through the two newest outputs: `c + w (c - c_prev)` with `w = (i - s) / (s - p)`, all in steps."""

    outputs = 2

    def weights(self, step: int, sources: Sequence[int], schedule: Schedule) -> tuple[float, ...]:
        """The weight of the line; none if only one output is kept."""
        return tuple((step - sources[0]) / (sources[0] - before) for before in sources[1:])


class Forecast(Hold):
    """Kind `model` only: the newest output stands in until the scheduler's `step`, which gets a forecast instead.

    See `broadcast/forecaster.py`.
    """


REUSES: dict[str, Reuse] = {"hold": Hold(), "linear": Linear(), "forecast": Forecast()}
"""By their names in rules."""
