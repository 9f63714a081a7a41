"""`short_attention` is `attention` for up to 64 tokens."""

from __future__ import annotations

import pytest
import torch

from pab_kernels.ops import BackendError, QKNorm, Rope, attention, short_attention
from tests.ops.attention_cases import (
    HEAD_DIMS,
    OPTIONS_REFUSED,
    QKV_REFUSED,
    refused,
    softmax_attention,
)
from tests.ops.tensors import (
    DTYPES,
    EIGHT_BITS,
    assert_accurate,
    assert_refuses,
    assert_same,
    called_when_compiled,
    draws,
    opcheck,
    parts,
)

OP = torch.ops.pab_kernels.short_attention.default
LENGTHS = [1, 15, 16, 17, 64]


def temporal(frames, dim=40, dtype=torch.float32):
    """q, k, v `[B, S, T, H, D]`: views of a packed projection `[B, T, S, 3, H, D]`."""
    whole = draws(dtype)(2, frames, 3, 3, 2, dim)
    return [whole.select(3, i).transpose(1, 2) for i in range(3)]


def everything(frames, dtype=torch.float32):
    draw = draws(dtype, 1)
    theta = draws(seed=2)(frames, 12)
    return {
        "softmax_scale": 0.2,
        "q_norm": QKNorm("rms", draw(40), None, 1e-5),
        "k_norm": QKNorm("layer", draw(40), draw(40), 1e-5),
        "rope": Rope(theta.cos(), theta.sin(), interleaved=True),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("frames", LENGTHS)
def test_error_against_float64(frames, dim, dtype):
    q, k, v = temporal(frames, dim, dtype)
    out, stored = short_attention(q, k, v)
    assert stored is None
    assert_accurate(out, softmax_attention(q, k, v), softmax_attention(q.double(), k.double(), v.double()))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16, *EIGHT_BITS])
@pytest.mark.parametrize("frames", LENGTHS)
def test_it_is_attention(frames, store_dtype):
    inputs = temporal(frames, dtype=torch.bfloat16)
    options = {"store_dtype": store_dtype, **everything(frames, torch.bfloat16)}
    assert_same(short_attention(*inputs, **options), attention(*inputs, **options))
    rows = [t.flatten(0, 1) for t in inputs]
    assert_same(short_attention(*rows, **options), attention(*rows, **options))


def test_it_gives_the_same_twice():
    assert_same(*(short_attention(*temporal(15), store_dtype=torch.int8, **everything(15)) for _ in range(2)))


@pytest.mark.parametrize("store_dtype", [None, torch.float32, torch.int8])
def test_meta_tensors(store_dtype):
    def call(device):
        return parts(short_attention(*(t.to(device) for t in temporal(5)), store_dtype=store_dtype))

    assert [(t.shape, t.dtype, t.stride()) for t in call("meta")] == [
        (t.shape, t.dtype, t.stride()) for t in call("cpu")
    ]


def sample(store_dtype):
    """Arguments of the registered operation, and its results."""
    inputs, options = temporal(5), everything(5)
    norms = [x for n in (options["q_norm"], options["k_norm"]) for x in (n.kind, n.weight, n.bias, n.eps, n.rstd)]
    rope = options["rope"]
    args = (*inputs, None, options["softmax_scale"], *norms, rope.cos, rope.sin, rope.interleaved, store_dtype, "auto")
    return args, parts(short_attention(*inputs, store_dtype=store_dtype, **options))


@pytest.mark.parametrize("store_dtype", [None, torch.int8])
def test_the_registered_operation(store_dtype):
    args, expected = sample(store_dtype)
    opcheck(OP, args)
    assert_same(OP(*args), expected)


@pytest.mark.parametrize("store_dtype", [None, torch.int8])
def test_compiled_it_has_the_same_result(store_dtype, opaque):
    options = {"store_dtype": store_dtype, **everything(5)}
    result, called = called_when_compiled(short_attention, *temporal(5), **options)
    assert called == ["pab_kernels.short_attention"] * opaque
    assert_same(result, short_attention(*temporal(5), **options))


def test_gradients_flow_through_the_reference_and_not_through_the_rest():
    q, k, v = (t.detach().requires_grad_() for t in temporal(5))
    short_attention(q, k, v)[0].sum().backward()
    assert torch.allclose(v.grad.sum(2), torch.full((2, 3, 2, 40), 5.0), atol=1e-4)
    args, _ = sample(None)
    assert_refuses(RuntimeError, "has no gradient", lambda: OP(args[0].requires_grad_(), *args[1:])[0].sum().backward())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        *QKV_REFUSED,
        *OPTIONS_REFUSED,
        (
            dict.fromkeys("qkv", torch.ones(1, 65, 1, 32)),
            ValueError,
            "got 65 queries and 65 keys; equal numbers up to 64",
        ),
        (dict.fromkeys("kv", torch.ones(2, 6, 2, 40)), ValueError, "got 7 queries and 6 keys"),
    ],
)
def test_refused(changes, error, message):
    refused(changes, error, message, short_attention)


def test_store_dtypes_refused():
    refused({"store_dtype": torch.float16}, TypeError, "store_dtype is torch.float16", short_attention)


def test_what_the_cuda_kernel_refuses():
    def refuses(reason, *inputs):
        assert_refuses(
            BackendError, f"'cuda' cannot serve this call; {reason}", short_attention, *inputs, backend="cuda"
        )

    for dtype in (torch.float32, torch.float64):
        refuses(f"q is {dtype}; float16 and bfloat16 are supported", *temporal(5, 72, dtype))
    refuses("the head dimension is 80; 64, 72, 96 and 128 are supported", *temporal(5, 80, torch.float16))
    many = torch.zeros(64, dtype=torch.bfloat16).expand(2**30, 1, 2, 64)
    refuses(f"there are {2**31} heads of sequences; at most {2**31 - 1}", many, many, many)
    q, k, v = temporal(5, 72, torch.bfloat16)
    odd = torch.zeros(*q.shape[:-1], 76, dtype=q.dtype)[..., :72]
    refuses("heads of q do not all begin at a multiple of 16 bytes", odd, k, v)
    refuses(
        "heads of k do not all begin at a multiple of 16 bytes",
        q,
        torch.zeros(2, 3, 5, 2, 80, dtype=q.dtype)[..., 1:73],
        v,
    )
    refuses("heads of v do not all begin at a multiple of 16 bytes", q, k, odd)
    refuses("", q, k, v)  # the device, or that nothing was compiled
