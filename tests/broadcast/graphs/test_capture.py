"""`CudaCapture` asks torch for what it should, in the right order.

tests/broadcast/graphs/test_cuda_graphs_gpu.py has it at work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from pab_kernels.broadcast.graphs import capture
from pab_kernels.broadcast.graphs.capture import CudaCapture, line_of

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[mock.MagicMock]:
    """torch.cuda, as far as it is used, writing down what it is asked for."""
    asked = mock.MagicMock()
    asked.graph_pool_handle.return_value = (0, 7)
    asked.graph.side_effect = mock.create_autospec(torch.cuda.graph, return_value=asked.captured)
    asked.memory_snapshot.side_effect = mock.create_autospec(
        torch.cuda.memory_snapshot, return_value=[{"total_size": 3}, {"total_size": 4}]
    )
    asked.captured.__exit__.return_value = asked.on_stream.__exit__.return_value = None
    asked.stream.return_value = asked.on_stream
    for name in ("graph_pool_handle", "Stream", "CUDAGraph", "graph", "stream", "current_stream", "memory_snapshot"):
        monkeypatch.setattr(torch.cuda, name, getattr(asked, name))
    capture._stream.cache_clear()
    yield asked
    capture._stream.cache_clear()


def test_it_runs_on_a_stream_of_its_own_that_waits_for_the_callers_and_is_waited_for(asked: mock.MagicMock) -> None:
    side, caller = asked.Stream.return_value, asked.current_stream.return_value
    assert CudaCapture(DEVICE).warm_up(asked.run) is asked.run.return_value
    done = [name for name, *_ in asked.mock_calls]
    order = ["Stream().wait_stream", "on_stream.__enter__", "run", "on_stream.__exit__", "current_stream().wait_stream"]
    assert [done.index(name) for name in order] == sorted(done.index(name) for name in order)
    side.wait_stream.assert_called_once_with(caller)
    caller.wait_stream.assert_called_once_with(side)


def test_graphs_are_captured_on_that_stream_into_one_pool(asked: mock.MagicMock) -> None:
    made = CudaCapture(DEVICE)
    for _ in range(2):
        replay, out = made.capture(asked.run)
        assert out is asked.run.return_value and replay is asked.CUDAGraph.return_value.replay
        how = {"pool": (0, 7), "stream": asked.Stream.return_value, "capture_error_mode": "thread_local"}
        asked.graph.assert_called_with(asked.CUDAGraph.return_value, **how)
    assert asked.graph_pool_handle.call_count == asked.Stream.call_count == 1 and asked.CUDAGraph.call_count == 2
    CudaCapture(DEVICE)
    assert asked.graph_pool_handle.call_count == 2 and asked.Stream.call_count == 1, (
        "streams keep workspaces: there is one"
    )
    assert made.nbytes == 7
    asked.memory_snapshot.assert_called_with((0, 7))


def test_a_capture_that_fails_gives_the_callers_stream_back(asked: mock.MagicMock) -> None:
    asked.captured.__exit__.side_effect = RuntimeError("the capture was invalidated")
    asked.run.side_effect = ValueError("it reads")
    with pytest.raises(RuntimeError) as raised:
        CudaCapture(DEVICE).capture(asked.run)
    assert asked.on_stream.__exit__.called and isinstance(raised.value.__context__, ValueError)
    asked.captured.__exit__.side_effect = None
    asked.run.side_effect = None
    CudaCapture(DEVICE).capture(asked.run)  # the lock is free


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_other_devices_are_refused(device: str) -> None:
    with pytest.raises(
        RuntimeError, match=f"called with tensors on {device}, and CUDA graphs need a CUDA device: move the model"
    ):
        CudaCapture(torch.device(device))


def test_the_line_of_an_error_is_the_innermost_line_that_is_not_torchs() -> None:
    def fails() -> Any:
        return torch.nn.functional.linear(torch.ones(2), torch.ones(3, 3))

    with pytest.raises(RuntimeError) as raised:
        torch.nn.Sequential()(fails())
    assert line_of(raised.value).startswith("test_capture.py:") and "linear(torch.ones(2)" in line_of(raised.value)
    assert line_of(RuntimeError()) == "an unknown line"
