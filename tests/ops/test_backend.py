"""One place chooses the backend, and says why one cannot serve."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from pab_kernels import ops
from pab_kernels.ops.backend import BACKENDS, IMPLEMENTATIONS, choose, load
from tests.ops.tensors import assert_refuses

QKV = [torch.zeros(1, 2, 1, 32)] * 3
X = torch.zeros(1, 2, 8)
CALLS = {
    "broadcast_residual": lambda **kw: ops.broadcast_residual(X, [X], **kw),
    "broadcast_residual_out": lambda **kw: ops.broadcast_residual_out(X, [X], x_out=X.clone(), **kw),
    "project_residual": lambda **kw: ops.project_residual(X, torch.eye(8), None, X, **kw),
    "project_residual_out": lambda **kw: ops.project_residual_out(X, torch.eye(8), None, X, x_out=X.clone(), **kw),
    "attention": lambda **kw: ops.attention(*QKV, **kw),
    "attention_out": lambda **kw: ops.attention_out(*QKV, out=torch.empty(1, 2, 1, 32), **kw),
    "short_attention": lambda **kw: ops.short_attention(*QKV, **kw),
    "short_attention_out": lambda **kw: ops.short_attention_out(*QKV, out=torch.empty(1, 2, 1, 32), **kw),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_explicit_backend_that_cannot_serve_raises_with_the_reason(name):
    op = name.removesuffix("_out")
    assert_refuses(ops.BackendError, f"{op}: backend 'cutlass' is unknown", CALLS[name], backend="cutlass")
    for backend in set(BACKENDS) - set(IMPLEMENTATIONS[op]):
        assert_refuses(ops.BackendError, f"{op}: backend {backend!r} has no kernel", CALLS[name], backend=backend)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_auto_and_the_reference_serve_everywhere(name, backend):
    CALLS[name](backend=backend)


def test_backend_errors_are_runtime_errors():
    assert issubclass(ops.BackendError, RuntimeError)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_auto_is_the_reference(op):
    assert choose(op, "auto") == "reference"


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_that_is_added_to_the_table_is_called_by_name_only(name, monkeypatch):
    op, called = name.removesuffix("_out"), []
    kernel = types.ModuleType("kernel")
    setattr(kernel, name, lambda *args: called.append(args))
    monkeypatch.setitem(sys.modules, f"pab_kernels.ops.{op}.triton", kernel)
    monkeypatch.setitem(IMPLEMENTATIONS, op, ("reference", "triton"))
    load.cache_clear()
    CALLS[name]()
    assert not called
    CALLS[name](backend="triton")
    assert len(called) == 1
    load.cache_clear()
