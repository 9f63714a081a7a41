"""Capturing work on a CUDA device as a graph, and replaying it: the one place that knows torch's CUDA graphs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import Any, Protocol

import torch

_ONE_AT_A_TIME = threading.RLock()
"""A process captures one CUDA graph at a time."""


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """For whatever is captured on a device: libraries keep a workspace for every stream that they have seen."""
    return torch.cuda.Stream(device)


class Capture(Protocol):
    """What graphs are made with."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the graphs have between them."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """What `run` returns, run where it will be captured: what libraries make when they are first used is then
        there."""

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """The work that `run` queues on the device, as a graph, without doing it: what replays it, and what `run`
        returned."""


class CudaCapture:
    """CUDA graphs in one memory pool, captured on another stream and replayed on whichever is current.

    Args:
        device: where everything that is captured runs.

    Raises:
        RuntimeError: the device has no CUDA graphs.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(
                f"the model was called with tensors on {device}, and CUDA graphs need a CUDA device: move the model "
                "and its inputs there, "
                "or leave cuda_graphs out of pab.enable"
            )
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _stream(device)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool: what the captured work writes between its inputs and its outputs."""
        return sum(segment["total_size"] for segment in torch.cuda.memory_snapshot(self._pool))

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """See `Capture`."""
        caller = torch.cuda.current_stream(self._stream.device)
        with _ONE_AT_A_TIME:
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                out = run()
        caller.wait_stream(self._stream)
        return out

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See `Capture`; waits for the device. Allocations of other threads are not disturbed."""
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its stream behind as the current one where a capture fails.
        captured = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with _ONE_AT_A_TIME, torch.cuda.stream(self._stream), captured:
            out = run()
        return graph.replay, out


def line_of(error: BaseException) -> str:
    """The line in which an error was raised: of the innermost function that is not torch's."""
    frames = [f for f in extract_tb(error.__traceback__) if Path(torch.__file__).parent not in Path(f.filename).parents]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else "an unknown line"
