"""One run of a pipeline, with or without PAB: its output, time and peak memory."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from .. import api
from ..broadcast.summary import Summary
from ..compat import execution_device
from ..messages import shown
from ..rules.config import CacheDevice, PABConfig

T = TypeVar("T")
_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # proc(5)


@dataclass
class Peak:
    """The peak memory of a run.

    Args:
        nbytes: None if it cannot be measured.
        what: which memory was measured.
    """

    nbytes: int | None = None
    what: str = "not measured"


@dataclass(frozen=True)
class Sampled(Generic[T]):
    """One run of a pipeline.

    Args:
        output: of the pipeline.
        seconds: wall time of the call, until the device is done.
        memory: peak memory in use.
        summary: PAB's, or None.
    """

    output: T
    seconds: float
    memory: Peak
    summary: Summary | None

    def speedup(self, reference: Sampled[T]) -> float:
        """How many times faster the run is than `reference`."""
        return reference.seconds / self.seconds


def sample(
    pipe: Any,
    call: Callable[[], T],
    config: PABConfig | None = None,
    *,
    timed: bool = False,
    cuda_graphs: bool = False,
    budget: int | float | str | None = None,
    cache_device: CacheDevice | None = None,
) -> Sampled[T]:
    """Run a pipeline with PAB enabled during the run, or as it is.

    Args:
        pipe: the pipeline that `call` runs.
        call: runs it.
        config: PAB's rules, or None to leave PAB alone.
        timed: whether PAB's summary has seconds.
        cuda_graphs: whether calls of the model under PAB are replayed; a previous run of `call` captures them.
        budget, cache_device: the most bytes that the run keeps, and where; as in `pab.enable`.

    Returns:
        Output, time and memory of the run.
    """
    device = execution_device(pipe)
    if config is not None:
        api.enable(pipe, config, timed=timed, cuda_graphs=cuda_graphs, budget=budget, cache_device=cache_device)
    try:
        if config is not None and cuda_graphs:
            call()
        with peak_memory(device) as memory:
            begin = time.perf_counter()
            output = call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - begin
        return Sampled(output, seconds, memory, api.summary(pipe) if config is not None else None)
    finally:
        if config is not None:
            api.disable(pipe)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory of the block: allocated by torch on a CUDA device, else resident in the process.

    The latter needs Linux, whose counter of peak resident bytes is reset first.

    Args:
        device: of the computation.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.nbytes, peak.what = torch.cuda.max_memory_allocated(device), "allocated on the device"
        return
    try:
        _CLEAR.write_text("5")
    except OSError:
        yield peak
        return
    yield peak
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    peak.nbytes, peak.what = int(fields["VmHWM"].split()[0]) * 1024, "resident in the process"


def check_seed(first: int, count: int = 1) -> None:
    """Refuse seeds that torch's generators do not take.

    Raises:
        ValueError: one of the `count` seeds from `first` on is no whole number or does not fit into 64 bits.
    """
    whole = isinstance(first, int) and not isinstance(first, bool)
    if not whole or not -(2**63) <= first <= 2**64 - count:
        raise ValueError(f"seed must be a whole number that fits into 64 bits, got {shown(first)}")


def in_words(device: torch.device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return str(device)
