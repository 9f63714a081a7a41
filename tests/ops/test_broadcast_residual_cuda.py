"""`broadcast_residual` in CUDA, on a device: right whatever the options, the strides, the stream and the graph."""

from __future__ import annotations

import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from pab_kernels.ops import Norm, broadcast_residual, cuda_library, quantize
from tests.ops.broadcast_residual_cases import (
    LINES,
    NORMS,
    assert_rounded_once,
    call,
    call_of,
    check,
    poisoned,
    rounded_once,
)
from tests.ops.tensors import (
    DTYPES,
    EIGHT_BITS,
    Guarded,
    assert_refuses,
    assert_same,
    called_when_compiled,
    draws,
    launch,
    opcheck,
)

if not torch.cuda.is_available():
    pytest.skip("there is no CUDA device", allow_module_level=True)
REASON = cuda_library.refuse(torch.empty(0, device="cuda"))
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

WIDTHS = (128, 1152, 1536, 1920, 2304, 3072, 4096, 5120, 8192)

CALLS = int(os.environ.get("PAB_FUZZ_CALLS", "200"))


@pytest.fixture(autouse=True, params=["checked in Python", "checked in C++"])
def _gradient(request):
    """With gradients on, arguments are checked in Python before; without, by the C++ of the call alone."""
    with torch.set_grad_enabled(request.param == "checked in Python"):
        yield


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kinds", ["", "m", "mi", "fim", *LINES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_accurate(dtype, kinds, norm):
    if kinds or norm:
        for channels in (136, 137):
            check(*call((2, 7, channels), kinds, norm, dtype, affine=channels == 136), "cuda")


