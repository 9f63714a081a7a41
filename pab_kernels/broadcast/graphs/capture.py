"""Capturing work on a CUDA device as a graph and replaying it; the only module that uses torch's CUDA graphs."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path
from traceback import extract_tb
from typing import Any, Protocol

import torch

_ONE_AT_A_TIME = threading.RLock()
"""Lets a process capture one CUDA graph at a time."""


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for all captures on a device: libraries keep a workspace for each stream that they are used on."""
    return torch.cuda.Stream(device)


class Capture(Protocol):
    """Makes graphs."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the graphs share."""

    def warm_up(self, run: Callable[[], Any]) -> Any:
        """Return `run()`, run on the stream of the capture, so that libraries set up their state there."""

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture the work that `run` queues, without doing it; return the replay function and the result of `run`."""


class CudaCapture:
    """CUDA graphs in one memory pool, captured on a side stream and replayed on the current one.

    Args:
        device: the device of everything that is captured.

    Raises:
        RuntimeError: the device is no CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RuntimeError(
                f"the model was called with tensors on {device}, and CUDA graphs need a CUDA device: move the model "
                "and its inputs to one, or leave cuda_graphs out of pab.enable"
            )
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = _stream(device)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, which holds the intermediate tensors and outputs of the captured work."""
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
        """See `Capture`; waits for the device. Other threads may allocate meanwhile."""
        graph = torch.cuda.CUDAGraph()
        # If a capture fails, torch.cuda.graph does not restore the current stream; the outer `stream` does.
        captured = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with _ONE_AT_A_TIME, torch.cuda.stream(self._stream), captured:
            out = run()
        return graph.replay, out


def line_of(error: BaseException) -> str:
    """The source line at which an error was raised, in the innermost function outside torch."""
    frames = [f for f in extract_tb(error.__traceback__) if Path(torch.__file__).parent not in Path(f.filename).parents]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else "an unknown line"
