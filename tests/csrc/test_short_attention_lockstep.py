"""The unmodified kernel of short_attention on the CPU: the reference's results, every element written once, no other touched."""

from __future__ import annotations

import ctypes
from functools import partial
from math import log, prod

import pytest
import torch

from pab_kernels.ops import QKNorm, Quantized, quantize
from pab_kernels.ops.attention.layout import empty_output
from pab_kernels.ops.attention.strides import head_strides
from pab_kernels.ops.stored import flatten_stored
from tests.csrc.machine import NUMBERS, Machine, library
from tests.ops.short_attention_cases import across, check, everything, plain, tables, temporal
from tests.ops.tensors import EIGHT_BITS, HALF, assert_same, draws

HEAD_DIMS = (64, 72, 96, 128)
KINDS = {"rms": 1, "layer": 2}
Strides = ctypes.c_int64 * 4


def _struct(*fields: tuple[str, type]) -> type[ctypes.Structure]:
    return type("Struct", (ctypes.Structure,), {"_fields_": [(name, kind) for names, kind in fields for name in names.split()]})


Norm = _struct(("kind", ctypes.c_int), ("eps", ctypes.c_float), ("weight bias rstd", ctypes.c_void_p), ("rstd_strides", Strides))
Arguments = _struct(
    ("q k v out stored stored_scale", ctypes.c_void_p),
    ("q_strides k_strides v_strides out_strides stored_strides stored_scale_strides", Strides),
    ("q_norm k_norm", Norm),
    ("cos sin", ctypes.c_void_p),
    ("scale", ctypes.c_float),
    ("sequences batch tokens heads head_dim rotary", ctypes.c_int64),
    ("interleaved", ctypes.c_bool),
    ("dtype stored_dtype", ctypes.c_int),
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return library("short_attention.cu", tmp_path_factory.mktemp("lockstep"), ["short_attention_plan.cpp"])


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def call(request, kernels):
    return partial(launch, Machine(kernels, request.param))


def _pointer(t):
    return None if t is None else t.data_ptr()


def _norm(norm):
    if norm is None:
        return Norm()
    strides = (0, 0, 0, 0) if norm.rstd is None else (*head_strides(norm.rstd[..., None, None])[:3], 0)
    kind = KINDS[norm.kind] if norm.rstd is None else 3
    return Norm(kind, norm.eps, *map(_pointer, (norm.weight, norm.bias, norm.rstd)), Strides(*strides))


def launch(machine, q, k, v, *, softmax_scale=None, q_norm=None, k_norm=None, rope=None, store_dtype=None, places=None):
    """`short_attention` under the machine, into `places` or new ones."""
    *batch, tokens, heads, head_dim = q.shape
    if places is not None:
        out, stored = places
    else:
        out, stored = empty_output(q, q.dtype, head_dim), None
        if store_dtype is not None:
            stored = empty_output(q, store_dtype, head_dim)
            if store_dtype != q.dtype:
                stored = Quantized(stored, empty_output(q, torch.float32, 1), head_dim)
    data, scale = flatten_stored(stored)
    tensors = (q, k, v, out, data, scale)
    cos, sin = (None, None) if rope is None else (rope.cos, rope.sin)
    arguments = Arguments(
        *map(_pointer, tensors), *(Strides(*head_strides(t)) for t in tensors), _norm(q_norm), _norm(k_norm), _pointer(cos), _pointer(sin),
        (head_dim**-0.5 if softmax_scale is None else softmax_scale) / log(2), prod(batch), batch[-1], tokens, heads, head_dim,
        0 if cos is None else 2 * cos.shape[-1], rope is not None and rope.interleaved,
        NUMBERS[q.dtype], NUMBERS[q.dtype if data is None else data.dtype],
    )  # fmt: skip
    norms = [n for n in (q_norm, k_norm) if n is not None]
    read = [q, k, v, cos, sin, *(t for n in norms for t in (n.weight, n.bias, n.rstd))]
    machine.launch("pab_short_attention", arguments, [t for t in read if t is not None], [t for t in (out, data, scale) if t is not None])
    return out, stored


packed = partial(temporal, device="cpu")
options = partial(everything, device="cpu")


def _norms(q, k, dim, dtype):
    """Every kind of norm, affine and not, as pairs for q and k."""
    draw = draws(dtype, 1)
    rms, layer = QKNorm("rms", draw(dim), None, 1e-5), QKNorm("layer", draw(dim), draw(dim), 1e-5)
    yield from (
        (None, None),
        (rms, rms),
        (layer, layer),
        (plain("rms"), plain("layer")),
        (across(q), across(k, seed=6)),
        (across(q, False), rms),
    )
    yield (QKNorm("layer", None, draw(dim)), QKNorm("layer", draw(dim)))


@pytest.mark.parametrize("tokens", range(1, 65))
def test_every_length(kernels, tokens):
    """Head dimensions, dtypes, norms and rotary embeddings go round with the lengths."""
    dim, dtype = HEAD_DIMS[tokens % 4], HALF[tokens // 4 % 2]
    inputs = packed(tokens, heads=3 if tokens <= 32 else 1, places=3 if tokens <= 32 else 1, dim=dim, dtype=dtype, b=1)
    norms = list(_norms(*inputs[:2], dim, dtype))
    q_norm, k_norm = norms[tokens % len(norms)]
    rotary = (dim, 0, dim // 2, dim - 8, 6, dim)[tokens % 6]
    rope = tables(tokens, rotary // 2, tokens % 5 > 1, "cpu") if rotary else None
    check(partial(launch, Machine(kernels, tokens % 3 == 0)), inputs, 0.2 if tokens % 2 else None, q_norm, k_norm, rope)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [13, 27, 50])
def test_every_kernel_with_every_option(kernels, tokens, dim, interleaved):
    dtype = HALF[(tokens + dim // 8 + interleaved) % 2]
    machine = Machine(kernels, interleaved)
    inputs = packed(tokens, heads=2, places=1, dim=dim, dtype=dtype)
    check(partial(launch, machine), inputs, **options(tokens, dim, dtype, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 4, 18, 28, 33, 35, 36])
def test_partial_rotary_embeddings(call, pairs, interleaved):
    """Those that rotate whole words in registers, and those that go through shared memory."""
    for tokens in (15, 40):
        check(call, packed(tokens, places=1, dim=72), q_norm=plain("layer"), rope=tables(tokens, pairs, interleaved, "cpu"))


def test_every_norm_of_q_and_k(call):
    q, k, v = packed(9, dim=72, heads=3)
    q += 3  # a mean to be taken off
    for q_norm, k_norm in _norms(q, k, 72, q.dtype):
        check(call, [q, k, v], None, q_norm, k_norm)
        check(call, [q, k, v], None, k_norm, q_norm)


@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16, *EIGHT_BITS])
@pytest.mark.parametrize(("tokens", "dim"), [(7, 72), (30, 64), (23, 72), (45, 72), (64, 128)])
def test_outputs_are_written_once_and_alone(call, tokens, dim, store_dtype):
    """Into views with room around every head; what is stored is what was written, in the bits that `quantize` gives."""
    inputs = packed(tokens, dim=dim, heads=3, places=1)

    def place(dtype, channels=dim):
        room = torch.zeros(2, 1, tokens + 1, 4, channels + (16 if channels > 1 else 0), dtype=dtype)
        return room[:, :, 1:, 1:, :channels]

    stored = None if store_dtype is None else place(store_dtype)
    if store_dtype in EIGHT_BITS:
        stored = Quantized(stored, place(torch.float32, 1), dim)
    out, stored = call(*inputs, **options(tokens, dim), places=(place(torch.bfloat16), stored))
    expected, _ = call(*inputs, **options(tokens, dim))
    assert_same(out, expected, strides=False)
    if store_dtype == torch.bfloat16:
        assert_same(stored, out)
    elif store_dtype is not None:
        assert_same(stored, quantize(out, store_dtype, dim, backend="reference"), strides=False)


@pytest.mark.parametrize("tokens", [6, 20, 40])
def test_operands_lie_anywhere(call, tokens):
    """Strides of their own, expanded, with one batch dimension, and k and v other than q."""
    draw = draws(torch.bfloat16)
    q = draw(2, 3, tokens + 1, 3, 80)[:, :, 1:, 1:, 8:]
    k, v = draw(1, 3, 1, 2, 72).expand(2, 3, tokens, 2, 72), draw(2, 1, tokens, 1, 72).expand(2, 3, tokens, 2, 72)
    check(call, [q, k, v])
    check(call, [v, q, k], q_norm=across(v), k_norm=across(q))
    rows = [draw(5, tokens, 3, 2, 72).select(2, i) for i in range(3)]
    check(call, rows, q_norm=across(rows[0]), k_norm=plain("rms"))


@pytest.mark.parametrize(("heads", "places", "b"), [(1, 1, 1), (5, 1, 1), (4, 1, 1), (3, 7, 1), (1, 2, 3)])
def test_blocks_may_end_anywhere_among_the_heads(call, heads, places, b):
    for tokens in (5, 17, 33):
        check(call, packed(tokens, heads=heads, places=places, b=b, dim=64), q_norm=plain("rms"))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2])
def test_softmax_scales_and_large_scores(call, scale):
    q, k, v = packed(17, dim=64)
    check(call, [q, k, v], softmax_scale=scale)
    check(call, [q * 30, k * 30, v], softmax_scale=0.125)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("tokens", [6, 25, 40])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_head_of_its_sequence(call, tokens, which, bad):
    inputs = packed(tokens, dim=72)
    clean, _ = call(*inputs)
    inputs[which][1, 1, tokens // 2, 1, 70] = bad
    out, stored = call(*inputs, store_dtype=torch.float8_e4m3fn)
    if which == 2:
        assert not out[1, 1, :, 1, 70].isfinite().any() and not stored.scale[1, 1, :, 1].isfinite().any()
        assert torch.equal(out[1, 1, :, 1, :70], clean[1, 1, :, 1, :70])
    elif torch.isnan(torch.tensor(bad)):
        assert out[1, 1, tokens // 2 if which == 0 else slice(None), 1].isnan().all()
    out[1, 1, :, 1] = clean[1, 1, :, 1]
    assert_same(out, clean)


def test_what_the_planner_refuses_is_not_launched(kernels):
    assert kernels.pab_short_attention(ctypes.byref(Arguments()), None) == 1  # cudaErrorInvalidValue
