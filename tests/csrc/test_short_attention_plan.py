"""The planner of short_attention: every head of every sequence is covered, once; limits are kept; what cannot be served
is refused."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.csrc.planners import host

_host = host()

HEAD_DIMS = (64, 72, 96, 128)
CALL = {
    "q": (4096, 0, 1152, 3456, 72), "k": (4096, 0, 1152, 3456, 72), "v": (4096, 0, 1152, 3456, 72), "out": (4096, 0,
    1152, 3456, 72),
    "stored": None, "vectors": (0,) * 6, "sequences": 5, "batch": 5, "tokens": 16, "heads": 16, "head_dim": 72,
    "rotary": 0,
    "interleaved": True, "dtype": "bfloat16", "stored_dtype": "bfloat16",
}  # fmt: skip


def plan(**changes):
    call = CALL | changes
    dtypes = {name: getattr(_host.DType, call[name]) for name in ("dtype", "stored_dtype")}
    return _host.plan_short_attention(**call | dtypes)


calls = given(
    sequences=st.one_of(st.integers(0, 300), st.integers(0, 2**40)),
    batch=st.integers(1, 300),
    tokens=st.integers(-1, 70),
    heads=st.one_of(st.integers(0, 40), st.integers(0, 2**33)),
    head_dim=st.one_of(st.sampled_from(HEAD_DIMS), st.integers(1, 200)),
    rotary=st.integers(0, 130),
    interleaved=st.booleans(),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
)


@calls
@settings(max_examples=400)
def test_every_head_of_every_sequence_is_covered_once_within_the_limits(
    sequences, tokens, heads, head_dim, rotary, dtype, **call
):
    made = plan(sequences=sequences, tokens=tokens, heads=heads, head_dim=head_dim, rotary=rotary, dtype=dtype, **call)
    known = (
        1 <= tokens <= 64 and head_dim in HEAD_DIMS and rotary % 2 == 0 and rotary <= head_dim and dtype != "float32"
    )
    assert (made.refusal is None) == (known and sequences * heads < 2**31)
    if made.refusal is not None:
        assert ";" not in made.refusal and 10 < len(made.refusal) < 120
        return
    per_block, warps = _host.short_attention_block_heads(tokens), made.block // 32
    assert made.grid[0] * per_block >= sequences * heads > (made.grid[0] - 1) * per_block
    assert made.grid[0] * per_block < 2**32, "heads are counted in 32 bits, those of the last block beyond the end too"
    assert made.grid[0] < 2**31 and made.grid[1:] == (1, 1) and made.block == 128 and made.vector_bytes == 16
    assert warps // per_block * (32 if tokens > 16 and per_block > 1 else 16) >= tokens, "a row for every token"
    turned = rotary > 0 and not (call["interleaved"] and rotary % 8 == 0)
    needed = max((tokens > 32) * 2 * 64 * 2 * head_dim, turned * warps * 2 * 8 * 2 * head_dim)
    assert needed <= made.shared_bytes <= 48 << 10 and (needed > 0) == (made.shared_bytes > 0)


@given(
    st.sampled_from(["q", "k", "v", "out", "stored"]),
    st.integers(0, 4),
    st.integers(0, 40),
    st.sampled_from(["bfloat16", "int8"]),
)
@settings(max_examples=200)
def test_heads_that_do_not_begin_at_vectors_are_refused(name, which, change, stored_dtype):
    changed = list(CALL["q"])
    changed[which] += change
    made = plan(**{"stored": CALL["q"], name: changed}, stored_dtype=stored_dtype)
    width = 8 if name == "stored" and stored_dtype == "int8" else 16
    size = 1 if which == 0 or width == 8 else 2
    assert (made.refusal is None) == (change * size % width == 0)
    assert (
        made.refusal is None
        or f"begins at a multiple of {'16 bytes, or 8' if name == 'stored' else '16 bytes'}" in made.refusal
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "activations are float16 or bfloat16"),
        ({"dtype": "int8"}, "activations are float16 or bfloat16"),
        ({"stored": CALL["q"], "stored_dtype": "float16"}, "the dtype of the activations, int8 or float8_e4m3fn"),
        ({"head_dim": 80}, "head dimensions of 64, 72, 96 and 128 are supported"),
        ({"tokens": 65}, "1 to 64 tokens are supported"),
        ({"tokens": 0}, "1 to 64 tokens are supported"),
        ({"batch": 0}, "the second batch dimension at least 1"),
        ({"sequences": -1}, "sequences and heads are at least 0"),
        ({"rotary": 7}, "an even number of channels rotates"),
        ({"rotary": 74}, "up to the head dimension"),
        ({"sequences": 2**27}, "fewer than 2^31 heads of sequences"),
        *[
            ({"vectors": (0,) * i + (8,) + (0,) * (5 - i)}, "weights, biases and tables begin at multiples")
            for i in range(6)
        ],
    ],
)
def test_refusals_are_sentences(change, message):
    assert message in plan(**change).refusal


@pytest.mark.parametrize("change", [{"sequences": 0}, {"heads": 0}])
def test_nothing_is_launched_where_there_is_nothing(change):
    assert plan(**change).refusal is None and plan(**change).grid[0] == 0
