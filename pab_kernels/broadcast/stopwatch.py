"""Seconds that each kind of sublayer takes, measured without waiting for the device."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

REST = "rest"
"""What time in the model belongs to outside of its sublayers."""


@dataclass(frozen=True)
class Mark:
    """A moment: from here on time belongs to `kind`, or where that is None to nobody.

    Args:
        kind: a kind of sublayers, or `REST`.
        moment: seconds of the host's clock, or an event in the stream of a CUDA device.
        device: of the tensors that are worked on.
    """

    kind: str | None
    moment: float | torch.cuda.Event
    device: torch.device

    @classmethod
    def now(cls, kind: str | None, device: torch.device) -> Mark:
        """The moment that the host, or the device's stream, has come to."""
        if device.type != "cuda":
            return cls(kind, time.perf_counter(), device)
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return cls(kind, event, device)


class Stopwatch:
    """Seconds by kind in one context of a generation.

    Time from one mark to the next belongs to the kind of the first. On a CUDA device a mark is an event, and only
    `seconds` waits for it. A stretch that begins on one device and ends on another is left out.
    """

    def __init__(self) -> None:
        self._marks: list[Mark] = []
        self._totals: dict[str, float] = {}

    @property
    def kind(self) -> str | None:
        """What time belongs to now."""
        return self._marks[-1].kind if self._marks else None

    def mark(self, kind: str | None, device: torch.device | None = None) -> None:
        """From here on time belongs to `kind`.

        Without `device` it is that of the mark before; where there is none, nothing is marked.
        """
        if device is None and not self._marks:
            return
        self._marks.append(Mark.now(kind, device or self._marks[-1].device))
        if not isinstance(self._marks[-1].moment, torch.cuda.Event):
            self._add_up()

    def seconds(self) -> dict[str, float]:
        """By kind, all that was marked so far; waits for the device."""
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
