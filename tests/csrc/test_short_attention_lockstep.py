"""The unmodified kernel and binding of short_attention on the CPU: the reference's results, every element written once,
no other touched.

All goes through ops/short_attention/cuda.py and torch's dispatcher, as on a device.
"""

from __future__ import annotations

import ctypes
from functools import partial

import pytest
import torch

from pab_kernels.ops import QKNorm, Quantized, Rope, quantize
from pab_kernels.ops.short_attention import ShortAttention, cuda
from tests.csrc.binding import bound
from tests.csrc.machine import Machine
from tests.ops.short_attention_cases import across, everything, plain, tables, temporal
from tests.ops.short_attention_cases import check as checked
from tests.ops.tensors import EIGHT_BITS, HALF, assert_same, draws

HEAD_DIMS = (64, 72, 96, 128)
KERNEL = cuda._kernel


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The kernel under the machine, and around it the unmodified binding, for CPU tensors, loaded into torch."""
    return bound("short_attention", tmp_path_factory.mktemp("lockstep"))


@pytest.fixture(autouse=True)
def forwards(kernels, monkeypatch):
    monkeypatch.setattr(cuda, "_kernel", partial(launch, Machine(kernels, False)))


@pytest.fixture
def backwards(kernels, monkeypatch):
    """A function after which threads are stepped from the last on."""
    return lambda: monkeypatch.setattr(cuda, "_kernel", partial(launch, Machine(kernels, True)))


def launch(machine, *arguments):
    """The registered kernel of ops/short_attention/cuda.py, which writes its last three arguments."""
    read, written = ([t for t in some if isinstance(t, torch.Tensor)] for some in (arguments[:-3], arguments[-3:]))

    def call():
        try:
            KERNEL(*arguments)
        except RuntimeError as error:
            return str(error)
        return 0

    machine.run(call, read, written)


def attend(q, k, v, *, softmax_scale=None, q_norm=None, k_norm=None, rope=None, store_dtype=None, places=None):
    """`short_attention` with backend "cuda", into `places` or new ones."""
    call = ShortAttention(q, k, v, softmax_scale, None, q_norm, k_norm, rope, store_dtype)
    outputs = call.empty() if places is None else places
    cuda.launch(call, outputs)
    return outputs


check = partial(checked, attend)
packed = partial(temporal, device="cpu")
options = partial(everything, device="cpu")


def _norms(q, k, dim, dtype):
    """Every kind of norm, affine and not, as pairs for q and k."""
    draw = draws(dtype, 1)
    rms, layer = QKNorm("rms", draw(dim), None, 1e-5), QKNorm("layer", draw(dim), draw(dim), 1e-5)
    return [
        (None, None),
        (rms, rms),
        (layer, layer),
        (QKNorm("rms", eps=0.5), QKNorm("layer", eps=2.0)),
        (across(q), across(k, seed=6)),
        (across(q, False), rms),
        (QKNorm("layer", None, draw(dim)), QKNorm("layer", draw(dim))),
    ]


@pytest.mark.parametrize("tokens", range(1, 65))
def test_every_length(tokens):
    """Head dimensions, dtypes, norms and rotary embeddings go round with the lengths."""
    dim, dtype = HEAD_DIMS[tokens % 4], HALF[tokens // 4 % 2]
    inputs = packed(tokens, heads=3 if tokens <= 32 else 1, places=3 if tokens <= 32 else 1, dim=dim, dtype=dtype, b=1)
    norms = _norms(*inputs[:2], dim, dtype)
    q_norm, k_norm = norms[tokens % len(norms)]
    rotary = (dim, 0, dim // 2, dim - 8, 6, dim)[tokens % 6]
    rope = tables(tokens, rotary // 2, tokens % 5 > 1, "cpu") if rotary else None
    check(inputs, 0.2 if tokens % 2 else None, q_norm, k_norm, rope)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", [13, 27, 50])
def test_every_kernel_with_every_option(tokens, dim, interleaved):
    dtype = HALF[(tokens + dim // 8 + interleaved) % 2]
    inputs = packed(tokens, heads=2, places=1, dim=dim, dtype=dtype)
    check(inputs, **options(tokens, dim, dtype, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 4, 18, 28, 33, 35, 36])
def test_partial_rotary_embeddings(pairs, interleaved):
    """Those that rotate whole words in registers, and those that go through shared memory."""
    for tokens in (15, 40):
        check(packed(tokens, places=1, dim=72), q_norm=plain("layer"), rope=tables(tokens, pairs, interleaved, "cpu"))


def test_every_norm_of_q_and_k():
    q, k, v = packed(9, dim=72, heads=3)
    q += 3  # a mean to be taken off
    for q_norm, k_norm in _norms(q, k, 72, q.dtype):
        check([q, k, v], None, q_norm, k_norm)
        check([q, k, v], None, k_norm, q_norm)


@pytest.mark.parametrize("store_dtype", [None, torch.bfloat16, *EIGHT_BITS])
@pytest.mark.parametrize(("tokens", "dim"), [(7, 72), (30, 64), (23, 72), (45, 72), (64, 128)])
def test_outputs_are_written_once_and_alone(tokens, dim, store_dtype):
    """Into views with room around every head; what is stored is what was written, in the bits that `quantize` gives."""
    inputs = packed(tokens, dim=dim, heads=3, places=1)

    def place(dtype, channels=dim):
        room = torch.zeros(2, 1, tokens + 1, 4, channels + (16 if channels > 1 else 0)).to(dtype)
        return room[:, :, 1:, 1:, :channels]

    stored = None if store_dtype is None else place(store_dtype)
    if store_dtype in EIGHT_BITS:
        stored = Quantized(stored, place(torch.float32, 1), dim)
    out, stored = attend(*inputs, **options(tokens, dim), places=(place(torch.bfloat16), stored))
    expected, _ = attend(*inputs, **options(tokens, dim))
    assert_same(out, expected, strides=False)
    if store_dtype == torch.bfloat16:
        assert_same(stored, out)
    elif store_dtype is not None:
        assert_same(stored, quantize(out, store_dtype, dim, backend="reference"), strides=False)


@pytest.mark.parametrize("tokens", [6, 20, 40])
def test_operands_lie_anywhere(tokens):
    """Strides of their own, expanded, with one batch dimension, and k and v other than q."""
    draw = draws(torch.bfloat16)
    q = draw(2, 3, tokens + 1, 3, 80)[:, :, 1:, 1:, 8:]
    k, v = draw(1, 3, 1, 2, 72).expand(2, 3, tokens, 2, 72), draw(2, 1, tokens, 1, 72).expand(2, 3, tokens, 2, 72)
    check([q, k, v])
    check([v, q, k], q_norm=across(v), k_norm=across(q))
    rows = [draw(5, tokens, 3, 2, 72).select(2, i) for i in range(3)]
    check(rows, q_norm=across(rows[0]), k_norm=plain("rms"))


@pytest.mark.parametrize(("heads", "places", "b"), [(1, 1, 1), (5, 1, 1), (4, 1, 1), (3, 7, 1), (1, 2, 3)])
def test_blocks_may_end_anywhere_among_the_heads(heads, places, b):
    for tokens in (5, 17, 33):
        check(packed(tokens, heads=heads, places=places, b=b, dim=64), q_norm=plain("rms"))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2])
def test_softmax_scales_and_large_scores(scale):
    q, k, v = packed(17, dim=64)
    check([q, k, v], softmax_scale=scale)
    check([q * 30, k * 30, v], softmax_scale=0.125)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("tokens", [6, 25, 40])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_head_of_its_sequence(tokens, which, bad):
    inputs = packed(tokens, dim=72)
    clean, _ = attend(*inputs)
    inputs[which][1, 1, tokens // 2, 1, 70] = bad
    out, stored = attend(*inputs, store_dtype=torch.float8_e4m3fn)
    if which == 2:
        assert not out[1, 1, :, 1, 70].isfinite().any() and not stored.scale[1, 1, :, 1].isfinite().any()
        assert torch.equal(out[1, 1, :, 1, :70], clean[1, 1, :, 1, :70])
    elif torch.isnan(torch.tensor(bad)):
        assert out[1, 1, tokens // 2 if which == 0 else slice(None), 1].isnan().all()
    out[1, 1, :, 1] = clean[1, 1, :, 1]
    assert_same(out, clean)


def test_what_the_planner_refuses_is_not_launched(kernels):
    q, none = torch.zeros(1, 5, 2, 80, dtype=torch.float16), (0, None, None, None, 0.0)
    with pytest.raises(RuntimeError, match="short_attention: head dimensions of 64, 72, 96 and 128 are supported"):
        KERNEL(q, q, q, 1.0, *none, *none, None, None, False, q.clone(), None, None)
    assert kernels.pab_short_attention(ctypes.create_string_buffer(2048), None) == 1  # cudaErrorInvalidValue


@pytest.mark.parametrize("tokens", [14, 31, 64])
def test_the_order_of_threads_is_nothing_to_the_result(backwards, tokens):
    inputs, call = packed(tokens, dim=72), {**options(tokens, 72, interleaved=False), "store_dtype": torch.int8}
    before = attend(*inputs, **call)
    backwards()
    assert_same(attend(*inputs, **call), before)


def test_weights_and_tables_that_are_not_aligned(kernels):
    """They are copied."""
    inputs, draw = packed(12, dim=72), draws(torch.bfloat16)
    weight, table = draw(73)[1:], tables(12, 36, True, "cpu")
    strided = [torch.stack([t, torch.full_like(t, torch.nan)], 1).flatten(1)[:, :36] for t in (table.cos, table.sin)]
    norm, aligned = QKNorm("layer", weight, weight), QKNorm("layer", weight.clone(), weight.clone())
    across_norm = across(inputs[0])
    across_norm = QKNorm("rms", torch.cat([across_norm.weight, across_norm.weight], 1)[:, :72], rstd=across_norm.rstd)
    check(inputs, None, norm, across_norm, Rope(*strided, interleaved=True))
    expected = attend(*inputs, q_norm=aligned, store_dtype=torch.int8)
    assert_same(attend(*inputs, q_norm=norm, store_dtype=torch.int8), expected)


def test_nothing_to_do_is_no_launch(monkeypatch):
    monkeypatch.setattr(cuda, "_kernel", None)
    empty = torch.empty(2, 0, 5, 2, 64, dtype=torch.float16)
    out, stored = attend(empty, empty, empty, store_dtype=torch.int8)
    assert out.shape == stored.data.shape == empty.shape
