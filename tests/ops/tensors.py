"""Makes the tensors of the tests, compares results, and looks at what a compiled function calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from pab_kernels.ops import Line, Quantized
from pab_kernels.ops.backend import load
from pab_kernels.ops.quantized import FORMATS, width_of

KERNEL_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where the tests run Triton kernels: compiled on a GPU, else in Triton's interpreter."""

MANY = 1590 if KERNEL_DEVICE == "cuda" else 331
"""Tokens of a video of Open-Sora, or as many as take the interpreter a second or two: more than fill the tiles of
several programs."""

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
QUANTISED = (*EIGHT_BITS, torch.int4)


def draws(dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Callable[..., Tensor]:
    """A function that draws another normal tensor of the given sizes at each call, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes: torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype).to(device)


def parts(value: Any) -> list[Tensor]:
    """The tensors in a result."""
    if isinstance(value, Quantized):
        return [value.data, value.scale]
    if isinstance(value, Line):
        return parts([value.newest, value.before, value.weight])
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in parts(part)]
    return [] if value is None else [value]


def assert_same(actual: Any, expected: Any, strides: bool = True) -> None:
    """Bit for bit, in shape, dtype and (dimensions of size 1 aside) strides."""
    for a, b in zip(parts(actual), parts(expected), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        if strides:
            sizes = list(a.shape)
            assert [s for s, n in zip(a.stride(), sizes, strict=True) if n != 1] == [
                s for s, n in zip(b.stride(), sizes, strict=True) if n != 1
            ]
        if a.device.type != "meta":
            assert torch.equal(a.float(), b.float()), (a.float() - b.float()).abs().max()


def assert_accurate(actual: Tensor, torch_result: Tensor, exact: Tensor) -> None:
    """Error at most twice that of torch in the same dtype, and one rounding."""
    assert actual.dtype == torch_result.dtype and actual.shape == exact.shape
    error, allowed = ((t.double() - exact).abs().max() for t in (actual, torch_result))
    rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs().max()
    assert error <= 2 * allowed + rounding, (error, allowed, rounding)


class Guarded:
    """An output inside a larger buffer, all of it poisoned: NaN, or for int8 -128, which no quantisation yields.

    Every byte may be two right values of 4 bits: compare these with an output elsewhere.
    """

    def __init__(self, *sizes: int, dtype: torch.dtype, device: str = "cpu") -> None:
        poison = {torch.int8: -128.0, torch.uint8: 0x88}.get(dtype, float("nan"))
        self.buffer = torch.full((sizes[0] + 2, *sizes[1:-1], sizes[-1] + 16), poison).to(dtype).to(device)
        self.inside = torch.zeros_like(self.buffer, dtype=torch.bool)
        self.inside[1:-1, ..., 8:-8] = True
        self.tensor = self.buffer[1:-1, ..., 8:-8]

    def assert_written(self) -> None:
        values, dtype = self.buffer.float(), self.buffer.dtype
        poisoned = values.isnan() if dtype.is_floating_point else values == (-128 if dtype == torch.int8 else 0x88)
        assert dtype == torch.uint8 or not poisoned[self.inside].any(), "an element was not written"
        assert poisoned[~self.inside].all(), "an element outside was written"


def guarded_quantized(
    *sizes: int, dtype: torch.dtype, group: int, device: str = "cpu"
) -> tuple[Quantized, list[Guarded]]:
    used = FORMATS[dtype]
    data = Guarded(*sizes[:-1], width_of(dtype, sizes[-1]), dtype=used.data, device=device)
    scale = Guarded(*sizes[:-1], -(-sizes[-1] // group), dtype=used.scale, device=device)
    return Quantized(data.tensor, scale.tensor, group, sizes[-1]), [data, scale]


def launch(op: str, backend: str, call: Any, *outputs: Any) -> None:
    """A kernel, into these outputs."""
    load(op, backend).launch(call, outputs)


def opcheck(op: Any, args: tuple[Any, ...]) -> None:
    """`torch.library.opcheck`.

    Where an argument is float8, without its comparison of the arguments, which torch lacks for float8.
    """
    float8 = any(t.dtype == torch.float8_e4m3fn for t in parts(args) if isinstance(t, Tensor))
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, args, test_utils=utils[1:] if float8 else utils)


def called_when_compiled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """The result of the function under `torch.compile(fullgraph=True)`, and the operations of this package in its
    graph."""
    called: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("pab_kernels"))
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, fullgraph=True, backend=backend)(*args, **kwargs), called


def assert_refuses(
    error: type[Exception], message: str, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> None:
    """The call raises the error, in one line that says what came, what is supported and what to do."""
    try:
        function(*args, **kwargs)
    except (TypeError, ValueError, RuntimeError) as raised:
        text = str(raised)
        assert type(raised) is error, raised
        assert message in text and "\n" not in text and "; " in text and ": " in text and len(text) < 260, text
        return
    raise AssertionError(f"no error; expected {message!r}")
