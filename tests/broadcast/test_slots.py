"""Slots: what is kept comes back, its bytes are known beforehand, and it is let go when it should be."""

from __future__ import annotations

import weakref
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from pab_kernels.broadcast.generation import Generation
from pab_kernels.broadcast.slots import CACHE_DTYPES, Arena, Key, Meters, nbytes, pack, slot_bytes, unpack
from pab_kernels.ops import Quantized, quantize
from pab_kernels.ops.quantized import FORMATS
from pab_kernels.rules.config import CacheDtype, PABConfig
from pab_kernels.rules.plan import Sublayer

QUANTISED = (torch.float8_e4m3fn, torch.int8, torch.int4)
RAGGED = ((3, 1), (2, 5, 127), (1, 128), (7, 129), (2, 3, 1152), (1, 1, 1, 300))
KEY = Key((2, 3), torch.float32, torch.device("cpu"))
Pair = namedtuple("Pair", ["text", "image"])


def _nest() -> Any:
    return {
        "pair": Pair(torch.randn(2, 129), torch.randn(3, 5, dtype=torch.bfloat16)),
        "rest": [torch.arange(4), torch.tensor([True, False]), None, 7, "name", (torch.randn(1, 1),)],
        "loss": torch.tensor(0.5),
    }


def test_unquantised_values_are_kept_as_they_are() -> None:
    nest = _nest()
    assert pack(nest, None) is nest
    kept = unpack(nest, torch.bfloat16)
    leaves = zip(pytree.tree_leaves(kept), pytree.tree_leaves(nest), strict=True)
    assert all(a is b for a, b in leaves)


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_a_nest_is_quantised_where_it_is_floating_and_comes_back_in_its_shape(dtype: torch.dtype) -> None:
    nest = _nest()
    kept = pack(nest, dtype)
    assert isinstance(kept["pair"], Pair) and isinstance(kept["rest"][5][0], Quantized)
    for quantized in kept["pair"]:
        assert isinstance(quantized, Quantized) and quantized.dtype == dtype and quantized.group == FORMATS[dtype].group
    back = unpack(kept, torch.float32)
    for name in ("text", "image"):
        value, original = getattr(back["pair"], name), getattr(nest["pair"], name)
        assert value.shape == original.shape and value.dtype == torch.float32
        assert (value - original.float()).norm() <= (0.15 if dtype == torch.int4 else 0.05) * original.float().norm()
    assert all(back["rest"][i] is nest["rest"][i] for i in range(5))
    assert back["loss"] is nest["loss"], "a number has no channels to quantise"


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_what_is_quantised_already_is_left_so(dtype: torch.dtype) -> None:
    quantized = quantize(torch.randn(2, 130), dtype)
    assert pack((quantized,), dtype)[0] is quantized


@pytest.mark.parametrize("shape", RAGGED, ids=str)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_foreseen_from_the_shape(
    shape: tuple[int, ...], cache_dtype: CacheDtype | None, dtype: torch.dtype
) -> None:
    kept = pack(torch.randn(shape, dtype=dtype), CACHE_DTYPES[cache_dtype])
    assert nbytes(kept) == slot_bytes(shape, dtype, cache_dtype)
    tensors = (kept.data, kept.scale) if isinstance(kept, Quantized) else (kept,)
    assert nbytes(kept) == sum(t.untyped_storage().nbytes() for t in tensors)


def test_bytes_of_a_nest_are_those_of_all_its_tensors() -> None:
    nest = {"a": [torch.zeros(3, dtype=torch.float64), None], "b": (quantize(torch.zeros(2, 129), torch.int8), 5)}
    assert nbytes(nest) == 3 * 8 + 2 * (129 + 2 * 4)


def test_packing_runs_on_the_meta_device() -> None:
    kept = pack(torch.empty(2, 130, device="meta"), torch.int8)
    assert kept.data.is_meta and nbytes(kept) == slot_bytes((2, 130), torch.float32, "int8")
    assert unpack(kept, torch.bfloat16).shape == (2, 130)


# Who may read


@pytest.mark.parametrize(
    "other",
    [
        Key((2, 4), torch.float32, torch.device("cpu")),
        Key((2, 3, 1), torch.float32, torch.device("cpu")),
        Key((2, 3), torch.bfloat16, torch.device("cpu")),
        Key((2, 3), torch.float32, torch.device("meta")),
        Key((2, 3), torch.float32, torch.device("cuda", 1)),
    ],
    ids=str,
)
def test_a_slot_of_another_shape_dtype_or_device_does_not_serve(other: Key) -> None:
    assert other != KEY and not other.matches(torch.zeros(2, 3)) and KEY.matches(torch.zeros(2, 3))


