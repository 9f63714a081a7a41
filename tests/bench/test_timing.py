"""The rotation of input sets, and what a timing holds."""

from __future__ import annotations

import pytest
import torch

from bench import timing
from bench.__main__ import OPS, cases
from bench.case import Draw, nbytes, poison, unwritten
from bench.geometries import GEOMETRIES
from pab_kernels.ops import quantize

MIB = 2**20
MODELS = [name for name, geometry in GEOMETRIES.items() if not geometry.small]


@pytest.mark.parametrize("set_bytes", [1, 1000, MIB, 50 * MIB, 60 * MIB, 179 * MIB, 180 * MIB, 1000 * MIB])
def test_rotation_exceeds_three_times_the_cache_with_no_set_to_spare(set_bytes):
    cache = 60 * MIB
    sets = timing.sets_needed(set_bytes, cache)
    assert sets * set_bytes > 3 * cache and sets >= 2
    assert sets == 2 or (sets - 1) * set_bytes <= 3 * cache


@pytest.mark.parametrize("geometry", MODELS)
def test_every_model_exceeds_a_large_cache_with_few_sets(geometry):
    for case in cases(list(OPS), [geometry], torch.bfloat16):
        size = nbytes(case.draw(_MetaDraw()))
        assert timing.sets_needed(size, 126 * MIB) * size > 3 * 126 * MIB, case
        assert timing.sets_needed(size, 126 * MIB) <= timing.MAX_SETS, case


class _MetaDraw(Draw):
    """Draws tensors without data."""

    def __init__(self) -> None:
        self.dtype, self.device = torch.bfloat16, torch.device("meta")

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype or self.dtype, device="meta")


def test_calls_go_round_all_sets_and_the_result_is_of_a_poisoned_run():
    seen, places = [], [torch.zeros(2) for _ in range(3)]

    def call(i):
        seen.append(i)
        return places[i][:1].fill_(i + 1), places[i]  # the second element is never written

    timed = timing.measure(call, 3, 4, torch.device("cpu"), poison)
    assert seen == [0, 1, 2] * 5 + [0, 0]
    assert len(timed.seconds) == 4 and min(timed.seconds) <= timed.median <= max(timed.seconds)
    assert timed.result[0].item() == 1 and unwritten(timed.result)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(3),
        torch.ones(2, 5).bfloat16(),
        *(quantize(torch.ones(2, 5), d) for d in (torch.int8, torch.float8_e4m3fn, torch.int4)),
    ],
)
def test_poison_is_found_in_every_dtype(value):
    assert not unwritten(value)
    poison(value)
    assert unwritten([None, value])


def test_the_floor_is_the_larger_of_bytes_and_flops():
    ceilings = timing.Ceilings(copy=100.0, matmul=1000.0, clocks=None)
    assert ceilings.floor(moved=200, flops=1000) == 2 and ceilings.floor(moved=200, flops=5000) == 5
