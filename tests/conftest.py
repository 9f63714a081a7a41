"""What every test has: poisoned memory, one seed, one thread, no network."""

from __future__ import annotations

import os

# Read when the libraries are imported, or by the processes that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = (
    ":4096:8"  # without it cuBLAS warns where deterministic algorithms are asked for
)
os.environ["OMP_NUM_THREADS"] = "1"

import gc
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read where a kernel is defined: without a GPU kernels run in Triton's interpreter
    )

gc.disable()  # while the tests and what they need are imported: see `pytest_collection_finish`
torch.set_num_threads(1)  # shapes are tiny: a second thread costs more than it brings

# pytest listens to loggers that do not propagate, and torch traces every compilation for whoever listens to this one.
logging.getLogger("torch.__trace").propagate = True

# The same examples in every run, and no time limit on one or on the search for them: timings are not tests.
hypothesis.settings.register_profile(
    "pab_kernels",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("pab_kernels")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` and its like are filled with NaN (integers with their maximum): an element that nobody writes fails
    a test.

    torch does it itself where deterministic algorithms are asked for, in C++ as well as in Python, but not in the code
    that inductor generates. An operation that has no deterministic form warns; pyproject.toml ignores that warning.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_mode_is_left() -> Iterator[None]:
    """Where torch takes a dispatch mode to be active, it compiles once more what it has compiled already."""
    yield
    assert not torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals()


@pytest.fixture(autouse=True)
def _forgotten_graphs() -> Iterator[None]:
    """No test finds what another one compiled.

    torch keeps the graphs of a process by code, and `Module.compile` compiles code that all modules share: those left
    behind count against the limit of the next test. Whoever needs more than the limit of 8 patches `recompile_limit`.
    """
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def no_flops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs of a summary, and bytes for a budget, are not known, but in tests with the marker `flops`: measuring them
    takes a call on the meta device, longer than all steps of a tiny model."""
    if request.node.get_closest_marker("flops") is None:
        monkeypatch.setattr("pab_kernels.broadcast.generation.call_costs", lambda *_: None)


@pytest.fixture
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of equal models with equal arguments share their run on the meta device."""
    from tests import measured_once

    monkeypatch.setattr("pab_kernels.analysis.forecasts.forecasting.measure", measured_once.measure_once)
    monkeypatch.setattr("pab_kernels.broadcast.generation.call_costs", measured_once.call_costs_once)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


LONGEST = (
    "kernels/test_compiled.py",
    "adapters/test_latte_compiled.py",
    "adapters/test_stdit3_compiled.py",
    "works_with/test_compile.py",
    "works_with/test_shared_graphs.py",
    "works_with/test_context_parallel.py",
    "parallel/test_compiled.py",
    "parallel/test_tokens.py",
    "parallel/test_launch.py",
    "csrc/test_wheel.py",
    "csrc/test_compiled.py",
    "test_docs.py",
    "broadcast/test_interrupted.py",
    "adapters/test_fused_triton.py",
)
"""Files with few tests that take long: they come first, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at its million objects whenever it runs."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)  # a traced graph makes and drops hundreds of thousands of objects
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # nanobind looks for what is left at the end


@pytest.fixture
def patched() -> Iterator[None]:
    """diffusers' `enable_cache` uses this package, and afterwards is what it was."""
    import pab_kernels as pab
    from tests.patched import METHODS, CacheMixin

    pab.patch_diffusers()
    with torch.no_grad():
        yield
    pab.unpatch_diffusers()
    assert {name: vars(CacheMixin)[name] for name in METHODS} == METHODS and "_pab_patch" not in vars(CacheMixin)
