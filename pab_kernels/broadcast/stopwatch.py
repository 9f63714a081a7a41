"""Measuring the seconds of each kind of sublayer without waiting for the device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

REST = "rest"
"""The kind of the time that the model spends outside its sublayers."""


@dataclass(frozen=True)
class Mark:
    """A moment from which time is attributed to `kind`.

    Args:
        kind: a kind of sublayers, `REST`, or None for time that is not counted.
        moment: seconds of the host's clock, or an event in the stream of a CUDA device.
        device: the device that works.
    """

    kind: str | None
    moment: float | torch.cuda.Event
    device: torch.device

    @classmethod
    def now(cls, kind: str | None, device: torch.device) -> Mark:
        """A mark at the current time of the host, or at the current end of the device's stream."""
        if device.type != "cuda":
            return cls(kind, time.perf_counter(), device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return cls(kind, event, device)


class Stopwatch:
    """Seconds by kind in one context of a generation.

    The time between two marks is attributed to the kind of the first. On a CUDA device a mark is an event, and only
    `seconds` waits for it. An interval that begins on one device and ends on another is left out.
    """

    def __init__(self) -> None:
        self._marks: list[Mark] = []
        self._totals: dict[str, float] = {}

    @property
    def kind(self) -> str | None:
        """The kind that time is attributed to now."""
        return self._marks[-1].kind if self._marks else None

    def mark(self, kind: str | None, device: torch.device | None = None) -> None:
        """Attribute time from now on to `kind`.

        Args:
            kind: see `Mark`.
            device: the device that works; default that of the last mark. Without either, nothing is marked.
        """
        if device is None and not self._marks:
            return
        self._marks.append(Mark.now(kind, device or self._marks[-1].device))
        if not isinstance(self._marks[-1].moment, torch.cuda.Event):
            self._add_up()

    def seconds(self) -> dict[str, float]:
        """Seconds by kind up to the last mark; waits for the device."""
        if self._marks and isinstance(event := self._marks[-1].moment, torch.cuda.Event):
            event.synchronize()
        self._add_up()
        return dict(self._totals)

    def _add_up(self) -> None:
        for begin, end in zip(self._marks, self._marks[1:], strict=False):
            if begin.kind is not None and begin.device == end.device:
                self._totals[begin.kind] = self._totals.get(begin.kind, 0.0) + _between(begin.moment, end.moment)
        self._marks = self._marks[-1:]


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3  # milliseconds
    assert isinstance(begin, float) and isinstance(end, float), "both are of one device"
    return end - begin
