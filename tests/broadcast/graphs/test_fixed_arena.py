"""Slots at fixed addresses: the arena under CUDA graphs holds and counts what any arena does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pab_kernels.broadcast.graphs.fixed_arena import FixedArena
from pab_kernels.broadcast.signature import copy_into, like, signature, tensors_of
from pab_kernels.broadcast.slots import Arena, Key, Meters, pack, unpack

KEY = Key((2, 4), torch.float32, torch.device("cpu"))


def value(number: float, *shape: int) -> Tensor:
    return torch.full(shape or (2, 4), number, dtype=torch.float32)


def held(arena: Arena, name: str) -> list[tuple[float, int]]:
    """The first number and the step of every slot of a sublayer, the newest first."""
    slots = arena.held(name)
    return [(float(tensors_of(slot.value)[0].flatten()[0]), slot.source) for slot in slots]


def test_the_newest_output_stays_where_it_is_and_the_one_before_it_moves() -> None:
    arena = FixedArena(Meters(), {}, lambda name: 2)
    arena.put("a", "mlp", value(1), KEY, 0, most=2)
    lies = tensors_of(arena.get("a").value)[0].data_ptr()  # type: ignore[union-attr]
    for step in (1, 2):
        given = value(step + 1)
        arena.put("a", "mlp", given, KEY, step, most=2)
        given.fill_(0)
        newest, before = arena.held("a")
        assert newest.value.data_ptr() == lies != before.value.data_ptr()
        assert held(arena, "a") == [(step + 1, step), (step, step - 1)]
    arena.clear()
    assert held(arena, "a") == [] and len(arena.places) == 1
    arena.put("a", "mlp", value(7), KEY, 5, most=2)
    assert held(arena, "a") == [(7, 5)], "what lies in the place of the one before is of another time"


def test_an_output_that_looks_another_way_has_a_place_of_its_own() -> None:
    arena = FixedArena(Meters(), {}, lambda name: 2)
    arena.put("a", "mlp", value(1), KEY, 0, most=2)
    arena.put("a", "mlp", value(2).half(), KEY, 1, most=2)
    assert held(arena, "a") == [(2, 1), (1, 0)] and len(arena.places) == 2
    arena.put("a", "mlp", pack(value(3), torch.int8), KEY, 2, torch.float32, most=1)
    slot = arena.get("a")
    assert slot is not None and torch.equal(unpack(slot.value, torch.float32), value(3)) and len(arena.places) == 3


def test_changes_are_repeated_with_the_counts_of_the_call_itself() -> None:
    """In the block a, b is stored and d read for the last time: what a held is let go before."""

    def first(arena: Arena) -> Arena:
        arena.put("a", "block", value(1), KEY, 0)
        arena.put("d", "mlp", value(2), KEY, 0)
        return arena

    def second(arena: Arena) -> Arena:
        arena.release("a", 0)
        arena.put("b", "cross", value(3), KEY, 1)
        arena.release("d", 0)
        arena.put("a", "block", value(4), KEY, 1)
        return arena

    plain, captured = second(first(Arena(Meters()))), FixedArena(Meters(), {}, lambda name: 1)
    first(captured)
    captured.changes.clear()
    second(captured)
    repeated = FixedArena(Meters(), captured.places, lambda name: 1)
    first(repeated)
    captured.places["a", signature(value(0), "a test")].write(value(4))  # the device has made its own
    repeated.repeat(captured.changes, 1, {"a": 1, "b": 1, "d": 0}.__getitem__)
    for name in "abd":
        assert held(repeated, name) == held(plain, name)
    assert repeated._meter.peak == plain._meter.peak == 2 * KEY_BYTES
    assert {kind: vars(meter) for kind, meter in repeated.meters.items()} == {
        kind: vars(meter) for kind, meter in plain.meters.items()
    }


KEY_BYTES = value(0).nbytes


def test_a_rehearsal_leaves_the_arena_alone_and_may_do_nothing_else() -> None:
    arena = FixedArena(Meters(), {}, lambda name: 1)
    arena.put("a", "mlp", value(1), KEY, 0)
    dry = arena.rehearsal(writes=False)
    dry.put("a", "mlp", value(2), KEY, 1)
    assert held(arena, "a") == [(1, 0)] and held(dry, "a") == [(1, 1)] and arena._meter.now == KEY_BYTES
    with pytest.raises(RuntimeError, match="a gave another output than in a call before with the same inputs"):
        dry.put("a", "mlp", value(2, 3, 4), KEY, 1)


def test_signatures_tell_everything_but_values_apart() -> None:
    base: Any = {"x": torch.zeros(2, 1, 4), "n": 1}
    same = [{"x": torch.ones(2, 1, 4), "n": 1}, {"x": torch.zeros(2, 2, 4)[:, :1].contiguous(), "n": 1}]
    x = base["x"]
    other = [
        {"x": x, "n": 1.0},
        {"x": x, "n": True},
        {"x": x, "n": "1"},
        {"x": x, "m": 1},
        {"x": [x], "n": 1},
        {"x": x.double(), "n": 1},
        {"x": x.to("meta"), "n": 1},
        {"x": torch.zeros(2, 1, 8)[..., ::2], "n": 1},
        {"x": torch.nn.Parameter(x), "n": 1},
        {"x": pack(x, torch.int8), "n": 1},
        {"x": pack(x, torch.float8_e4m3fn), "n": 1},
    ]
    told = [signature(nest, "a test") for nest in (base, *other)]
    assert all(signature(nest, "a test") == told[0] for nest in same)
    assert len(set(told)) == len(told)
    assert signature({"x": x.expand(2, 1, 4), "n": 1}, "a test") == told[0]
    with pytest.raises(TypeError, match="got an instance of set in a test; .* are supported"):
        signature({"x": {1}}, "a test")


def test_like_has_memory_of_its_own_that_can_be_written_in_any_mode() -> None:
    with torch.inference_mode():
        nest = [torch.ones(1, 3).expand(2, 3), pack(torch.ones(2, 4), torch.int8), None]
        made = like(nest)
    copy_into(made, nest)
    assert (
        all(torch.equal(a, b) for a, b in zip(tensors_of(made), tensors_of(nest), strict=True))
        and len(tensors_of(made)) == 3
    )
    assert made[0].is_contiguous() and not made[0].is_inference() and made[2] is None
