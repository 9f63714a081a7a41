"""Bytes and messages of a rank: against counting every element that changes its rank, and the published volumes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from pab_kernels.models.open_sora import schedule as open_sora
from pab_kernels.ops.quantized import GROUP as GROUP_OF_SLOTS
from pab_kernels.rules.config import Broadcast, PABConfig
from pab_kernels.rules.plan import Action, Plan, Sublayer
from pab_kernels.rules.schedule import Schedule
from pab_kernels.rules.traffic import GROUP, OUTPUT, Layout, Sent, Shapes, Traffic, part, traffic

TWO_SECONDS, FOUR_SECONDS, EIGHT_SECONDS, LARGE = (51, 480, 854), (102, 480, 854), (204, 480, 854), (51, 720, 1280)
DEPTH, CHANNELS, STEPS = 28, 1152, 30


def layers(depth: int, *kinds: str) -> tuple[Sublayer, ...]:
    return tuple(Sublayer(f"{kind}.{i}", kind, i) for i in range(depth) for kind in kinds)


def open_sora_shapes(size: tuple[int, int, int]) -> Shapes:
    """STDiT3 in bfloat16 with both branches; it returns eight channels in float32."""
    frames, height, width = open_sora.latent_size(*size)
    places = part(height, 2) * part(width, 2)
    return Shapes(2, frames, places, CHANNELS, 2, 8 * height * width * 4)


def published_plan(size: tuple[int, int, int]) -> Plan:
    """Ranges 2/4/6 in the published window, at Open-Sora's own timesteps."""
    timesteps = [1000 * sigma for sigma in open_sora.sigmas(STEPS, open_sora.shift(*size))]
    config = PABConfig.preset("open-sora-1.2")
    return Plan(config, Schedule.of(timesteps=timesteps), layers(DEPTH, "spatial", "cross", "temporal", "mlp"))


def open_sora_traffic(size: tuple[int, int, int], layout: Layout) -> Traffic:
    return traffic(layout, "frames", open_sora_shapes(size), published_plan(size))


# The formula, against counting


def moved(before: Any, after: Any, elements: Any, rank: int) -> int:
    """Elements that `rank` owns before a switch and another rank owns after it."""
    return sum(before(e) == rank != after(e) for e in elements)


def alone(kind: str, **config: Any) -> Plan:
    return Plan(PABConfig(**config), Schedule.of(1), (Sublayer("it", kind, 0),))