@pytest.mark.parametrize("channels", [1, 8, 512, 8191, *WIDTHS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_width(channels, dtype):
    for kinds in ("m", "mif"):
        check(*call((2, 33, channels), kinds, "layer", dtype), "cuda")


@pytest.mark.parametrize("tokens", [1, 7, 127, 70000])
def test_any_number_of_tokens(tokens):
    check(*call((1, tokens, 264), "f", "layer", torch.bfloat16, affine=False), "cuda")


@pytest.mark.parametrize(
    "shape", [(152,), (2, 1, 1, 152), (1, 3, 1, 152), (2, 3, 1, 152), (2, 3, 4, 152), (4, 152), (1, 1, 4, 152)]
)
def test_gate_shift_and_scale_broadcast_by_row_frame_or_token(shape):
    draw = draws(torch.bfloat16, 1, "cuda")
    x, slot = draw(2, 3, 4, 152), draw(2, 3, 4, 152)
    check((x, [slot]), {"gates": [draw(*shape)], "norm": Norm(), "shift": draw(*shape), "scale": draw(152)}, "cuda")


@pytest.mark.parametrize("offset", [8, 3])
def test_views_are_read_in_place(offset):
    (x, slots), options = call((2, 7, 136), "mm", "layer", torch.bfloat16)
    x, *slots = (poisoned(t) if offset == 8 else torch.nn.functional.pad(t, (3, 2))[..., 3:-2] for t in (x, *slots))
    check((x, slots), options, "cuda")
    check((x.transpose(0, 1).contiguous().transpose(0, 1), slots), options, "cuda")


@pytest.mark.parametrize("channels", [136, 137])
def test_outputs_are_written_whole_and_nothing_around_them(channels):
    args, options = call((2, 7, channels), "mi", "layer", torch.bfloat16)
    places = [Guarded(2, 7, channels, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    launch("broadcast_residual", "cuda", call_of(*args, **options), *(place.tensor for place in places))
    for place, value in zip(places, broadcast_residual(*args, **options, backend="cuda"), strict=True):
        place.assert_written()
        assert torch.equal(place.tensor, value)


def test_one_after_the_other_each_waits_for_the_one_before():
    """Each may be started before the one before it has ended."""
    draw = draws(torch.bfloat16, 3, "cuda")
    start, slot = draw(4096, 1152), draw(4096, 1152)

    def chain(synchronize):
        x, y = start.clone(), slot
        for _ in range(50):
            _, y = broadcast_residual(x, [y], norm=Norm(), backend="cuda")
            launch("broadcast_residual", "cuda", call_of(x, [y], gates=None), x, None)
            if synchronize:
                torch.cuda.synchronize()
        return x, y

    assert_same(chain(False), chain(True))


def test_it_runs_on_the_current_stream_and_in_graphs():
    (x, slots), options = call((2, 64, 1152), "i", "layer", torch.bfloat16)
    x_out, y_out = torch.empty_like(x), torch.empty_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        doubled = x * 2
        launch("broadcast_residual", "cuda", call_of(doubled, slots, **options), x_out, y_out)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same((x_out, y_out), broadcast_residual(x * 2, slots, **options, backend="cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            launch("broadcast_residual", "cuda", call_of(x, slots, **options), x_out, y_out)
    x.mul_(0.5)
    graph.replay()
    assert_same((x_out, y_out), broadcast_residual(x, slots, **options, backend="cuda"))


def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one device")
    (x, slots), options = call((2, 7, 136), "m", None, torch.float32)
    other = broadcast_residual(
        x.to("cuda:1"), [slots[0].to("cuda:1")], gates=[options["gates"][0].to("cuda:1")], backend="cuda"
    )[0]
    assert torch.equal(other.to("cuda:0"), broadcast_residual(x, slots, gates=options["gates"], backend="cuda")[0])


def test_a_tensor_that_is_not_on_the_device_is_refused():
    (x, slots), options = call((2, 7, 136), "m", "layer", torch.float32)
    for change in (
        {"slots": [slots[0].cpu()]},
        {"shift": options["shift"].cpu()},
        {"gates": [options["gates"][0].cpu()]},
    ):
        assert_refuses(
            ValueError,
            "is on cpu; the operation runs on cuda:0",
            broadcast_residual,
            **{"x": x, "slots": slots, **options, **change},
            backend="cuda",
        )


def test_again_and_again_gives_the_same_bits():
    args, options = call((1, 1000, 2304), "mi", "layer", torch.float16)
    first = broadcast_residual(*args, **options, backend="cuda")
    for _ in range(20):
        assert_same(broadcast_residual(*args, **options, backend="cuda"), first)


@pytest.mark.parametrize("kind", EIGHT_BITS)
def test_what_is_not_finite(kind):
    (x, _), options = call((2, 5, 200), "i", None, torch.bfloat16)
    values = draws(torch.bfloat16, 5, "cuda")(2, 5, 200)
    x[1, 1, 3], values[0, 1, 150] = torch.inf, torch.nan
    slot = quantize(values, kind)
    got, expected = broadcast_residual(x, [slot], **options, backend="cuda")[0], rounded_once(x, [slot], **options)[0]
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())


def test_compiled_it_is_one_operation_that_torch_knows():
    args, options = call((2, 7, 136), "mi", "layer", torch.bfloat16)
    opcheck(torch.ops.pab_kernels.broadcast_residual.default, (*call_of(*args, **options).flatten(), "cuda"))
    result, called = called_when_compiled(lambda *a: broadcast_residual(*a, **options, backend="cuda"), *args)
    assert called == ["pab_kernels.broadcast_residual"]
    assert_same(result, broadcast_residual(*args, **options, backend="cuda"))


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.one_of(st.integers(1, 700), st.sampled_from(WIDTHS))),
    offset=st.one_of(st.just(0), st.integers(0, 9)),
    kinds=st.text("mif", max_size=3),
    norm=st.sampled_from(NORMS),
    affine=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(max_examples=CALLS // 2)  # in each of the two ways
def test_fuzz(sizes, offset, kinds, norm, affine, dtype, seed):
    if kinds or norm:
        (x, slots), options = call(sizes, kinds, norm, dtype, affine, seed)
        args = torch.nn.functional.pad(x, (offset, 0))[..., offset:], slots
        assert_rounded_once(broadcast_residual(*args, **options, backend="cuda"), args, options)
