"""A stand-in for the bus of a CUDA device on the CPU: copies hold nothing until they are waited for, and it notes the
order of all that happens."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch

from pab_kernels.broadcast import offload


def _poisoned(t: torch.Tensor) -> torch.Tensor:
    made = torch.empty_like(t)
    made.view(torch.uint8 if made.ndim else made.dtype).fill_(0xFF if made.ndim else 77)
    return made


@dataclass(eq=False)
class Copies:
    """Copies that are on their way.

    Args:
        sources, copies: what is copied, which must not be freed before it was waited for.
    """

    way: str
    sources: list[weakref.ref[torch.Tensor]]
    copies: list[weakref.ref[torch.Tensor]]
    nbytes: int
    values: list[torch.Tensor] = field(default_factory=list)
    waited: int = 0


class BusRecorder:
    """Copies on the CPU.

    Args:
        early: whether sources are read when a copy is queued; default when it is waited for. A device may do either.
    """

    def __init__(self, early: bool = False) -> None:
        self.early = early
        self.log: list[Copies] = []
        """The copies, and again each that was waited for, in order."""
        self.present = self.most_present = 0
        """Bytes that were fetched and are not freed, now and at the most."""

    def to_host(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Copies]:
        """See `Bus`."""
        return self._queue("to host", tensors)

    def to_device(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Copies]:
        """See `Bus`."""
        copies, queued = self._queue("to device", tensors)
        for t in copies:
            self._count(t.nbytes)
            weakref.finalize(t, self._count, -t.nbytes)
        return copies, queued

    def wait(self, done: Copies) -> None:
        """See `Bus`."""
        self.log.append(done)
        done.waited += 1
        if done.waited > 1:
            return
        for i, (source, copy) in enumerate(zip(done.sources, done.copies, strict=True)):
            given, made = source(), copy()
            assert given is not None, f"freed before it was copied {done.way}"
            if made is not None:  # a slot that was released again
                made.copy_(done.values[i] if self.early else given)

    def queued(self, way: str) -> list[Copies]:
        """All copies of one way, in order."""
        return [copies for copies in dict.fromkeys(self.log) if copies.way == way]

    @property
    def pending(self) -> list[Copies]:
        """The copies that nothing has waited for."""
        return [copies for copies in self.log if not copies.waited]

    def _queue(self, way: str, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Copies]:
        copies = [_poisoned(t) for t in tensors]
        queued = Copies(way, list(map(weakref.ref, tensors)), list(map(weakref.ref, copies)), 0)
        queued.nbytes = sum(t.nbytes for t in tensors)
        queued.values = [t.clone() for t in tensors] if self.early else []
        self.log.append(queued)
        return copies, queued

    def _count(self, nbytes: int) -> None:
        self.present += nbytes
        self.most_present = max(self.most_present, self.present)


@contextlib.contextmanager
def recorded(early: bool = False) -> Iterator[BusRecorder]:
    """A recorder between the CPU as a device and the CPU as a host."""
    bus = BusRecorder(early)
    with mock.patch.object(offload, "bus_of", lambda device: bus):
        yield bus
