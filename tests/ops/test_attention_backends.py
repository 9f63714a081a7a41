"""`attention` by SDPA and by flash-attn.

The package flash-attn needs a GPU: a stand-in in pure torch keeps to its interface here.
"""

from __future__ import annotations

import importlib
import sys
import types

import pytest
import torch

from pab_kernels.ops import BackendError, QKNorm, Rope, attention, quantize
from pab_kernels.ops.attention import Attention, reference
from pab_kernels.ops.backend import load
from tests.ops.attention_cases import softmax_attention
from tests.ops.tensors import DTYPES, HALF, assert_accurate, assert_refuses, assert_same, draws

MODULE = "pab_kernels.ops.attention.flash_attn"


def qkv(*batch, queries=7, keys=None, heads=2, dim=40, dtype=torch.bfloat16):
    draw = draws(dtype)
    return [draw(*batch, n, heads, dim) for n in (queries, keys or queries, keys or queries)]


def everything(dtype):
    """Options for 7 queries and keys of heads of 40."""
    draw, theta = draws(dtype, 1), draws(seed=3)(7, 12)
    return {
        "softmax_scale": 0.2,
        "q_norm": QKNorm(weight=draw(40)),
        "k_norm": QKNorm(),
        "rope": Rope(theta.cos(), theta.sin(), False),
    }


@pytest.fixture
def calls(monkeypatch):
    """What flash-attn is given, where a stand-in is installed."""
    given = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        assert q.dtype in HALF and dropout_p == 0 and not causal
        for t in (q, k, v):
            assert t.ndim == 4 and t.stride(-1) == 1 and t.shape[-1] % 8 == 0 and 0 < t.shape[0] <= 65535
        assert k.shape == v.shape and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
        given.append((q, k, v))
        return softmax_attention(q.float(), k.float(), v.float(), softmax_scale).to(q.dtype).contiguous()

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    load.cache_clear()
    yield given
    sys.modules.pop(MODULE, None)
    load.cache_clear()


@pytest.fixture
def flash(calls):
    return importlib.import_module(MODULE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("store_dtype", [None, torch.int8])
def test_sdpa_is_the_reference(store_dtype, dtype):
    inputs = qkv(2, 3, dtype=dtype)
    options = everything(dtype) | {"key_lengths": torch.tensor([4, 0])}
    expected = attention(*inputs, store_dtype=store_dtype, backend="reference", **options)
    assert_same(attention(*inputs, store_dtype=store_dtype, backend="sdpa", **options), expected)


def test_without_the_package_flash_attn_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    load.cache_clear()
    message = "backend 'flash_attn' cannot serve this call; it needs the package flash_attn, which is not installed"
    assert_refuses(BackendError, message, attention, *qkv(1), backend="flash_attn")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("keys", [7, 1, 9])
def test_flash_attn_computes_what_the_reference_does(keys, dtype, flash):
    inputs, options = qkv(2, keys=keys, dtype=dtype), everything(dtype)
    given = Attention(*inputs, **options)
    exact = [
        QKNorm(n.kind, None if n.weight is None else n.weight.double()) for n in (options["q_norm"], options["k_norm"])
    ]
    exact = reference.compute(Attention(*(t.double() for t in inputs), 0.2, None, *exact, options["rope"]))[0]
    assert_accurate(flash.compute(given)[0], reference.compute(given)[0], exact)


@pytest.mark.parametrize("order", ["spatial", "temporal"])
@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_flash_attn_is_given_views_and_its_output_lies_as_q_does(store_dtype, order, flash, calls):
    whole = draws(torch.bfloat16)(2, 5, 3, 3, 2, 40)
    q, k, v = (whole.select(3, i) if order == "spatial" else whole.select(3, i).transpose(1, 2) for i in range(3))
    out, stored = flash.compute(Attention(q, k, v, store_dtype=store_dtype))
    expected, like = reference.compute(Attention(q, k, v, store_dtype=store_dtype))
    torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-2)
    for a, b in (
        (out, expected),
        *(() if stored is None else ((getattr(stored, "data", stored), getattr(like, "data", like)),)),
    ):
        assert a.stride() == b.stride() and a.dtype == b.dtype
    if store_dtype in (torch.int8, torch.float8_e4m3fn):
        assert_same(stored, quantize(out, store_dtype, group=40), strides=False)
    if order == "spatial":
        assert [t.untyped_storage().data_ptr() for t in calls[0]] == [whole.untyped_storage().data_ptr()] * 3


def test_batches_that_flash_attn_cannot_take_are_split(flash, calls, monkeypatch):
    inputs = qkv(2, 5)
    whole = flash.compute(Attention(*inputs))
    monkeypatch.setattr(reference, "MAX_BATCH", 4)
    assert_same(flash.compute(Attention(*inputs)), whole)
    assert [len(q) for q, _, _ in calls] == [10, 4, 4, 2]


@pytest.mark.parametrize("sizes", [(0, 7, 2, 40), (2, 0, 2, 40)])
def test_flash_attn_is_not_called_for_nothing(sizes, flash, calls):
    q, k = torch.zeros(sizes, dtype=torch.bfloat16), torch.zeros((sizes[0], 3, 2, 40), dtype=torch.bfloat16)
    assert flash.compute(Attention(q, k, k))[0].shape == sizes and not calls


def test_what_flash_attn_cannot_serve_it_refuses(flash):
    assert_refuses(
        BackendError,
        "flash-attn runs on CUDA devices; the tensors are on cpu",
        attention,
        *qkv(1),
        backend="flash_attn",
    )

    class OnCuda:
        """What a refusal looks at of a tensor on a GPU."""

        def __init__(self, dtype=torch.bfloat16, dim=40):
            self.dtype, self.shape, self.device = dtype, (1, 7, 2, dim), torch.device("cuda")

    def refusal(q, **options):
        return flash.refusal(Attention(q, q, q, **options))

    assert refusal(OnCuda()) is None
    assert refusal(OnCuda(torch.float32)) == "q is torch.float32; float16 and bfloat16 are supported"
    assert refusal(OnCuda(dim=36)) == "the head dimension is 36; multiples of 8 are supported"
    assert refusal(OnCuda(), softmax_scale=-1.0).startswith("softmax_scale is -1.0; 0 or more is supported")
    assert refusal(OnCuda(), key_lengths=torch.tensor([3])).startswith(
        "key_lengths is given; flash-attn takes packed keys"
    )
