"""Outputs share no memory with themselves, each other or what is read: every operation refuses before anything is
written."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from pab_kernels.ops import (
    Line,
    Norm,
    QKNorm,
    Quantized,
    Rope,
    attention_out,
    broadcast_residual,
    broadcast_residual_out,
    dequantize_out,
    empty_quantized,
    project_residual_out,
    quantize,
    quantize_out,
    short_attention_out,
)
from pab_kernels.ops.overlap import overlap, overlaps_itself
from tests.ops.tensors import assert_refuses, draws


def bytes_of(t: Tensor) -> list[int]:
    """The addresses of all bytes of all elements."""
    indices = itertools.product(*(range(size) for size in t.shape))
    begins = [
        t.data_ptr() + t.itemsize * sum(i * s for i, s in zip(index, t.stride(), strict=True)) for index in indices
    ]
    return [begin + byte for begin in begins for byte in range(t.itemsize)]


@st.composite
def views(draw: Any, buffer: Tensor) -> Tensor:
    """Any strided view of a buffer."""
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    strides = draw(
        st.lists(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 8, 12, 16]), min_size=len(sizes), max_size=len(sizes))
    )
    typed = buffer.view(draw(st.sampled_from([torch.int8, torch.float16, torch.float32])))
    reach = 1 + sum(max(0, size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return typed.as_strided(sizes, strides, draw(st.integers(0, max(0, typed.numel() - reach))))


BUFFER = torch.zeros(1024, dtype=torch.int8)


@settings(max_examples=300)
@given(views(BUFFER), views(BUFFER))
def test_two_tensors_overlap_where_they_have_a_byte_in_common(a: Tensor, b: Tensor) -> None:
    assert overlap(a, b) == (not set(bytes_of(a)).isdisjoint(bytes_of(b))) == overlap(b, a)


@settings(max_examples=300)
@given(views(BUFFER))
def test_a_tensor_of_which_two_elements_share_memory_overlaps_itself(t: Tensor) -> None:
    shared = len(set(bytes_of(t))) < len(bytes_of(t))
    assert overlaps_itself(t) or not shared
    if overlaps_itself(t) and not shared:  # rows that are woven into one another are taken to overlap
        steps = sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
        assert any(outer < 1 + inner * (size - 1) for (inner, size), (outer, _) in itertools.pairwise([(1, 1), *steps]))


def test_tensors_that_are_woven_too_closely_to_be_told_apart_are_taken_to_overlap() -> None:
    """Even and odd bytes, at strides in four dimensions of which no two are multiples of each other."""
    buffer, strides = torch.zeros(20_000, dtype=torch.int8), (74, 62, 58, 46)
    for size, taken in ((2, False), (30, True)):
        even, odd = (buffer.as_strided((size,) * 4, strides, begin) for begin in (0, 1))
        assert overlap(even, odd) == taken


def test_halves_of_one_buffer_do_not_overlap() -> None:
    draw = draws()
    x, slot, both = draw(3, 8), draw(3, 8), torch.empty(3, 16)
    broadcast_residual_out(x, [slot], x_out=both[:, :8], y_out=both[:, 8:], norm=Norm())
    expected = broadcast_residual(x, [slot], norm=Norm())
    assert torch.equal(both[:, :8], expected[0]) and torch.equal(both[:, 8:], expected[1])


READ = ("x", "slot", "before", "gate", "weight", "bias", "shift", "scale", "slot scale")


@pytest.mark.parametrize("out", ["x_out", "y_out"])
@pytest.mark.parametrize("name", READ)
def test_broadcast_residual_refuses_an_output_that_shares_memory_with_what_is_read(name: str, out: str) -> None:
    draw = draws()
    memory = {of: draw(5, 128) for of in READ}
    read = {of: t[:4] for of, t in memory.items()}
    eight = Quantized(quantize(draw(4, 128), torch.int8).data, memory["slot scale"].view(-1)[100:104].view(4, 1))
    outs = {"x_out": torch.zeros(4, 128), "y_out": torch.zeros(4, 128), out: memory[name].view(-1)[64:576].view(4, 128)}
    kept = memory[name].clone()
    assert_refuses(
        ValueError,
        f"{out} shares memory with",
        broadcast_residual_out,
        read["x"],
        [Line(read["slot"], read["before"], torch.tensor(0.5)), eight],
        gates=[read["gate"], None],
        norm=Norm("layer", read["weight"][0], read["bias"][0]),
        shift=read["shift"],
        scale=read["scale"],
        **outs,
    )
    assert torch.equal(memory[name], kept) and not any(outs[other].any() for other in outs if other != out)


X, S = draws()(4, 8), draws(seed=1)(4, 8)
ROWS = torch.zeros(5, 8)
Q = [draws(seed=i)(2, 5, 2, 32) for i in range(3)]
TABLE = torch.ones(5, 16)


def attend(**options: Any) -> Any:
    return lambda op: op(*Q, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: broadcast_residual_out(X, [S], x_out=ROWS[:4], y_out=ROWS[:4], norm=Norm()),
            "y_out shares memory with x_out",
        ),
        (
            lambda: broadcast_residual_out(X, [S], x_out=ROWS[:4], y_out=ROWS[1:], norm=Norm()),
            "y_out shares memory with x_out",
        ),
        (lambda: broadcast_residual_out(X, [S], x_out=S), "x_out shares memory with slots or gates"),
        (
            lambda: broadcast_residual_out(ROWS[:4], [S], x_out=ROWS[1:]),
            "x_out shares memory with x; outputs that overlap nothing",
        ),
        (lambda: broadcast_residual_out(X, norm=Norm(), y_out=X), "y_out shares memory with x"),
        (lambda: broadcast_residual_out(X, [S], x_out=ROWS.as_strided((4, 8), (1, 1))), "x_out has strides (1, 1)"),
        (
            lambda: broadcast_residual_out(X, [S], x_out=torch.zeros(4, 8, requires_grad=True)),
            "x_out requires a gradient",
        ),
        (lambda: project_residual_out(X, S[:, :8].new_zeros(8, 8), None, S, x_out=X), "x_out shares memory with a"),
        (
            lambda: project_residual_out(
                X, ROWS.new_zeros(8, 8), None, S, x_out=ROWS[:4], stored_out=ROWS[1:], store="pre_gate"
            ),
            "stored_out shares memory with x_out",
        ),
        (
            lambda: project_residual_out(
                X, ROWS.new_zeros(8, 8), None, S, x_out=S, stored_out=Quantized(EIGHT, BITS), store="pre_gate"
            ),
            "stored_out.scale shares memory with stored_out.data",
        ),
        (lambda: quantize_out(X, Quantized(EIGHT, BITS)), "out.scale shares memory with out.data"),
        (
            lambda: quantize_out(X, Quantized(X.view(torch.int8).view(4, 32)[:, :8], torch.zeros(4, 1))),
            "out.data shares memory with x",
        ),
        (lambda: quantize_out(X, Quantized(EIGHT, torch.zeros(1).expand(4, 1))), "out.scale has strides (0, 1)"),
        (lambda: dequantize_out(Quantized(EIGHT, X[:, :1]), X), "out shares memory with q"),
    ],
)
def test_outputs_that_share_memory_are_refused(call: Any, message: str) -> None:
    kept = [t.clone() for t in (X, S, ROWS)]
    assert_refuses(ValueError, message, call)
    assert all(torch.equal(t, k) for t, k in zip((X, S, ROWS), kept, strict=True))


EIGHT = torch.zeros(4 * 8 + 16, dtype=torch.int8)[:32].view(4, 8)
BITS = EIGHT.as_strided((16,), (1,)).view(torch.float32).view(4, 1)


@pytest.mark.parametrize("op", [attention_out, short_attention_out])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (attend(out=Q[0]), "out shares memory with q"),
        (attend(out=Q[2]), "out shares memory with v"),
        (attend(out=(o := torch.zeros(2, 5, 2, 32)), stored_out=o), "stored_out shares memory with out"),
        (attend(out=o, rope=Rope(o.view(-1)[:80].view(5, 16), TABLE, True)), "out shares memory with rope"),
        (attend(out=o, q_norm=QKNorm(weight=o.view(-1)[:32])), "out shares memory with q_norm"),
        (attend(out=o, stored_out=empty_quantized((2, 5, 2, 32), torch.int8, 64)), "stored_out has groups of 64"),
    ],
)
def test_attention_refuses_outputs_that_share_memory(op: Any, call: Any, message: str) -> None:
    assert_refuses(ValueError, message, call, op)


def test_attention_refuses_an_output_that_is_its_key_lengths() -> None:
    lengths = o.view(-1)[:2].view(torch.int32)
    assert_refuses(ValueError, "out shares memory with key_lengths", attention_out, *Q, out=o, key_lengths=lengths)


def test_an_output_that_was_made_in_inference_mode_is_written_within_it_alone() -> None:
    with torch.inference_mode():
        out = torch.empty(4, 8)
        broadcast_residual_out(X, [S], x_out=out)
        assert torch.equal(out, S + X)
    assert_refuses(ValueError, "x_out was made in inference mode", broadcast_residual_out, X, [S], x_out=out)


def test_meta_tensors_have_no_memory_to_share() -> None:
    x, slot = X.to("meta"), S.to("meta")
    broadcast_residual_out(x, [slot], x_out=torch.empty_like(x), y_out=torch.empty_like(x), norm=Norm())