def test_keys_are_equal_where_only_values_and_strides_differ() -> None:
    assert Key.of(torch.zeros(3, 2).T) == Key.of(torch.ones(2, 3)) == KEY
    assert Key.of(torch.empty(2, 3, device="meta")) != KEY


# The arena


def test_the_meter_counts_what_is_held_and_its_peak_over_all_contexts() -> None:
    meter = Meters()
    first, second = Arena(meter), Arena(meter)
    first.put("a", "spatial", torch.zeros(10), KEY, 0)
    second.put("a", "spatial", torch.zeros(5), KEY, 0)
    assert (meter.now, meter.peak) == (60, 60)
    first.put("a", "spatial", torch.zeros(20), KEY, 1)  # the former value is let go first
    assert (meter.now, meter.peak) == (100, 100)
    first.release("a")
    first.release("a")
    first.release("never there")
    assert (meter.now, meter.peak) == (20, 100)
    second.put("b", "cross", quantize(torch.zeros(1, 128), torch.int8), KEY, 2)
    assert (meter.now, meter.peak, len(second), len(first)) == (20 + 132, 152, 2, 0)
    second.clear()
    assert (meter.now, meter.peak, len(second)) == (0, 152, 0)
    by_kind = [{kind: (meter.now, meter.peak) for kind, meter in arena.meters.items()} for arena in (first, second)]
    assert by_kind == [{"spatial": (0, 80)}, {"spatial": (0, 20), "cross": (0, 132)}]


def test_a_put_is_read_back_until_it_is_released() -> None:
    arena, value = Arena(Meters()), torch.zeros(4)
    assert arena.get("a") is None
    arena.put("a", "spatial", value, KEY, 3)
    slot = arena.get("a")
    assert slot is not None and slot.value is value and (slot.key, slot.source, slot.nbytes) == (KEY, 3, 16)
    assert arena.get("b") is None
    arena.release("a")
    assert arena.get("a") is None


def test_the_newest_outputs_are_kept_as_many_as_are_asked_for() -> None:
    meter = Meters()
    arena = Arena(meter)
    arena.put("a", "spatial", torch.zeros(1), KEY, 0, most=2)
    arena.put("a", "spatial", torch.zeros(2), KEY, 3, most=2)
    arena.put("b", "spatial", torch.zeros(8), KEY, 3)
    assert [slot.source for slot in arena.held("a")] == [3, 0]
    assert (meter.now, len(arena)) == (4 + 8 + 32, 3)
    arena.put("a", "spatial", torch.zeros(4), KEY, 5, most=2)  # the oldest is let go first
    assert [slot.source for slot in arena.held("a")] == [5, 3]
    assert (meter.now, meter.peak, len(arena)) == (8 + 16 + 32, 56, 3)
    arena.release("a", 2)
    arena.release("a", 1)
    assert [slot.source for slot in arena.held("a")] == [5]
    assert (meter.now, len(arena)) == (16 + 32, 2)
    arena.release("a", 0)
    assert arena.get("a") is None and (meter.now, len(arena)) == (32, 1)
    arena.clear()
    assert (meter.now, len(arena)) == (0, 0)


def _put(arena: Arena, name: str) -> weakref.ref[torch.Tensor]:
    value = torch.zeros(8)
    arena.put(name, "spatial", {"out": value}, KEY, 0)
    return weakref.ref(value)


def test_memory_is_freed_on_release_overwrite_and_clear() -> None:
    arena = Arena(Meters())
    refs = {name: _put(arena, name) for name in ("released", "overwritten", "cleared")}
    assert all(ref() is not None for ref in refs.values())
    arena.release("released")
    assert refs["released"]() is None
    arena.put("overwritten", "spatial", None, KEY, 1)
    assert refs["overwritten"]() is None and refs["cleared"]() is not None
    arena.clear()
    assert refs["cleared"]() is None


def test_a_slot_is_freed_when_its_last_reader_is_done_with_it() -> None:
    sublayer, x = Sublayer("a", "spatial", 0), torch.zeros(2, 3)
    generation = Generation(PABConfig(spatial=3), [sublayer], num_steps=6)
    refs: list[weakref.ref[torch.Tensor]] = []
    for _ in range(6):
        call = generation.open()
        assert call is not None
        call.prepare()
        turn = call.turns.by_name["a"]
        slot = turn.take(x)
        if slot is None and turn.stores:
            out = torch.zeros(2, 3)
            refs.append(weakref.ref(out))
            turn.put(out)
            del out
        alive = generation.plan is not None and generation.plan.decision("a", generation.step).held > 0
        assert generation.meter.now == (24 if alive else 0)
        assert [ref() is not None for ref in refs[-1:]] == ([slot is not None or alive] if refs else [])
        del turn, call, slot
        assert [ref() is not None for ref in refs] == [False] * (len(refs) - 1) + ([alive] if refs else [])
    assert len(refs) == 2
