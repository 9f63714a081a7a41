"""The residual stream gives, bit for bit, what the plain chain of expressions gives, in as few fused operations as
promised."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pab_kernels.broadcast.slots import CACHE_DTYPES, Extrapolation, Key, Slot
from pab_kernels.broadcast.stream import ResidualStream
from pab_kernels.ops import Quantized, dequantize, quantize
from pab_kernels.rules.config import CacheDtype
from tests.broadcast.streams import LINEARS, NORMS, kept_by, slot_of, storing_call, taken

# Random programs


class _Chain:
    """The same program as the expressions that it stands for, on a plain tensor.

    Its channels stay side by side: torch sums them in another order where they do not.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.stored: dict[int, Any] = {}

    def add(self, out: Tensor, gate: Tensor | None, store: tuple[int, str, CacheDtype | None] | None) -> None:
        gated = out if gate is None else gate * out
        if store is not None:
            i, point, cache_dtype = store
            kept = out if point == "pre_gate" else gated
            self.stored[i] = kept if cache_dtype is None else quantize(kept, CACHE_DTYPES[cache_dtype])
        self.x = (gated + self.x).contiguous()

    def normed(self, norm: nn.Module, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        y = norm(self.x)
        y = y if scale is None else y * (1 + scale)
        return y if shift is None else y + shift


KEPT = {"int8": torch.int8, "float8": torch.float8_e4m3fn, "int4": torch.int4}
_SHAPES = ((2, 3, 8), (5, 129), (2, 1, 2, 3), (1, 1, 1))
_GATES = ("none", "channels", "batch", "full", "float32", "one number", "strided", "of one channel")


def _modulation(kind: str, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
    if kind == "none":
        return None
    c = shape[-1]
    return {
        "channels": lambda: torch.randn(c).to(dtype),
        "batch": lambda: torch.randn(shape[0], *[1] * (len(shape) - 2), c).to(dtype),
        "full": lambda: torch.randn(shape).to(dtype),
        "float32": lambda: torch.randn(c),
        "one number": lambda: torch.randn(()).to(dtype),
        "strided": lambda: torch.randn(c, 2).to(dtype)[:, 0],
        "of one channel": lambda: torch.randn(*shape[:-1], 1).to(dtype),
    }[kind]()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Quantized) or isinstance(b, Quantized):
        return (
            isinstance(a, Quantized)
            and isinstance(b, Quantized)
            and _same(a.data.float(), b.data.float())
            and _same(a.scale, b.scale)
        )
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


_gates = st.sampled_from(_GATES)
_STEPS = st.one_of(
    st.tuples(
        st.just("project"),
        st.sampled_from(sorted(LINEARS)) | st.just("plain"),
        _gates,
        st.booleans(),
        st.sampled_from([1, 5]),
    ),
    st.tuples(st.just("add"), st.sampled_from(["own", "float32", "channels outermost"]), _gates, st.booleans()),
    st.tuples(st.just("reuse"), st.sampled_from(["own", "float32", *KEPT]), _gates),
    st.tuples(st.just("reuse"), st.just("own"), st.just("none")),
    st.tuples(st.just("line"), st.sampled_from(["own", "float32", *KEPT]), _gates),
    st.tuples(st.just("norm"), st.sampled_from(sorted(NORMS)), _gates, _gates),
    st.tuples(st.just("read")),
)


@given(
    program=st.lists(_STEPS, min_size=1, max_size=10),
    shape=st.sampled_from(_SHAPES),
    layout=st.sampled_from(["dense", "padded", "channels outermost", "expanded"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cache_dtype=st.sampled_from([None, "int8", "float8_e4m3fn", "int4"]),
    cache_point=st.sampled_from(["pre_gate", "post_gate"]),
)
@settings(max_examples=400)
@torch.no_grad()
def test_any_program_gives_what_the_plain_chain_gives(
    program: list[Any], shape: tuple[int, ...], layout: str, dtype: torch.dtype, cache_dtype: Any, cache_point: Any
) -> None:
    torch.manual_seed(len(program))
    given_x = {
        "dense": lambda: torch.randn(shape).to(dtype),
        "padded": lambda: torch.randn(*shape[:-1], shape[-1] + 3).to(dtype)[..., 1:-2],
        "channels outermost": lambda: torch.randn(shape[-1], *shape[:-1]).to(dtype).movedim(0, -1),
        "expanded": lambda: torch.randn(shape[-1]).to(dtype).expand(shape),
    }[layout]()
    before, version = given_x.clone(), given_x._version
    chain, call = _Chain(before.contiguous()), storing_call(cache_dtype, cache_point)
    stream = ResidualStream(given_x, call)
    size = torch.Size(shape)
    for i, (step, *rest) in enumerate(program):
        if step == "read":
            assert _same(stream.read(), chain.x)
            continue
        if step == "norm":
            kind, shift, scale = rest[0], _modulation(rest[1], size, dtype), _modulation(rest[2], size, dtype)
            norm = NORMS[kind](size).to(chain.x.dtype)
            assert _same(stream.norm_modulate(norm, shift, scale), chain.normed(norm, shift, scale))
            continue
        gate = _modulation(rest[1], size, dtype)
        if step in ("reuse", "line"):
            slots, own = [], torch.float32 if rest[0] == "float32" else dtype
            for _ in range(1 if step == "reuse" else 2):
                value: Any = torch.randn(shape).to(own)
                if rest[0] in KEPT:
                    value = quantize(value, KEPT[rest[0]])
                slots.append(slot_of(value))
            reads = [
                dequantize(s.value, torch.float32) if isinstance(s.value, Quantized) else s.value.float() for s in slots
            ]
            weight = torch.tensor(2 / 3)
            value = reads[0] if step == "reuse" else reads[0] + weight * (reads[0] - reads[1])
            chain.add(value.to(chain.x.dtype if isinstance(slots[0].value, Quantized) else own), gate, None)
            stream.reuse(slots[0] if step == "reuse" else Extrapolation(tuple(slots), (weight,)), gate)
            continue
        store = taken(call, i, given_x) if rest[2] else None
        stored = (i, cache_point, cache_dtype) if rest[2] else None
        if step == "project":
            linear = LINEARS[rest[0]](rest[3], shape[-1])
            linear = linear if rest[0] == "float32 inside" else linear.to(dtype)
            a = torch.randn(*shape[:-1], rest[3]).to(dtype)
            stream.project(a, linear, gate, store)
            chain.add(linear(a), gate, stored)
        else:
            out = torch.randn(shape).to(torch.float32 if rest[0] == "float32" else dtype)
            out = out.movedim(-1, 0).contiguous().movedim(0, -1) if rest[0] == "channels outermost" else out
            stream.add(out, gate, store)
            chain.add(out, gate, stored)
    result = stream.read()
    assert _same(result, chain.x)
    assert _same(given_x, before) and given_x._version == version, "the given tensor was written"
    for i, expected in chain.stored.items():
        kept = kept_by(call, i)
        assert _same(kept, expected)
        for t in (kept.data, kept.scale) if isinstance(kept, Quantized) else (kept,):
            assert t.untyped_storage().data_ptr() not in (
                given_x.untyped_storage().data_ptr(),
                result.untyped_storage().data_ptr(),
            )


# Single cases


@torch.no_grad()
def test_a_projection_is_stored_when_the_stream_is_read() -> None:
    call, x = storing_call(), torch.randn(2, 3, 8)
    linear, a, gate = nn.Linear(4, 8), torch.randn(2, 3, 4), torch.randn(8)
    stream = ResidualStream(x, call)
    stream.project(a, linear, gate, taken(call, 0, x))
    assert kept_by(call, 0) is None
    stream.read()
    assert torch.equal(kept_by(call, 0), linear(a))


@torch.no_grad()
def test_eight_bits_are_kept_and_not_added() -> None:
    for add in (True, False):
        call, x = storing_call("int8", "post_gate"), torch.randn(2, 130)
        linear, a, gate = nn.Linear(4, 130), torch.randn(2, 4), torch.randn(130)
        stream = ResidualStream(x, call)
        if add:
            stream.add(linear(a), gate, taken(call, 0, x))
        else:
            stream.project(a, linear, gate, taken(call, 0, x))
        assert torch.equal(stream.read(), gate * linear(a) + x)
        assert _same(kept_by(call, 0), quantize(gate * linear(a), torch.int8))


@torch.no_grad()
def test_eight_bits_of_another_dtype_are_added_as_that() -> None:
    x, kept = torch.randn(2, 130), quantize(torch.randn(2, 130).bfloat16(), torch.int8)
    stream = ResidualStream(x, storing_call("int8"))
    stream.reuse(Slot(kept, Key.of(x), 0, 0, torch.bfloat16))
    assert torch.equal(stream.read(), dequantize(kept, torch.bfloat16) + x)


@torch.no_grad()
def test_an_output_that_is_the_stream_itself_is_kept_as_a_copy() -> None:
    call, x = storing_call(), torch.randn(2, 3, 8)
    stream = ResidualStream(x, call)
    stream.project(stream.read(), nn.Identity(), None, taken(call, 0, x))
    stream.project(stream.read().view(6, 8).view(2, 3, 8), nn.Identity(), None, taken(call, 1, x))
    result = stream.read()
    kept = [kept_by(call, i).clone() for i in range(2)]
    assert torch.equal(kept[0], x) and torch.equal(kept[1], 2 * x)
    x.zero_()  # as a model may that works in place
    result.zero_()
    assert all(torch.equal(kept_by(call, i), kept[i]) for i in range(2))


@torch.no_grad()
def test_without_additions_the_stream_is_the_given_tensor() -> None:
    x = torch.randn(2, 3, 8)
    stream = ResidualStream(x, storing_call())
    stream.norm_modulate(nn.LayerNorm(8))
    assert stream.read() is x


@torch.no_grad()
def test_under_autocast_nothing_is_fused_and_the_chain_is_the_plain_one(counted: Counter[str]) -> None:
    linear, norm = nn.Linear(8, 8), nn.LayerNorm(8)
    x, gate, cached = torch.randn(2, 3, 8), torch.randn(8), torch.randn(2, 3, 8).bfloat16()
    call = storing_call()
    with torch.autocast("cpu", torch.bfloat16):
        stream = ResidualStream(x, call)
        y = stream.norm_modulate(norm, gate, gate)
        stream.project(y, linear, gate, taken(call, 0, x))
        stream.reuse(slot_of(cached), gate)
        result = stream.read()
        plain_y = norm(x) * (1 + gate) + gate
        assert _same(y, plain_y)
        assert _same(result, gate * cached + (gate * linear(plain_y) + x))
        assert kept_by(call, 0).dtype == torch.bfloat16
    assert counted == {}


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@torch.no_grad()
def test_a_stream_runs_on_the_meta_device(cache_dtype: CacheDtype | None, counted: Counter[str]) -> None:
    call = storing_call(cache_dtype)
    with torch.device("meta"):
        x = torch.randn(2, 3, 8)
        stream = ResidualStream(x, call)
        y = stream.norm_modulate(nn.LayerNorm(8), torch.randn(8), torch.randn(2, 1, 8))
        stream.project(y, nn.Linear(8, 8), torch.randn(8), taken(call, 0, x))
        stream.add(torch.randn(2, 3, 8), None, taken(call, 1, x))
        stream.reuse(slot_of(torch.randn(2, 3, 8)))
        assert stream.norm_modulate(nn.LayerNorm(8)).shape == (2, 3, 8)
    assert counted == {"broadcast_residual": 2, "project_residual": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@torch.no_grad()
def test_an_rms_norm_without_eps_has_that_of_torch(dtype: torch.dtype) -> None:
    for size in (1e-3, 1e-5, 1e-9):  # the eps decides
        x = (size * torch.randn(5, 8)).to(dtype)
        assert torch.equal(
            ResidualStream(x, storing_call()).norm_modulate(nn.RMSNorm(8, dtype=dtype)), nn.RMSNorm(8, dtype=dtype)(x)
        )


@torch.no_grad()
def test_reuse_before_the_projection_is_added_before_it() -> None:
    # 1e8 + 1 - 1e8 is 0 in float32 and 1e8 - 1e8 + 1 is 1: the order of additions is kept.
    one = nn.Linear(1, 1, bias=False)
    nn.init.ones_(one.weight)
    stream = ResidualStream(torch.full((1, 1), 1e8), storing_call())
    stream.reuse(slot_of(torch.ones(1, 1)))
    stream.project(torch.full((1, 1), -1e8), one)
    stream.reuse(slot_of(torch.full((1, 1), 3.0)))
    assert stream.read().item() == 3


# What an operation would refuse, nobody checks: the stream hands it no such thing


@pytest.mark.parametrize("shape", [(2, 3, 8), (2, 1, 8)])
@torch.no_grad()
def test_gate_and_shift_may_make_the_stream_wider(shape: tuple[int, ...], counted: Counter[str]) -> None:
    x, a, wide, linear, norm = (
        torch.randn(1, 3, 8),
        torch.randn(1, 3, 4),
        torch.randn(shape),
        nn.Linear(4, 8),
        nn.LayerNorm(8),
    )
    streams = [ResidualStream(x, storing_call()) for _ in range(4)]
    streams[0].reuse(slot_of(x), wide)
    assert torch.equal(streams[0].read(), wide * x + x)
    streams[1].project(a, linear, wide)
    assert torch.equal(streams[1].read(), wide * linear(a) + x)
    streams[2].project(wide[..., :4], linear)
    assert torch.equal(streams[2].read(), linear(wide[..., :4]) + x)
    assert torch.equal(streams[3].norm_modulate(norm, wide), norm(x) + wide)
    assert counted == {}


@torch.no_grad()
def test_modules_with_other_sizes_or_eps_are_called(counted: Counter[str]) -> None:
    x, a, linear, norm = 100 * torch.randn(1, 3, 8), torch.randn(1, 3, 4), nn.Linear(4, 8), nn.LayerNorm(8, eps=-1e-3)
    assert torch.equal(ResidualStream(x, storing_call()).norm_modulate(norm), norm(x))
    linear.weight, linear.bias = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(1))
    stream = ResidualStream(x, storing_call())
    stream.project(a, linear)
    assert torch.equal(stream.read(), linear(a) + x)
    assert counted == {}


@torch.no_grad()
def test_slots_of_other_strides_or_on_another_device_are_not_fused(counted: Counter[str]) -> None:
    x, strided = torch.randn(1, 3, 8), torch.randn(1, 8, 3).mT
    for term, value in (
        (slot_of(strided), strided),
        (Extrapolation((slot_of(x), slot_of(strided)), (torch.tensor(0.5),)), x + 0.5 * (x - strided)),
    ):
        stream = ResidualStream(x, storing_call())
        stream.reuse(term)
        assert torch.equal(stream.read(), value + x)
    with pytest.raises(RuntimeError, match="device"):
        stream.reuse(slot_of(x.to("meta")))
    assert counted == {}
