"""Times what runs on a device: input sets in rotation, CUDA-graph replay, events; and the device's own ceilings.

On CUDA one pass over all input sets is captured into a graph and replayed between two events. The sets together are
larger than three times the L2 cache, so that no call finds its inputs there. The host waits once, after everything was
launched. On the CPU calls are timed by the wall clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

CACHE_MULTIPLE = 3
"""The input sets are larger than this many times the L2 cache."""

MAX_SETS = 1024
"""More nodes would make a graph's own launch slow; only shapes for tests would need more."""

REPLAY_SECONDS, REPEAT_SECONDS, CANDIDATE_SECONDS = 2e-3, 10e-3, 2.0
"""At least this long takes a replay, so that its launch is hidden; a repeat, so that events resolve it; at most this
long all repeats of a candidate, down to `MIN_REPEATS`."""

MIN_REPEATS = 5

CLOCK_SECONDS = 0.15
"""How long the device is kept busy while its clocks are read."""


ReadClocks = Callable[[], dict[str, Any]] | None
"""Asks the device for its clocks, or nothing does."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, for every repeat, and what was found while the device was busy.

    Args:
        seconds: of one call, by repeat.
        method: "graph" (replay, timed with events) or "wall clock".
        result: what the first input set gave in a run of exactly what was timed, into poisoned memory.
        clocks: what `read_clocks` gave while the device was busy, or None.
    """

    seconds: list[float]
    method: str
    result: Any
    clocks: dict[str, Any] | None

    @property
    def median(self) -> float:
        """The median of the repeats."""
        return statistics.median(self.seconds)


def cache_bytes(device: torch.device) -> int:
    """Size of the L2 cache, 0 on the CPU, where the rotation claims nothing."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def sets_needed(set_bytes: int, cache: int) -> int:
    """The fewest input sets, at least two, that together are larger than `CACHE_MULTIPLE` times the cache."""
    return max(2, CACHE_MULTIPLE * cache // set_bytes + 1)


def measure(
    call: Callable[[int], Any],
    sets: int,
    repeats: int,
    device: torch.device,
    poison: Callable[[Any], None] = lambda result: None,
    read_clocks: ReadClocks = None,
) -> Timing:
    """Time `call(i)`, which computes on input set i, over all sets in turn.

    Args:
        call: launches work on the current stream and does not wait for it.
        repeats: at most; slow calls have fewer.
        poison: overwrites a result, before the run that the timing's `result` is of.
        read_clocks: asked once while the device is busy.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what other streams still write is read by this one
        with torch.cuda.stream(torch.cuda.Stream(device)):
            return _replays(call, sets, repeats, poison, read_clocks)
    return _wall_clock(call, sets, repeats, poison)


def _replays(
    call: Callable[[int], Any],
    sets: int,
    repeats: int,
    poison: Callable[[Any], None],
    read_clocks: ReadClocks,
) -> Timing:
    for i in range(sets):
        call(i)
    first, last = _events()
    first.record()
    for i in range(sets):
        call(i)
    last.record()
    last.synchronize()
    estimate = first.elapsed_time(last) / 1e3  # of a pass, launch gaps included
    passes = min(ceil(REPLAY_SECONDS / estimate), ceil(256 / sets))
    kept: list[Any] = [None] * sets  # an output of one set must not lie where the previous set's lay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(passes):
            for i in range(sets):
                kept[i] = call(i)
    for _ in range(2):
        graph.replay()
    first.record()
    graph.replay()
    last.record()
    last.synchronize()
    replay = max(first.elapsed_time(last) / 1e3, 1e-6)
    replays = ceil(REPEAT_SECONDS / replay)
    repeats = max(min(repeats, int(CANDIDATE_SECONDS / (replays * replay))), min(repeats, MIN_REPEATS))
    pairs = [_events() for _ in range(repeats)]
    graph.replay()  # the first event is recorded while the device is busy: the host is ahead from then on
    for start, end in pairs:
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
    torch.cuda.current_stream().synchronize()
    seconds = [start.elapsed_time(end) / 1e3 / (replays * passes * sets) for start, end in pairs]
    clocks = None
    if read_clocks is not None:
        for _ in range(ceil(CLOCK_SECONDS / replay)):
            graph.replay()
        clocks = read_clocks()
    poison(kept[0])
    graph.replay()
    torch.cuda.current_stream().synchronize()
    return Timing(seconds, "graph", kept[0], clocks)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _wall_clock(call: Callable[[int], Any], sets: int, repeats: int, poison: Callable[[Any], None]) -> Timing:
    for i in range(sets):
        call(i)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for i in range(sets):
            call(i)
        seconds.append((time.perf_counter() - start) / sets)
    poison(call(0))
    return Timing(seconds, "wall clock", call(0), None)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches, measured in the run that the shares refer to.

    Args:
        copy: bytes a second of a large copy, read plus written.
        matmul: FLOPs a second of a large matrix product of random numbers, in the dtype of the run.
        clocks: as in `Timing`, during the matrix product.
    """

    copy: float
    matmul: float
    clocks: dict[str, Any] | None

    def floor(self, moved: int, flops: int) -> float:
        """Seconds that no implementation can go below: the larger of the two times."""
        return max(moved / self.copy, flops / self.matmul)


def ceilings(device: torch.device, dtype: torch.dtype, repeats: int, read_clocks: ReadClocks) -> Ceilings:
    """Measure them. On the CPU at sizes for a smoke test."""
    elements, width = (2**28, 8192) if device.type == "cuda" else (2**21, 256)
    product = _matmul(width, dtype, device, repeats, read_clocks)
    return Ceilings(
        8 * elements / _copy(elements, device, repeats).median, 2 * width**3 / product.median, product.clocks
    )


def _copy(elements: int, device: torch.device, repeats: int) -> Timing:
    sources = [torch.randn(elements, device=device) for _ in range(2)]
    targets = [torch.empty_like(source) for source in sources]
    return measure(lambda i: targets[i].copy_(sources[i]), 2, repeats, device)


def _matmul(width: int, dtype: torch.dtype, device: torch.device, repeats: int, read_clocks: ReadClocks) -> Timing:
    a, b = ([torch.randn(width, width, device=device).to(dtype) for _ in range(2)] for _ in range(2))
    return measure(lambda i: a[i] @ b[i], 2, repeats, device, read_clocks=read_clocks)
