"""One place chooses the backend, and says why one cannot serve."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pab_kernels import ops
from pab_kernels.ops import BackendError, Line, Quantized
from pab_kernels.ops import backend as backends
from pab_kernels.ops.attention import Attention
from pab_kernels.ops.backend import BACKENDS, IMPLEMENTATIONS, choose, is_traced, load
from pab_kernels.ops.broadcast_residual import BroadcastResidual
from pab_kernels.ops.dequantize import Dequantize
from pab_kernels.ops.project_residual import ProjectResidual
from pab_kernels.ops.quantize import Quantize
from pab_kernels.ops.short_attention import ShortAttention
from tests.ops.tensors import assert_refuses

QKV = [torch.zeros(1, 2, 1, 32)] * 3
X = torch.zeros(1, 2, 8)
EIGHT = ops.quantize(X, torch.int8)
CALLS = {
    "broadcast_residual": lambda **kw: ops.broadcast_residual(X, [X], **kw),
    "project_residual": lambda **kw: ops.project_residual(X, torch.eye(8), None, X, **kw),
    "attention": lambda **kw: ops.attention(*QKV, **kw),
    "short_attention": lambda **kw: ops.short_attention(*QKV, **kw),
    "quantize": lambda **kw: ops.quantize(X, torch.int8, **kw),
    "dequantize": lambda **kw: ops.dequantize(EIGHT, X.dtype, **kw),
}


@pytest.fixture(autouse=True)
def _fresh_imports():
    for asked in (load, backends.capability):
        asked.cache_clear()
    yield
    for asked in (load, backends.capability):
        asked.cache_clear()


def kernel(monkeypatch, op, **functions):
    """Put a kernel into the table, under the name of one that no operation has."""
    module = types.ModuleType("kernel")
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, f"pab_kernels.ops.{op}.cuda", module)
    monkeypatch.setitem(IMPLEMENTATIONS, op, ("reference", "cuda"))


@pytest.mark.parametrize("op", CALLS)
def test_an_explicit_backend_that_has_no_kernel_raises(op):
    assert_refuses(ops.BackendError, f"{op}: backend 'cutlass' is unknown", CALLS[op], backend="cutlass")
    for backend in set(BACKENDS) - set(IMPLEMENTATIONS[op]):
        assert_refuses(ops.BackendError, f"{op}: backend {backend!r} has no kernel", CALLS[op], backend=backend)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_auto_and_the_reference_serve_everywhere(name, backend):
    CALLS[name](backend=backend)


def test_backend_errors_are_runtime_errors():
    assert issubclass(ops.BackendError, RuntimeError)


@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_auto_is_the_reference_on_a_cpu(op):
    assert choose(op, "auto", (X,)) == "reference"


def test_a_compiled_call_is_plain_torch_where_no_kernel_is_preferred_for_the_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for op in IMPLEMENTATIONS:
        assert is_traced(op, "auto", cpu) and is_traced(op, "reference", cpu) and not is_traced(op, "triton", cpu)
        assert is_traced(op, "auto", cuda) == ("triton" not in IMPLEMENTATIONS[op])
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("triton",))
    assert not is_traced("attention", "auto", cpu) and is_traced("quantize", "auto", cpu)


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_that_is_added_to_the_table_is_called_where_asked_for(name, monkeypatch):
    called = []
    kernel(monkeypatch, name, refusal=lambda call: None, launch=lambda *args: called.append(args))
    CALLS[name]()
    assert not called
    CALLS[name](backend="cuda")
    assert len(called) == 1


@pytest.mark.parametrize("name", CALLS)
def test_auto_takes_the_preferred_kernel_of_a_device_where_it_can_serve(name, monkeypatch):
    called, refusals = [], [None, "it is Sunday"]
    kernel(
        monkeypatch,
        name,
        refusal=lambda call: refusals.pop(0),
        launch=lambda *args: called.append(args),
    )
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("cuda",))
    CALLS[name]()
    assert len(called) == 1
    CALLS[name]()  # refused: the reference serves
    assert len(called) == 1 and not refusals


@pytest.mark.parametrize("name", CALLS)
def test_an_explicit_backend_that_cannot_serve_says_why(name, monkeypatch):
    kernel(monkeypatch, name, refusal=lambda call: "it is Sunday", launch=None)
    assert_refuses(ops.BackendError, "backend 'cuda' cannot serve this call; it is Sunday", CALLS[name], backend="cuda")


def test_a_kernel_language_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "attention", ("reference", "cuda"))

    def missing(name):
        raise ModuleNotFoundError("no", name="triton")

    monkeypatch.setattr(backends, "import_module", missing)
    message = "backend 'cuda' cannot serve this call; it needs the package triton, which is not installed"
    assert_refuses(ops.BackendError, message, CALLS["attention"], backend="cuda")
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("cuda",))
    assert choose("attention", "auto", (X,)) == "reference"


@pytest.mark.parametrize(
    "case", ["attention", "short_attention", "broadcast_residual", "project_residual slot", "project_residual store"]
)
def test_float8_is_left_to_the_reference_on_a_gpu_that_lacks_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    op, capability = case.split()[0], [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    with FakeTensorMode():
        q = torch.empty(2, 7, 2, 72, dtype=torch.bfloat16, device="cuda")
        slot = Quantized(
            torch.empty(q.shape, dtype=torch.float8_e4m3fn, device="cuda"), torch.empty(2, 7, 2, 1, device="cuda")
        )
        call = {
            "attention": Attention(q, q, q, store_dtype=torch.float8_e4m3fn),
            "short_attention": ShortAttention(q, q, q, store_dtype=torch.float8_e4m3fn),
            "broadcast_residual": BroadcastResidual(q, ((slot, None),)),
            "project_residual slot": ProjectResidual(q, q, None, q, cached=((slot, None),)),
            "project_residual store": ProjectResidual(q, q, None, q, None, "pre_gate", torch.float8_e4m3fn),
        }[case]
        assert choose(op, "auto", call) == "reference"
        with pytest.raises(BackendError, match="compute capability 8.9"):
            choose(op, "triton", call)
        capability[0] = (8, 9)
        backends.capability.cache_clear()
        assert choose(op, "auto", call) == "triton"


@pytest.mark.parametrize("case", ["broadcast_residual", "short_attention", "quantize", "dequantize"])
def test_4_bits_are_not_for_cuda_kernels(case: str) -> None:
    four, q = ops.quantize(X, torch.int4), torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)
    call = {
        "broadcast_residual": BroadcastResidual(X, ((Line(X, four, torch.ones(())), None),)),
        "short_attention": ShortAttention(q, q, q, store_dtype=torch.int4),
        "quantize": Quantize(X, torch.int4, 32),
        "dequantize": Dequantize(four, torch.float32),
    }[case]
    with pytest.raises(BackendError, match="is torch.int4; torch.int8 and torch.float8_e4m3fn are supported"):
        choose(case, "cuda", call)
    assert choose(case, "auto", call) == "reference"


@pytest.mark.parametrize("op", ["attention", "short_attention", "broadcast_residual", "project_residual"])
def test_a_gpu_that_triton_does_not_compile_for_is_left_to_the_reference(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        q = torch.empty(2, 7, 2, 72, dtype=torch.float16, device="cuda")
        call = {
            "attention": Attention(q, q, q),
            "short_attention": ShortAttention(q, q, q),
            "broadcast_residual": BroadcastResidual(q),
            "project_residual": ProjectResidual(q, q, None, q),
        }[op]
        for reason in ("compute capability 7.5; 8.0 or later", "NVIDIA's GPUs; cuda:0 is another's"):
            monkeypatch.setattr(torch.version, "hip", "7.0" if "NVIDIA" in reason else None)
            assert choose(op, "auto", call) == "reference"
            with pytest.raises(BackendError, match=reason):
                choose(op, "triton", call)


RECORDED = torch.zeros(1, 2, 8, requires_grad=True)
RECORDING = {
    "an activation": lambda **kw: ops.broadcast_residual(RECORDED, [X], **kw),
    "a slot": lambda **kw: ops.broadcast_residual(X, [X, RECORDED], **kw),
    "a norm": lambda **kw: ops.broadcast_residual(X, norm=ops.Norm(weight=RECORDED[0, 0]), **kw),
    "a scale": lambda **kw: ops.dequantize(Quantized(EIGHT.data, EIGHT.scale.clone().requires_grad_()), X.dtype, **kw),
}


@pytest.mark.parametrize("name", RECORDING)
def test_no_gradient_is_lost_in_silence(name, monkeypatch):
    call, op, launched = RECORDING[name], "dequantize" if name == "a scale" else "broadcast_residual", []
    kernel(
        monkeypatch,
        op,
        refusal=lambda call: None,
        launch=lambda *args: launched.append(args),
    )
    monkeypatch.setitem(backends.PREFERRED, "cpu", ("cuda",))
    outputs = call()
    assert any(t.requires_grad for t in (outputs if isinstance(outputs, tuple) else (outputs,)))
    assert_refuses(
        ops.BackendError, "backend 'cuda' cannot serve this call; a gradient would be recorded", call, backend="cuda"
    )
    assert not launched
    with torch.no_grad():
        call(), call(backend="cuda")
    assert len(launched) == 2
