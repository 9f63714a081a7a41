"""Copies between a device and host memory that run beside the device's work."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Bus(Protocol):
    """Queues copies. Work that is queued later on the current stream does not wait for them until `wait`."""

    def to_host(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        """Queue copies to host memory, after all work queued so far.

        Returns:
            The copies, and what to wait for. Until then nothing may write to `tensors` or free them.
        """

    def to_device(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        """Queue copies to the device, after all work queued so far.

        Returns:
            The copies, and what to wait for. Until then nothing may read the copies or free them.
        """

    def wait(self, done: Any) -> None:
        """Let work that is queued from now on wait for copies; the host does not wait."""


class CudaBus:
    """Copies on two streams of a CUDA device, one each way, from and to pinned memory.

    Copies on the device come from the allocator's pool of the current stream, and what is freed returns to it: `wait`
    orders all uses, so memory is free at once, and as much is used in every step.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def to_host(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event]:
        """See `Bus`."""
        copies = [torch.empty_like(t, device="cpu", pin_memory=True) for t in tensors]
        return copies, self._copy(self._down, tensors, copies)

    def to_device(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event]:
        """See `Bus`."""
        copies = [torch.empty_like(t, device=self._device, pin_memory=False) for t in tensors]
        return copies, self._copy(self._up, tensors, copies)

    def wait(self, done: torch.cuda.Event) -> None:
        """See `Bus`."""
        torch.cuda.current_stream(self._device).wait_event(done)

    def _copy(
        self, stream: torch.cuda.Stream, sources: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]
    ) -> torch.cuda.Event:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for copy, source in zip(copies, sources, strict=True):
                copy.copy_(source, non_blocking=True)
        return stream.record_event()


@functools.cache
def bus_of(device: torch.device) -> Bus | None:
    """What copies between a device and host memory; None for a CPU, whose memory that is.

    Raises:
        ValueError: it is neither a CPU nor a CUDA device.
    """
    if device.type == "cpu":
        return None
    if device.type == "cuda":
        return CudaBus(device)
    raise ValueError(
        f"got cache_device='cpu' for a model on {device}; outputs are moved to host memory from CUDA devices: leave "
        "cache_device out, or give a budget"
    )
