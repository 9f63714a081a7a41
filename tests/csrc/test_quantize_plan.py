"""The planner of quantize and dequantize: everything is covered, once; limits are kept; what cannot be served is
refused in a sentence."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.csrc.planners import host

_host = host()

FLOATS = ("float32", "float16", "bfloat16")
EIGHT_BITS = ("int8", "float8_e4m3fn")
SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}

calls = given(
    quantize=st.booleans(),
    addresses=st.tuples(*[st.integers(0, 64).map(lambda i: 4096 + 4 * i)] * 2),
    rows=st.one_of(st.integers(0, 70), st.integers(0, 2**40)),
    channels=st.integers(1, 9000),
    group=st.one_of(st.sampled_from([40, 64, 72, 128]), st.integers(1, 300)),
    paddings=st.tuples(*[st.integers(0, 24)] * 2),
    activation=st.sampled_from(FLOATS),
    eight=st.sampled_from(EIGHT_BITS),
)


def plan(quantize, addresses, rows, channels, group, paddings, activation, eight):
    wide, narrow = getattr(_host.DType, activation), getattr(_host.DType, eight)
    function, dtypes = (_host.plan_quantize, (wide, narrow)) if quantize else (_host.plan_dequantize, (narrow, wide))
    return function(*addresses, rows, channels, group, *(channels + padding for padding in paddings), *dtypes)


@calls
@settings(max_examples=400)
def test_every_group_and_every_channel_is_covered_once_within_the_limits(quantize, rows, channels, group, **call):
    made = plan(quantize, rows=rows, channels=channels, group=group, **call)
    if made.refusal is not None:
        assert (quantize and group > 128) or rows * channels > 2**30
        return
    if quantize:
        units, per_block = rows * -(-channels // group), _host.QUANTIZE_BLOCK_GROUPS
    else:
        units, per_block = rows * channels // (8 if made.vector_bytes == 16 else 1), _host.DEQUANTIZE_BLOCK_PIECES
    assert made.grid[0] * per_block >= units > (made.grid[0] - 1) * per_block
    assert made.grid[0] * per_block < 2**32, "units are counted in 32 bits, those of the last block beyond the end too"
    assert made.grid[0] < 2**31 and made.grid[1:] == (1, 1)
    assert made.block % 32 == 0 and made.block <= 1024 and made.shared_bytes == 0


@calls
@settings(max_examples=400)
def test_eight_channels_at_once_are_taken_exactly_where_all_of_them_are_aligned(
    quantize, addresses, channels, group, paddings, **call
):
    made = plan(quantize, addresses=addresses, channels=channels, group=group, paddings=paddings, **call)
    if made.refusal is not None:
        return
    dtypes = (call["activation"], call["eight"]) if quantize else (call["eight"], call["activation"])
    aligned = channels % 8 == 0 and group % 8 == 0
    for address, padding, dtype in zip(addresses, paddings, dtypes, strict=True):
        width = 16 if dtype in FLOATS else 8
        aligned &= address % width == 0 and (channels + padding) * SIZE[dtype] % width == 0
    assert made.vector_bytes == (16 if aligned else SIZE[call["activation"]])


CALL = {"quantize": True, "addresses": (4096, 4096), "rows": 5, "channels": 256, "group": 128, "paddings": (0, 0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 129}, "groups of up to 128 channels are supported"),
        ({"group": 0}, "group is at least 1"),
        ({"channels": 0}, "channels at least 1"),
        ({"rows": -1}, "rows is at least 0"),
        ({"rows": 2**31}, "fewer than 2^31 groups are supported"),
        ({"rows": 2**31, "quantize": False}, "fewer than 2^31 accesses are supported"),
        ({"activation": "int8"}, "activations are float32"),
        ({"eight": "float16"}, "data is int8"),
    ],
)
def test_refusals_are_sentences(change, message):
    made = plan(**{**CALL, "activation": "bfloat16", "eight": "int8"} | change)
    assert message in made.refusal


def test_nothing_is_launched_for_no_rows():
    assert plan(**CALL | {"rows": 0}, activation="float16", eight="int8").grid[0] == 0
