"""One run of a pipeline, with PAB or without: what comes out, how long it takes, how much memory it needs."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

from .. import api
from ..broadcast.summary import Summary
from ..compat import execution_device
from ..messages import shown
from ..rules.config import PABConfig
from .memory import Peak, peak_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Sampled(Generic[T]):
    """What a run did.

    Args:
        output: of the pipeline.
        seconds: wall time of the pipeline's call, the device waited for.
        memory: the most that was in use.
        summary: PAB's, or None.
    """

    output: T
    seconds: float
    memory: Peak
    summary: Summary | None

    def speedup(self, reference: Sampled[T]) -> float:
        """How many times faster it is than `reference`."""
        return reference.seconds / self.seconds


def sample(
    pipe: Any, call: Callable[[], T], config: PABConfig | None = None, *, timed: bool = False, cuda_graphs: bool = False
) -> Sampled[T]:
    """Run `call` with PAB switched on, and off again afterwards; without a config, as the pipeline is.

    Args:
        pipe: the pipeline that `call` runs.
        call: runs it.
        config: PAB's rules.
        timed: whether PAB's summary has seconds.
        cuda_graphs: whether calls of the model under PAB are replayed; `call` is run once before, to capture them.
    """
    device = execution_device(pipe)
    if config is not None:
        api.enable(pipe, config, timed=timed, cuda_graphs=cuda_graphs)
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


def check_seed(first: int, count: int = 1) -> None:
    """Refuse seeds that torch's generators do not take.

    Raises:
        ValueError: one of `count` seeds from `first` on does not fit into 64 bits.
    """
    if not -(2**63) <= first <= 2**64 - count:
        raise ValueError(f"seed must fit into 64 bits, got {shown(first)}")


def in_words(device: torch.device) -> str:
    """The name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return str(device)
