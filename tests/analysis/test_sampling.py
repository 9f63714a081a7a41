"""One run of a pipeline: PAB on and off again, time, and the most memory that was in use."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")


from pab_kernels import PABConfig
from pab_kernels.analysis import sampling
from pab_kernels.analysis.sampling import in_words, peak_memory
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.broadcast.graphs import graphs
from pab_kernels.compat import execution_device
from tests.adapters.tiny_latte import sample, tiny_pipe
from tests.broadcast.graphs.graph_recorder import Recorder

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = torch.device("cpu")


def test_pab_is_on_during_the_run_and_off_afterwards() -> None:
    pipe = tiny_pipe()
    plain = sampling.sample(pipe, lambda: (broadcaster_of(pipe.transformer), sample(pipe, 2)))
    assert plain.output[0] is None and plain.summary is None and plain.seconds > 0
    on = sampling.sample(
        pipe, lambda: (broadcaster_of(pipe.transformer), sample(pipe, 2)), PABConfig(spatial=1), timed=True
    )
    assert (
        on.output[0] is not None
        and torch.equal(on.output[1], plain.output[1])
        and broadcaster_of(pipe.transformer) is None
    )
    assert on.summary is not None and on.summary.rest_seconds is not None and 0 < on.summary.rest_seconds < on.seconds


def test_graphs_are_captured_before_the_time_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "CudaCapture", Recorder)
    pipe, seen = tiny_pipe(), []

    def call() -> torch.Tensor:
        seen.append(
            0 if (on := broadcaster_of(pipe.transformer)) is None or on.latest is None else len(on.latest.graphs or ())
        )
        return sample(pipe, 4)

    plain = sampling.sample(pipe, call, PABConfig(spatial=2))
    replayed = sampling.sample(pipe, call, PABConfig(spatial=2), cuda_graphs=True)
    assert replayed.summary is not None and replayed.summary.graphs is not None and replayed.summary.graphs > 1
    assert seen == [0, 0, replayed.summary.graphs] and torch.equal(replayed.output, plain.output)


def test_pab_is_off_after_an_error() -> None:
    pipe = tiny_pipe()
    with pytest.raises(ZeroDivisionError):
        sampling.sample(pipe, lambda: 1 / 0, PABConfig(spatial=1))
    assert broadcaster_of(pipe.transformer) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the counter of resident bytes is Linux's")
def test_the_peak_of_resident_memory_is_that_of_what_runs_inside() -> None:
    size = 64 * 2**20
    with peak_memory(CPU) as large:
        torch.ones(size, dtype=torch.uint8)
    with peak_memory(CPU) as small:
        pass
    if large.nbytes is None:
        pytest.skip("this system does not let a process set its counter back")
    assert small.nbytes is not None and size // 2 < large.nbytes - small.nbytes < 3 * size
    assert large.what == "resident in the process"


def test_where_memory_cannot_be_measured_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(sampling, "_CLEAR", tmp_path / "no" / "such" / "file")
    with peak_memory(CPU) as peak:
        pass
    assert (peak.nbytes, peak.what) == (None, "not measured")


def test_on_a_cuda_device_the_peak_is_the_allocator_s_and_the_device_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[str] = []
    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: done.append(f"{name} {device}") or 7)
    pipe: Any = SimpleNamespace(_execution_device=torch.device("cuda", 1))
    run = sampling.sample(pipe, lambda: done.append("run"))
    assert done == ["reset_peak_memory_stats cuda:1", "run", "synchronize cuda:1", "max_memory_allocated cuda:1"]
    assert (run.memory.nbytes, run.memory.what) == (7, "allocated on the device")


def test_a_device_is_told_in_words() -> None:
    assert in_words(CPU).endswith("CPU, 1 threads") and in_words(torch.device("meta")) == "meta"
    assert execution_device(tiny_pipe()) == CPU
