"""The planner of broadcast_residual: every channel of every token is covered once, where the tensors have it; limits
are kept; what cannot be served is refused in a sentence."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.csrc.planners import host

_host = host()

SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "float8_e4m3fn": 1}
ACTIVATIONS, EIGHT_BITS = ("float32", "float16", "bfloat16"), ("int8", "float8_e4m3fn")
X, SLOTS, GATES, SLOT_SCALES = 0, 5, 11, 14


@st.composite
def layouts(draw, sizes, channels):
    """Strides over leading dimensions of these sizes, in some order in memory, some of them broadcast."""
    strides, step = [0] * len(sizes), channels + draw(st.sampled_from([0, 0, 8, 3]))
    for dim in draw(st.sampled_from([range(len(sizes))[::-1], draw(st.permutations(range(len(sizes))))])):
        if not draw(st.booleans()) or sizes[dim] == 1:
            strides[dim] = step if sizes[dim] > 1 else 0
        step *= sizes[dim]
    return tuple(strides)


@st.composite
def calls(draw):
    sizes = tuple(draw(st.lists(st.one_of(st.integers(1, 3), st.integers(1, 9000)), max_size=4)))
    channels = draw(
        st.one_of(st.sampled_from([128, 1152, 1536, 1920, 2304, 3072, 4096, 5120, 8192]), st.integers(1, 8192))
    )
    dtype = draw(st.sampled_from(ACTIVATIONS))
    slots = draw(st.lists(st.sampled_from((dtype, *EIGHT_BITS)), max_size=3))
    before = [draw(st.sampled_from((None, dtype, *EIGHT_BITS))) for _ in slots]
    contiguous = [channels * math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    plain = draw(st.booleans())

    def operand():
        return 4096 + (0 if plain else 4 * draw(st.integers(0, 8))), contiguous if plain else list(
            draw(layouts(sizes, channels))
        )

    reads = [*slots, *[None] * (3 - len(slots)), *before, *[None] * (3 - len(slots))]
    there = [True, *draw(st.tuples(*[st.booleans()] * 4)), *(read is not None for read in reads)]
    there += [draw(st.booleans()) and i < len(slots) for i in range(3)] + [read in EIGHT_BITS for read in reads]
    operands = [operand() if i else None for i in there]
    return {
        "sizes": sizes,
        "channels": channels,
        "dtype": dtype,
        "slots": slots,
        "before": before,
        "operands": operands,
    }


def plan(sizes, channels, dtype, slots, before, operands):
    own, *dtypes = (name and getattr(_host.DType, name) for name in (dtype, *slots, *before))
    return _host.plan_broadcast_residual(sizes, channels, own, dtypes[: len(slots)], dtypes[len(slots) :], operands)


@given(calls(), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_every_channel_of_every_token_is_covered_once_within_the_limits(call, random):
    sizes, strides, made = plan(**call)
    tokens = math.prod(call["sizes"])
    if made.refusal is not None:
        assert made.refusal == "fewer than 2^31 - 4 tokens are supported" and tokens > 2**31 - 5
        return
    rows = made.block // made.row_threads
    assert (
        made.grid[0] * rows >= tokens > (made.grid[0] - 1) * rows
        and made.grid[0] * rows < 2**31
        and made.grid[1:] == (1, 1)
    )
    assert (
        made.row_threads % 32 == 0
        and made.block == rows * made.row_threads
        and rows == (4 if made.row_threads == 32 else 1)
    )
    assert made.block <= _host.broadcast_residual_max_block(made.lane_vectors) <= 512 and made.shared_bytes == 0
    assert (
        made.row_threads * made.lane_vectors * 8 >= call["channels"] > (made.row_threads - 32) * made.lane_vectors * 8
    )

    assert math.prod(sizes) == tokens and len(sizes) <= max(1, sum(size > 1 for size in call["sizes"]))
    token = random.randrange(tokens)
    index = []
    for size in call["sizes"][::-1]:
        index, token = [token % size, *index], token // size
    expected = [0 if o is None else sum(i * s for i, s in zip(index, o[1], strict=True)) for o in call["operands"]]
    token = sum(i * math.prod(call["sizes"][dim + 1 :]) for dim, i in enumerate(index))
    joined = []
    for size in sizes:  # the innermost first, as the kernel has them
        joined, token = [*joined, token % size], token // size
    assert [sum(i * s for i, s in zip(joined, of_operand, strict=True)) for of_operand in strides] == expected


@given(calls())
@settings(max_examples=300)
def test_eight_channels_at_once_are_taken_exactly_where_all_of_them_are_aligned(call):
    made = plan(**call)[2]
    if made.refusal is not None:
        return
    aligned = call["channels"] % 8 == 0
    for i, operand in enumerate(call["operands"][:SLOT_SCALES]):
        of_kind = call["slots"] if i < SLOTS + 3 else call["before"]
        dtype = of_kind[(i - SLOTS) % 3] if SLOTS <= i < GATES and operand is not None else call["dtype"]
        width = 16 if SIZE[dtype] > 1 else 8
        aligned &= operand is None or all(
            n % width == 0 for n in (operand[0], *(SIZE[dtype] * stride for stride in operand[1]))
        )
    assert made.vector_bytes == (16 if aligned else SIZE[call["dtype"]])
    assert made.lane_vectors in ((1, 3, 4, 5) if aligned and SIZE[call["dtype"]] == 2 else (2,))


def contiguous(*sizes, dtype="bfloat16", slots=(), channels=1152, **change):
    where = (4096, [channels * math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))])
    there, lacking = [where if i < len(slots) else None for i in range(3)], [None] * 3
    operands = [*[where] * 5, *there, *lacking, *there, *there, *lacking]
    return {
        "sizes": sizes,
        "channels": channels,
        "dtype": dtype,
        "slots": list(slots),
        "before": [],
        "operands": operands,
    } | change


def on_a_line(dtype="bfloat16", **missing):
    """One slot, and the one before it; `missing` are operands by number."""
    call = contiguous(5, slots=["bfloat16"]) | {"before": [dtype]}
    for operand in (SLOTS + 3, SLOT_SCALES + 3):
        call["operands"][operand] = call["operands"][X]
    for operand in missing.values():
        call["operands"][operand] = None
    return call


def test_tokens_that_all_operands_walk_through_alike_are_one_dimension():
    sizes, strides, _ = plan(**contiguous(2, 3, 4))
    assert sizes == [24] and strides[X] == [1152] and strides[SLOTS] == [0]
    call = contiguous(2, 3, 4)
    call["operands"][3] = (4096, [1152, 0, 0])
    sizes, strides, _ = plan(**call)
    assert sizes == [12, 2] and strides[X] == [1152, 12 * 1152] and strides[3] == [0, 1152]
    assert plan(**contiguous())[:1] == ([1],)


@pytest.mark.parametrize(
    ("channels", "lane_vectors", "row_threads"),
    [
        (128, 1, 32),
        (512, 1, 64),
        (768, 3, 32),
        (1024, 4, 32),
        (1152, 5, 32),
        (1536, 3, 64),
        (1920, 4, 64),
        (2304, 3, 96),
    ]
    + [(3072, 3, 128), (4096, 4, 128), (5120, 4, 160), (8192, 4, 256)],
)
def test_the_widths_of_models_leave_few_threads_idle(channels, lane_vectors, row_threads):
    made = plan(**contiguous(7, channels=channels))[2]
    assert (made.lane_vectors, made.row_threads, made.vector_bytes) == (lane_vectors, row_threads, 16)
    assert channels < 1152 or channels >= 0.9 * lane_vectors * row_threads * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 8193}, "1 to 8192 channels are supported"),
        ({"channels": 0}, "1 to 8192 channels are supported"),
        ({"dtype": "int8"}, "activations are float32, float16 or bfloat16"),
        ({"slots": ["float16"]}, "a slot has the dtype of the activations, or is int8 or float8_e4m3fn"),
        ({"slots": ["int8"]}, "a slot of 8 bits has scales"),
        ({"slots": ["bfloat16"] * 4}, "up to 3 slots are supported"),
        ({"sizes": (2**31 - 4,)}, "fewer than 2^31 - 4 tokens are supported"),
    ],
)
def test_refusals_are_sentences(change, message):
    assert plan(**contiguous(5) | change)[2].refusal == message


def test_what_is_no_line_is_refused():
    assert plan(**on_a_line())[2].refusal is None and plan(**on_a_line("int8"))[2].refusal is None
    assert (
        plan(**on_a_line("float16"))[2].refusal
        == "a slot has the dtype of the activations, or is int8 or float8_e4m3fn"
    )
    assert plan(**on_a_line("int8", scale=SLOT_SCALES + 3))[2].refusal == "a slot of 8 bits has scales"
    assert plan(**on_a_line(before=SLOTS + 3))[2].refusal == "a line has a weight and a slot before the newest"


def test_more_dimensions_than_there_is_room_for_are_refused():
    call = contiguous(2, 2, 2, 2, 2)
    assert plan(**call)[0] == [32]
    call["operands"][1] = (4096, [8, 16, 32, 64, 128])
    assert plan(**call) == (None, None, None)


def test_nothing_is_launched_for_no_tokens():
    assert plan(**contiguous(0, 7))[2].grid[0] == 0
