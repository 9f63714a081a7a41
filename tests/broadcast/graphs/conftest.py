"""Inference, as everywhere under PAB; and a recorder in the place of CUDA's graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pab_kernels.broadcast.graphs import graphs
from tests.broadcast.graphs.graph_recorder import Recorder


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """All recorders that are made, the newest last."""
    made: list[Recorder] = []

    def recorder(device: torch.device) -> Recorder:
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setattr(graphs, "CudaCapture", recorder)
    return made
