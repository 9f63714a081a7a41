"""Linear reuse, turn by turn: what is read, with which weights, and what happens where an output is missing."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pab_kernels.broadcast.generation import Generation
from pab_kernels.broadcast.inputs import Inputs
from pab_kernels.broadcast.slots import Extrapolation, Key, Slot
from pab_kernels.broadcast.stream import ResidualStream
from pab_kernels.rules.config import Broadcast, PABConfig
from pab_kernels.rules.plan import Action, Sublayer
from pab_kernels.rules.schedule import Schedule

SUBLAYER = Sublayer("a", "spatial", 0)
X = torch.zeros(2, 3)


def begin(rule: Broadcast, num_steps: int, **config: Any) -> Generation:
    return Generation(PABConfig(spatial=rule, **config), [SUBLAYER], num_steps=num_steps)


class Taken(NamedTuple):
    slot: Any
    stores: bool


def take(generation: Generation, step: int | None = None, x: Tensor = X, name: str | None = "cond") -> Taken:
    """What the sublayer reads in one call at a step. What is to be stored is a tensor of the number of the step."""
    call = generation.open(name, step)
    assert call is not None
    call.prepare()
    turn = call.turns.by_name.get("a")
    if turn is None or turn.call is None:  # the rule reuses nothing at any step
        call.finish()
        return Taken(None, False)
    slot = turn.take(x)
    stores = slot is None and turn.stores
    if stores:
        turn.put(torch.full_like(x, call.step))
    call.finish()
    return Taken(slot, stores)


def said(turn: Taken) -> str:
    """S for a store, # for a compute, else what is read: the source, and the one before it."""
    if isinstance(turn.slot, Extrapolation):
        return " ".join(str(slot.source) for slot in turn.slot.slots)
    return str(turn.slot.source) if turn.slot else "S" if turn.stores else "#"


def forced(generation: Generation, name: str = "cond") -> int:
    return generation.contexts[name].tally("spatial").forced