@pytest.mark.parametrize(("ranks", "frames", "places"), [(2, 4, 6), (3, 5, 7), (4, 1, 9), (8, 3, 5)])
def test_frames_switch_to_places_and_back(ranks: int, frames: int, places: int) -> None:
    t, s, channels = part(frames, ranks), part(places, ranks), 3
    elements = list(itertools.product(range(2), range(t * ranks), range(s * ranks), range(channels)))
    in_frames, in_places = (lambda e: e[1] // t), (lambda e: e[2] // s)
    found = traffic(Layout(1, ranks), "frames", Shapes(2, frames, places, channels, 2, 0), alone("temporal"))
    for rank in range(ranks):
        there = moved(in_frames, in_places, elements, rank)
        back = moved(in_places, in_frames, elements, rank)
        assert found.by_kind["temporal"] == Sent(2 * (there + back), 2)


@pytest.mark.parametrize(("ranks", "tokens", "text"), [(2, 6, 3), (3, 7, 4), (6, 5, 1)])
def test_tokens_switch_to_heads_and_back(ranks: int, tokens: int, text: int) -> None:
    n, heads, head_dim = part(tokens, ranks), 6, 2
    channels = heads * head_dim
    elements = list(itertools.product(range(n * ranks), range(channels)))
    words = list(itertools.product(range(part(text, ranks) * ranks), range(channels)))
    in_heads = lambda e: e[1] // (channels // ranks)  # noqa: E731
    shapes = Shapes(1, 1, tokens, channels, 4, 0, heads, text)
    found = traffic(Layout(1, ranks), "tokens", shapes, alone("spatial")).by_kind["spatial"]
    for rank in range(ranks):
        expected = 0
        for of, each in ((elements, n), (words, part(text, ranks))):
            in_tokens = lambda e, each=each: e[0] // each  # noqa: E731
            expected += 3 * moved(in_tokens, in_heads, of, rank) + moved(in_heads, in_tokens, of, rank)
        assert found == Sent(4 * expected, 2)


def test_the_output_goes_to_the_rest_of_the_sequence_and_then_to_the_other_branch() -> None:
    shapes, plan = Shapes(2, 5, 4, 8, 2, output_width=10), alone("temporal")
    assert traffic(Layout(1, 4), "frames", shapes, plan).by_kind[OUTPUT] == Sent(3 * 2 * 2 * 10, 1)
    assert traffic(Layout(2, 1), "frames", shapes, plan).by_kind[OUTPUT] == Sent(1 * 5 * 10, 1)
    assert traffic(Layout(2, 4), "frames", shapes, plan).by_kind[OUTPUT] == Sent((3 * 2 + 5) * 10, 2)
    tokens = Shapes(2, 1, 7, 8, 2, output_width=3, heads=2)
    assert traffic(Layout(1, 2), "tokens", tokens, alone("spatial")).by_kind[OUTPUT] == Sent(2 * 4 * 3, 1)


def test_one_rank_sends_nothing() -> None:
    found = open_sora_traffic(TWO_SECONDS, Layout())
    assert found.total == found.without_pab == Sent() and found.share == 1


def test_eight_bits_are_a_byte_a_channel_and_a_scale_for_each_group() -> None:
    shapes, plan = Shapes(1, 2, 2, 130, 2, 0), alone("temporal")
    assert traffic(Layout(1, 2), "frames", shapes, plan).by_kind["temporal"].bytes == 2 * 2 * 130
    returned = traffic(Layout(1, 2, None, "int8"), "frames", shapes, plan).by_kind["temporal"].bytes
    assert returned == 2 * 130 + (130 + 2 * 4)
    both = traffic(Layout(1, 2, "float8_e4m3fn", "int8"), "frames", shapes, plan).by_kind["temporal"].bytes
    assert both == (130 + 2 * 2) + (130 + 2 * 4)
    assert GROUP == GROUP_OF_SLOTS
    heads = Shapes(1, 1, 2, 256, 2, 0, heads=4)  # 64 channels for each of four ranks
    assert traffic(Layout(1, 4, "int8", "int8"), "tokens", heads, alone("spatial")).by_kind["spatial"].bytes == (
        3 * (3 * (64 + 2) + 64 + 4)
    )


# With a plan


def test_reused_and_skipped_sublayers_send_nothing() -> None:
    every = Broadcast(2, (0, 1))
    shapes, layout = Shapes(2, 4, 4, 8, 2, output_width=4), Layout(2, 2)
    full = Plan(PABConfig(), Schedule.of(4), layers(3, "temporal"))
    one = traffic(layout, "frames", shapes, full)
    assert one.share == 1 and len(set(one.by_step)) == 1
    some = dataclasses.replace(full, config=PABConfig(rules=(("temporal", Broadcast(2, (0, 1), layers=(0, 1))),)))
    steps = traffic(layout, "frames", shapes, some).sent["temporal"]
    assert [s.messages for s in steps] == [6, 2, 6, 2]
    inside = tuple(dataclasses.replace(s, block=f"block.{s.layer}") for s in full.sublayers)
    blocks = Plan(PABConfig(block=every), Schedule.of(4), (*inside, *layers(3, "block")))
    assert [s.messages for s in traffic(layout, "frames", shapes, blocks).sent["temporal"]] == [6, 0, 6, 0]
    whole = traffic(layout, "frames", shapes, dataclasses.replace(full, config=PABConfig(model=every)))
    assert [s.messages for s in whole.by_step] == [8, 0, 8, 0]
    assert whole.without_pab == one.total and whole.share == 0.5


def test_calls_of_a_step_and_sums() -> None:
    plan = Plan(PABConfig(spatial=Broadcast(2, (0, 1))), Schedule.of(4), layers(2, "spatial", "cross"))
    shapes = Shapes(1, 1, 12, 8, 2, 4, heads=4)
    once, twice = (traffic(Layout(1, 4), "tokens", dataclasses.replace(shapes, calls=n), plan) for n in (1, 2))
    assert twice.total == once.total + once.total and twice.without_pab == once.without_pab * 2
    assert once.total == once.by_kind["spatial"] + once.by_kind[OUTPUT] == sum(once.by_step, Sent())
    data = once.to_dict()
    assert data["bytes"] == once.total.bytes == sum(data["bytes_by_step"])
    assert data["kinds"]["spatial"] == {
        "bytes": once.by_kind["spatial"].bytes,
        "messages": 2 * 2 * 2,
        "bytes_without": 2 * once.by_kind["spatial"].bytes,
        "messages_without": 2 * 4 * 2,
    }


# Open-Sora 1.2 on eight ranks

PUBLISHED = {TWO_SECONDS: 20.19, FOUR_SECONDS: 40.39, EIGHT_SECONDS: 80.78, LARGE: 45.72}
"""GB a rank sends without PAB, on eight sequence ranks in bfloat16, without padding."""
COMPUTED = {TWO_SECONDS: 17, FOUR_SECONDS: 18, EIGHT_SECONDS: 18, LARGE: 18}
"""Steps of 30 at which temporal attention is computed."""


@pytest.mark.parametrize("size", PUBLISHED)
def test_without_pab_it_is_the_published_volume(size: tuple[int, int, int]) -> None:
    found, shapes = open_sora_traffic(size, Layout(1, 8)).full["temporal"], open_sora_shapes(size)
    elements = 2 * 8 * part(shapes.frames, 8) * 8 * part(shapes.tokens, 8) * CHANNELS
    assert found == Sent(DEPTH * STEPS * 2 * (elements // 8 * 7 // 8) * 2, DEPTH * STEPS * 2)
    padded = 64 * part(shapes.frames, 8) * part(shapes.tokens, 8)
    assert found.bytes * shapes.frames * shapes.tokens / padded / 1e9 == pytest.approx(PUBLISHED[size], abs=0.01)
    if size == TWO_SECONDS:  # the paper counts a rank's own part too
        own_part_too = found.bytes * 8 / 7 * shapes.frames * shapes.tokens / padded / 1e9
        assert own_part_too == pytest.approx(23.08, abs=0.01)


@pytest.mark.parametrize(
    ("size", "computed"), [(TWO_SECONDS, 17), (FOUR_SECONDS, 18), (EIGHT_SECONDS, 18), (LARGE, 18)]
)
def test_with_pab_only_the_computed_temporal_steps_send(size: tuple[int, int, int], computed: int) -> None:
    plan, found = published_plan(size), open_sora_traffic(size, Layout(1, 8))
    assert plan.step_counts()["temporal"].computed == computed
    assert found.by_kind["temporal"].bytes * STEPS == found.full["temporal"].bytes * computed
    for decision, sent in zip(plan.rows["temporal.0"], found.sent["temporal"], strict=True):
        assert (sent == Sent()) is (decision.action is Action.REUSE)


LAYOUTS = {
    "sp 8": (Layout(1, 8), 1.0),
    "cfg 2 x sp 4": (Layout(2, 4), 3 / 4 / (7 / 8)),
    "8-bit return": (Layout(2, 4, None, "int8"), 3 / 4 / (7 / 8) * (1 + 1188 / 2304) / 2),
    "8-bit input too": (Layout(2, 4, "int8", "int8"), 3 / 4 / (7 / 8) * (1170 + 1188) / 2 / 2304),
}
"""With their factors, where the frames are padded alike."""


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("size", "steps"), COMPUTED.items())
def test_share_of_plain_sequence_parallelism(size: tuple[int, int, int], steps: int, name: str) -> None:
    layout, factor = LAYOUTS[name]
    plain = open_sora_traffic(size, Layout(1, 8)).full["temporal"].bytes
    shapes = open_sora_shapes(size)
    padded = layout.sequence * part(shapes.frames, layout.sequence) / (8 * part(shapes.frames, 8))
    found = open_sora_traffic(size, layout).by_kind["temporal"].bytes
    assert found / plain == pytest.approx(factor * padded * steps / STEPS, rel=1e-9)


def test_the_aims_for_a_480p_clip_of_two_seconds() -> None:
    plain = open_sora_traffic(TWO_SECONDS, Layout(1, 8)).full["temporal"].bytes
    most = {"sp 8": 0.567, "cfg 2 x sp 4": 0.486, "8-bit return": 0.37, "8-bit input too": 0.25}
    for name, limit in most.items():
        found = open_sora_traffic(TWO_SECONDS, LAYOUTS[name][0])
        assert found.by_kind["temporal"].bytes / plain <= limit, name
        assert found.by_kind[OUTPUT].bytes < 0.01 * plain
    assert open_sora_traffic(TWO_SECONDS, Layout(2, 1)).by_kind["temporal"] == Sent()


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(3, 1), "cfg must be 1 or 2, as guidance has two branches; got 3"),
        (lambda: Layout(1, 0), "sequence must be a whole number of ranks from 1, got 0"),
        (lambda: Layout(True, 1), "cfg must be a whole number of ranks from 1, got True"),
        (lambda: Layout(1, 2, "int4"), "input_dtype must be None (the model's dtype) or 'float8_e4m3fn', 'int8'; got"),  # type: ignore[arg-type]
        (lambda: Layout.of(5, cfg=2), "5 ranks do not divide into 2 branches of guidance; use an even number"),
        (lambda: Layout.of(0), "ranks must be a whole number from 1, got 0"),
    ],
)
def test_layouts_that_are_none_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("layout", "method", "batch", "kind", "message"),
    [
        (Layout(1, 8), "tokens", 2, "spatial", "12 heads do not divide among 8 sequence ranks (all ranks / cfg); "),
        (Layout(2, 2), "tokens", 1, "spatial", "cfg=2 splits the branches of guidance that share a call, but this "),
        (Layout(1, 2), "frames", 2, "spatial", "method 'frames' needs temporal attention, and this model has none; "),
        (Layout(1, 2), "rings", 2, "spatial", "method must be one of 'frames', 'tokens'; got 'rings'"),
    ],
)
def test_models_that_the_ranks_do_not_fit_are_refused(
    layout: Layout, method: Any, batch: int, kind: str, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        traffic(layout, method, Shapes(batch, 1, 12, 24, 2, 0, heads=12), alone(kind))
    assert str(caught.value).startswith(message)
