"""The most memory that was in use while something ran."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Peak:
    """The most memory in use.

    Args:
        nbytes: None where it cannot be measured.
        what: what was measured.
    """

    nbytes: int | None = None
    what: str = "not measured"


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure what runs inside: on a CUDA device what torch allocated there, else what the process held of the
    machine's memory.

    The latter is read off Linux's counter of the most resident bytes, which is set back first; other systems have none
    that can be.

    Args:
        device: on which the work is done.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.nbytes, peak.what = torch.cuda.max_memory_allocated(device), "allocated on the device"
        return
    resettable = device.type == "cpu" and _reset_resident()
    yield peak
    if resettable:
        peak.nbytes, peak.what = _most_resident(), "resident in the process"


def _reset_resident() -> bool:
    """Set the most resident bytes back to those resident now; whether the system does that."""
    try:
        _CLEAR.write_text("5")  # proc(5)
        return _STATUS.is_file()
    except OSError:
        return False


def _most_resident() -> int:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024