def test_the_two_newest_outputs_are_read_and_let_go_in_time() -> None:
    generation = begin(Broadcast(3, (4, 9), "step", "linear"), 12)
    turns, held = [], []
    for _ in range(12):
        turns.append(said(take(generation)))
        held.append(generation.meter.now // 24)
    assert turns == ["#", "#", "S", "S", "3 2", "3 2", "S", "6 3", "6 3", "#", "#", "#"]
    assert held == [0, 0, 1, 2, 2, 1, 2, 2, 0, 0, 0, 0]
    assert forced(generation) == 0


def test_the_first_reuse_of_a_linear_rule_holds_where_nothing_was_computed_before_its_source() -> None:
    generation = begin(Broadcast(2, (0, 1), reuse="linear"), 6)
    assert [said(take(generation)) for _ in range(6)] == ["S", "0", "S", "2 0", "S", "4 2"]


def test_the_line_reads_what_lies_on_it() -> None:
    generation = begin(Broadcast(4, (0, 1), reuse="linear"), 12)
    for step in range(8):
        turn = take(generation)
        if isinstance(turn.slot, Extrapolation):
            newest, before = (slot.source for slot in turn.slot.slots)
            assert (newest, before) == (4, 0) and newest + turn.slot.weights[0] * (newest - before) == pytest.approx(
                step
            )
    assert step == 7 and isinstance(turn.slot, Extrapolation)


def test_weights_are_numbers_on_the_device_made_once_a_generation_by_a_fill() -> None:
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    called: list[str] = []
    generation = begin(Broadcast(3, (0, 1), reuse="linear"), 9)
    for device in ("cpu", "meta"):
        with Names():
            weight = generation.weight(4 / 3, torch.device(device))
            assert generation.weight(4 / 3, torch.device(device)) is weight
        assert called == ["full"] and (weight.shape, weight.dtype, weight.device.type) == ((), torch.float32, device)
        called.clear()
    assert generation.weight(1 / 3, torch.device("cpu")) == torch.tensor(1 / 3)
    assert begin(Broadcast(2), 9).weight(1 / 3, torch.device("cpu")) is not generation.weight(
        1 / 3, torch.device("cpu")
    )


# Outputs that are missing


def test_a_context_that_comes_late_computes_until_it_has_two_outputs() -> None:
    generation = begin(Broadcast(5, (2, 12), "step", "linear"), 12)
    turns = []
    for _ in range(12):
        take(generation, name="always")
        turns.append(said(take(generation, name="late")) if generation.step >= 7 else "")
    assert turns[7:] == ["S", "S", "8 7", "S", "10 8"]
    assert forced(generation, "late") == 2 and forced(generation, "always") == 0


def test_a_step_that_another_cache_skipped_is_made_up_for() -> None:
    generation = begin(Broadcast(4, (1, 99), "step", "linear"), 16)
    steps = [
        0,
        1,
        2,
        3,
        4,
        5,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
    ]  # 8, which step 9 and the second of the next would read, was skipped
    turns = dict(zip(steps, (said(take(generation, step)) for step in steps), strict=True))
    assert [turns[step] for step in (0, 1, 4, 5)] == ["S", "0", "S", "4 0"]
    assert [turns[step] for step in (9, 10, 11)] == ["S", "9 4", "9 4"], (
        "computed, and the newest became the one before"
    )
    assert [turns[step] for step in (12, 13, 14, 15)] == ["S", "12 9", "12 9", "12 9"]
    assert forced(generation) == 1


def test_an_output_before_that_is_older_than_planned_is_not_read() -> None:
    generation = begin(Broadcast(4, (1, 99), "step", "linear"), 16)
    turns = [said(take(generation, step)) for step in (0, 1, 8, 9, 10)]
    assert turns == ["S", "0", "S", "S", "9 8"], "step 9 was to read 8 and 4"
    assert forced(generation) == 1


def test_the_weight_is_that_of_the_steps_that_were_really_computed() -> None:
    generation = begin(Broadcast(4, (1, 99), "step", "linear"), 16)
    for step in (0, 1, 2, 3, 4, 5, 9):
        take(generation, step)
    slot = take(generation, 11).slot
    assert isinstance(slot, Extrapolation) and slot.weights == (torch.tensor(2 / 5),)
    assert [slot.value.unique().item() for slot in slot.slots] == [9, 4]


def test_another_shape_is_computed_until_there_are_two_outputs_of_it() -> None:
    generation = begin(Broadcast(6, (1, 99), "step", "linear"), 18)
    wide = torch.zeros(2, 5)
    turns = [said(take(generation, x=X if step < 8 else wide)) for step in range(14)]
    assert turns[6:] == ["S", "6 0", "S", "S", "9 8", "9 8", "S", "12 9"]
    assert forced(generation) == 2


def test_steps_that_go_back_never_read_what_a_later_step_computed() -> None:
    generation = begin(Broadcast(4, (1, 99), "step", "linear"), 16)
    turns = [said(take(generation, step)) for step in (0, 4, 8, 9, 5, 6, 7)]
    assert turns == ["S", "S", "S", "8 4", "S", "S", "6 5"]
    assert forced(generation) == 2


def test_a_missing_last_reuse_is_kept_where_the_next_stretch_reads_it() -> None:
    generation = begin(Broadcast(3, (1, 99), "step", "linear"), 9)
    turns = {step: said(take(generation, step)) for step in (5, 6, 7, 8)}
    assert turns == {
        5: "S",
        6: "S",
        7: "6 5",
        8: "6 5",
    }  # step 5 is the last that reads 3 and 0, and 6 is to be extended from 3
    alone = begin(Broadcast(3, (1, 6), "step", "linear"), 9)
    assert said(take(alone, 5)) == "#" and alone.meter.now == 0


def test_a_new_generation_has_no_output_of_the_old_one() -> None:
    rule = Broadcast(2, (0, 1), reuse="linear")
    old = begin(rule, 8)
    for _ in range(4):
        take(old)
    old.release()
    assert old.meter.now == 0
    assert said(take(begin(rule, 8), 3)) == "S"


def test_changed_inputs_let_go_of_both_outputs() -> None:
    generation = begin(Broadcast(4, (2, 99), "step", "linear"), 8)
    for _ in range(3):
        take(generation)
    context = generation.contexts["cond"]
    context.enter(Inputs((torch.ones(1),), {}, None, None))
    assert generation.meter.now == 48
    context.enter(Inputs((torch.ones(2),), {}, None, None))
    assert generation.meter.now == 0


def test_both_outputs_are_freed_when_the_last_reader_is_done_with_them() -> None:
    generation = begin(Broadcast(2, (2, 4), "step", "linear"), 6)
    refs = []
    for _ in range(6):
        turn = take(generation)
        slot = generation.contexts["cond"].arena.get("a")
        if turn.stores and slot is not None:
            refs.append(weakref.ref(slot.value))
        alive = [ref() is not None for ref in refs]
        assert alive == [True] * len(refs) if generation.step <= 3 else not any(alive)
        del turn, slot
    assert len(refs) == 2


# Any schedule, any calls


@settings(max_examples=100)
@given(
    rule=st.builds(
        lambda reach, window, reuse: Broadcast(reach, window, "step", reuse),
        st.integers(1, 5),
        st.lists(st.integers(0, 12), min_size=2, max_size=2, unique=True).map(sorted),
        st.sampled_from(["hold", "linear"]),
    ),
    begin_at=st.integers(0, 5),
    present=st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_whatever_calls_are_missing_only_own_earlier_outputs_are_read(
    rule: Broadcast, begin_at: int, present: Sequence[bool]
) -> None:
    generation = begin(rule, 12)
    plan = generation.start(begin_at)
    computed: list[int] = []
    for step in plan.steps:
        if not present[step]:
            continue
        turn, decision = take(generation, step), plan.decision("a", step)
        if turn.slot is None:
            computed.append(step)
            if all(present[begin_at:step]):
                assert decision.action is not Action.REUSE
        else:
            slots = turn.slot.slots if isinstance(turn.slot, Extrapolation) else [turn.slot]
            assert len(slots) == len(decision.reads)
            assert [slot.source for slot in slots] == computed[: -len(slots) - 1 : -1], "the newest first"
            assert all((slot.value == slot.source).all() for slot in slots)
            planned = list(decision.reads)
            assert all(slot.source >= i for slot, i in zip(slots, planned, strict=True)), "older than planned"
            if all(present[begin_at:step]):
                assert [slot.source for slot in slots] == planned
        assert generation.meter.now <= 24 * plan.decision("a", step).held
        if all(present[begin_at : step + 1]):
            assert generation.meter.now == 24 * plan.decision("a", step).held
    generation.release()
    assert generation.meter.now == 0


# On the residual stream


@pytest.mark.parametrize("cache_dtype", [None, "int8", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_stream_extends_outputs_that_lie_on_a_line(dtype: torch.dtype, cache_dtype: Any) -> None:
    """Against float64: what is on a straight line over the steps is hit, but for the roundings of slots, line and
    stream."""
    torch.manual_seed(3)
    x, start, slope, gate = (
        torch.randn(s, dtype=torch.float64) for s in ((2, 3, 130), (2, 3, 130), (2, 3, 130), (2, 1, 130))
    )
    generation = begin(Broadcast(4, (3, 99), "step", "linear"), 12, cache_dtype=cache_dtype)
    rounding = torch.finfo(dtype).eps + {None: 0, "int8": 1 / 127, "float8_e4m3fn": 1 / 16, "int4": 1 / 8}[cache_dtype]
    with torch.no_grad():
        for step in range(12):
            call = generation.open()
            stream = ResidualStream(x.to(dtype), call)
            call.prepare()
            turn, exact = call.turns.by_name["a"], start + step * slope / 12
            slot = turn.take(x.to(dtype))
            if slot is None:
                stream.add(exact.to(dtype), gate.to(dtype), turn if turn.stores else None)
                continue
            assert isinstance(slot, Extrapolation)
            stream.reuse(slot, gate.to(dtype))
            error = (stream.read().double() - (x + gate * exact)).abs().max()
            size = max(v.abs().max() for v in (x, start, slope)) * max(1.0, gate.abs().max())
            assert error <= (1 + 2 * slot.weights[0]) * 2 * rounding * size


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=["both", "one of two"]
)
@torch.no_grad()
def test_under_autocast_a_line_of_another_dtype_is_added_as_the_plain_expression(
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    key = Key((2, 8), torch.float32, torch.device("cpu"))
    values = [torch.randn(2, 8).to(dtype) for dtype in dtypes]
    newest, before = (Slot(v, key, source, 32, v.dtype) for v, source in zip(values, (4, 1), strict=True))
    x, gate = torch.randn(2, 8), torch.randn(8)
    stream = ResidualStream(x, begin(Broadcast(2), 9).open())
    w = torch.tensor(2 / 3)
    stream.reuse(Extrapolation((newest, before), (w,)), gate)
    c, c_prev = (v.float() for v in values)
    assert torch.equal(stream.read(), gate * (c + w * (c - c_prev)).to(dtypes[0]) + x)


def test_a_schedule_that_is_entered_in_the_middle_begins_without_a_line() -> None:
    generation = begin(Broadcast(3, (0, 1), reuse="linear"), 12)
    generation.start(5)
    assert generation.schedule == Schedule(12, begin=5)
    assert [said(take(generation)) for _ in range(7)] == ["S", "5", "5", "S", "8 5", "8 5", "#"]
