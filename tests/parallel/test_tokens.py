"""Models with attention over all tokens on two ranks: results, messages and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from pab_kernels.parallel.tokens import Segments
from pab_kernels.rules.traffic import OUTPUT, Layout, Sent, Shapes, attention
from tests.parallel.processes import run_on
from tests.parallel.token_models import HEADS, JOINT, STREAM, TEXT
from tests.parallel.token_runs import RUNS, STEPS, Run, compiled, others, runs

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

RANKS = 2


@pytest.fixture(scope="module")
def of_all_ranks() -> list[dict[tuple[str, str], Run]]:
    return run_on(RANKS, runs)


@pytest.fixture(scope="module")
def other() -> dict[str, Any]:
    first, second = run_on(RANKS, others)
    assert first == second
    return first


@pytest.mark.parametrize(("name", "rule"), RUNS)
def test_outputs_are_those_of_one_process(of_all_ranks: list[dict[tuple[str, str], Run]], name: str, rule: str) -> None:
    # Allegro's cross attention rounds by the number of its queries.
    most = 1e-12 if name.startswith("Allegro") else 0.0
    for found in of_all_ranks:
        assert found[name, rule].difference <= most and found[name, rule].again <= most


@pytest.mark.parametrize(("name", "rule"), RUNS)
def test_attention_sends_what_is_forecast_and_nothing_where_it_is_reused(
    of_all_ranks: list[dict[tuple[str, str], Run]], name: str, rule: str
) -> None:
    for found in of_all_ranks:
        run = found[name, rule]
        text = TEXT if name.split(",")[0] in JOINT else 0
        shapes = Shapes(run.batch, 1, STREAM, run.channels, 8, 0, HEADS, text)
        each = attention(Layout(1, RANKS), "tokens", shapes) * run.attentions
        assert run.traffic.sent["spatial"] == tuple(
            each if i % 2 == 0 or rule == "plain" else Sent() for i in range(STEPS)
        )
        assert run.traffic.full["spatial"] == each * STEPS
        assert [sent.messages for sent in run.traffic.sent[OUTPUT]] == [1] * STEPS


@pytest.fixture(scope="module")
def graphs_of_one_rank() -> dict[str, int]:
    with torch.no_grad():
        found = compiled(parallel=False)
    assert found["difference"] == 0 and min(found["graphs"].values()) > 0
    return found["graphs"]


def test_compiled_blocks_have_as_many_graphs_as_on_one_rank(
    other: dict[str, Any], graphs_of_one_rank: dict[str, int]
) -> None:
    assert other["compiled"] == {"graphs": graphs_of_one_rank, "difference": 0}


def test_eight_ranks_have_as_many_graphs_as_one(graphs_of_one_rank: dict[str, int]) -> None:
    """Simulated ones, which receive anything."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    try:
        with torch.no_grad():
            graphs = compiled()["graphs"]
    finally:
        dist.destroy_process_group()
    assert graphs == graphs_of_one_rank


def test_unparallelize_leaves_no_trace(other: dict[str, Any]) -> None:
    assert other["undone"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("heads", ("got 2 ranks", "3 heads in blocks.0.attn1", "here 1, 3", "choose")),
        ("class", ("TransformerEncoder", "FluxTransformer2DModel", "STDiT3", "inherit")),
        ("tokens", ("HunyuanVideoTransformer3DModel", "token_replace", "supported")),
        ("diffusers", ("FluxTransformer2DModel", "enable_parallelism", "supported")),
    ],
)
def test_models_that_cannot_be_split_are_refused(other: dict[str, Any], what: str, words: tuple[str, ...]) -> None:
    error = other["refusals"][what]
    assert error.startswith("ValueError") and all(word in error for word in words), error


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("attention", ("RuntimeError", "blocks.0.attn1", "0 times", "set_attention_backend")),
        ("mask", ("ValueError", "transformer_blocks.0.attn1", "45 tokens", "without a mask")),
    ],
)
def test_attention_that_cannot_be_split_is_an_error(other: dict[str, Any], what: str, words: tuple[str, ...]) -> None:
    error = other["failures"][what]
    assert all(word in error for word in words), error


def test_heads_may_share_keys_and_have_masks_of_their_own(other: dict[str, Any]) -> None:
    difference, messages = other["grouped"]
    assert difference < 1e-12 and messages == 2 * 4


def test_inputs_in_eight_bits_are_a_quarter_of_float32(other: dict[str, Any]) -> None:
    difference, fewer, whole = other["in_eight_bits"]
    assert 0 < difference < 0.05
    channels = 32
    of_rank = RANKS * 2 * (channels // RANKS) * (-(-STREAM // RANKS) + -(-TEXT // RANKS)) // RANKS
    scales = 2 * of_rank // (channels // RANKS)
    layers = 3
    assert whole.by_kind["spatial"] == Sent(layers * of_rank * 16, 2 * layers)
    assert fewer.by_kind["spatial"] == Sent(layers * (3 * (of_rank + scales) + 4 * of_rank), 2 * layers)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("lengths", [(1,), (7,), (8, 16), (3, 10), (33, 1, 5)])
def test_padding_lies_behind_the_last_tokens_and_never_among_all(lengths: tuple[int, ...], ranks: int) -> None:
    segments = Segments(lengths, ranks)
    whole = torch.arange(1.0, sum(lengths) + 1)[None, :, None].expand(2, -1, 3)
    parts = segments.divided(whole)
    assert parts.shape == (ranks, 2, sum(segments.local), 3) and segments.local == tuple(
        -(-length // ranks) for length in lengths
    )
    assert torch.equal(segments.joined(parts), whole)
    starts = [sum(segments.local[:i]) for i in range(len(lengths))]
    for start, local, length in zip(starts, segments.local, lengths, strict=True):
        in_order = parts[:, 0, start : start + local, 0].flatten()
        assert bool((in_order[:length] > 0).all()) and not in_order[length:].any()


def test_a_budget_holds_for_a_ranks_tokens(other: dict[str, Any]) -> None:
    for peak, bound, budget in other["budgets"].values():
        assert 0.8 * bound < peak <= bound <= budget  # the bound has a token more
