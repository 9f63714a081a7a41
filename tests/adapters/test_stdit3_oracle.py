"""STDiT3 under PAB is what a written-out replay says: the published behaviour in float64, and any rules to the bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from tests.adapters.tiny_stdit3 import HEADS, conditions, given_frames, noise, run_model, text, tiny_stdit3
from tests.models.plain_stdit3 import Sublayer, plain
from tests.oracle import Rule
from tests.pairs import pairs
from tests.record_and_replay import RecordAndReplay

SIZES = {
    "480p 2 s": ((480, 854, 51), (21, 17, 16), 24),
    "480p 4 s": ((480, 854, 102), (22, 18, 17), 28),
    "480p 8 s": ((480, 854, 204), (22, 18, 17), 28),
    "720p 2 s": ((720, 1280, 51), (22, 18, 17), 28),
    "720p 4 s": ((720, 1280, 102), (23, 19, 18), 28),
}
"""Height, width and frames; steps that compute spatial, temporal and cross attention, and MLPs of blocks 0 to 4."""
DEPTH = 6


def published_timesteps(size: str) -> list[float]:
    height, width, frames = SIZES[size][0]
    r = math.sqrt(height * width / 512**2) * math.sqrt(frames // 17 * 5)
    return [1000 * r * t / (1 + (r - 1) * t) for t in (1 - i / 30 for i in range(30))]


class Published:
    """PAB of VideoSys on one sample: it keeps gated outputs, and decides from timesteps in bfloat16."""

    RANGES: Mapping[str, int] = {"spatial": 2, "temporal": 4, "cross": 6}

    def __init__(self, timesteps: list[float]) -> None:
        self.timesteps = [int(t) for t in torch.tensor(timesteps).bfloat16().tolist()]
        self.mlps = {i + n for i, t in enumerate(self.timesteps) if t in (676, 788, 864) for n in (1, 2)}
        self.written: dict[str, Tensor] = {}
        self.computed: Counter[str] = Counter()

    def at(self, step: int) -> Sublayer:
        def sublayer(name: str, kind: str, layer: int, compute: Callable[[], Tensor]) -> Tensor:
            if kind == "mlp":
                reuses = step in self.mlps and layer < 5
            else:
                reuses = step % self.RANGES[kind] != 0 and 450 < self.timesteps[step] < 930
            if not reuses:
                self.computed[name] += 1
                self.written[name] = compute()
            return self.written[name]

        return sublayer


def test_the_published_preset_is_the_published_behaviour() -> None:
    timesteps, doubles = published_timesteps("480p 2 s"), torch.float64
    model = tiny_stdit3(doubles, depth=DEPTH)
    weights, samples = model.state_dict(), [Published(timesteps) for _ in range(2)]

    def replay(name: str, step: int, *args: Any, **kwargs: Any) -> Tensor:
        return plain(weights, HEADS, *args, **kwargs, sublayer=lambda sample: samples[sample].at(step))

    fixed, texts = conditions(dtype=doubles), {"": text(dtype=doubles)}
    x = noise(size=(3, 4), dtype=doubles)
    expected = run_model(replay, timesteps, x, texts, **fixed)
    without = run_model(lambda name, step, *a, **k: plain(weights, HEADS, *a, **k), timesteps, x, texts, **fixed)
    pab.enable(model, PABConfig.preset("open-sora-1.2"), timesteps=timesteps)
    got = run_model(lambda name, step, *a, **k: model(*a, **k), timesteps, x, texts, **fixed)
    assert (got - expected).norm() < 1e-5 * (expected - without).norm()
    assert pab.summary(model).forced == 0
    counts = samples[0].computed
    assert [counts[f"spatial_blocks.{i}.mlp"] for i in (0, 4, 5)] == [24, 24, 30]


@pytest.mark.parametrize("size", SIZES)
def test_the_published_numbers_of_modules_run_at_the_five_sizes(size: str) -> None:
    (_, _, _), (spatial, temporal, cross), mlp = SIZES[size]
    model, ran = tiny_stdit3(depth=DEPTH), Counter[str]()
    for group in ("spatial_blocks", "temporal_blocks"):
        for i in range(DEPTH):
            for part in ("attn.qkv", "cross_attn.q_linear", "mlp.fc1"):
                name = f"{group}.{i}.{part}"
                model.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.update([name]))
    timesteps = published_timesteps(size)
    pab.enable(model, PABConfig.preset("open-sora-1.2"), timesteps=timesteps)
    call = lambda name, step, *a, **k: model(*a, **k)  # noqa: E731
    run_model(call, timesteps, noise(size=(2, 4)), {"": text()}, **conditions())
    for i in range(DEPTH):
        assert ran[f"spatial_blocks.{i}.attn.qkv"] == spatial and ran[f"temporal_blocks.{i}.attn.qkv"] == temporal
        for group in ("spatial_blocks", "temporal_blocks"):
            assert ran[f"{group}.{i}.cross_attn.q_linear"] == cross
            assert ran[f"{group}.{i}.mlp.fc1"] == (mlp if i < 5 else 30)
    assert pab.summary(model).forced == 0


TIMESTEPS = list(range(950, -1, -100))  # 10 steps
TEXTS = {"cond": text(1), "uncond": text(2)}
WIDE = (0.1, 0.95)
CASES: dict[str, dict[str, Rule]] = {
    "spatial": {"spatial": Rule(2, WIDE)},
    "temporal": {"temporal": Rule(3, WIDE)},
    "cross": {"cross": Rule(4, WIDE)},
    "mlp": {"mlp": Rule(3, WIDE)},
    "block": {"block": Rule(2, WIDE)},
    "everything": {"spatial": Rule(2), "temporal": Rule(4), "cross": Rule(6, WIDE), "mlp": Rule(3)},
    "blocks and what is in them": {"block": Rule(2, WIDE), "spatial": Rule(4, WIDE), "mlp": Rule(4, WIDE)},
    "some blocks": {"block": Rule(2, WIDE, layers=(1,)), "spatial": Rule(3, WIDE, layers=(0,))},
    "windows in timesteps": {"temporal": Rule(2, (100, 800), "timestep"), "cross": Rule(5, (70, 951), "timestep")},
}
SHAPES: dict[str, dict[str, Any]] = {
    "odd sizes": {},
    "one frame": {"frames": 1},
    "one clip of 65 frames": {"batch": 1, "frames": 65, "size": (2, 3)},
    "given frames": {"x_mask": given_frames()},
}


def config_of(rules: Mapping[str, Rule], **options: Any) -> PABConfig:
    return PABConfig(
        rules=tuple((kind, Broadcast(r.range, r.window, r.unit, r.reuse, r.layers)) for kind, r in rules.items()),
        **options,
    )


def arguments(shape: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    given = dict(SHAPES[shape])
    sizes: dict[str, Any] = {name: given.pop(name) for name in ("frames", "size", "batch") if name in given}
    batch = sizes.get("batch", 2)
    texts = {name: y[:batch].to(dtype) for name, y in TEXTS.items()}
    return noise(**sizes, dtype=dtype), texts, conditions(batch=batch, dtype=dtype) | given


def under_pab(
    model: Any, x: Tensor, texts: dict[str, Tensor], timesteps: list[int] = TIMESTEPS, **fixed: Any
) -> Tensor:
    def call(name: str, step: int, *args: Any, **kwargs: Any) -> Tensor:
        with pab.context(model, name):
            out: Tensor = model(*args, **kwargs)
            return out

    return run_model(call, timesteps, x, texts, **fixed)


def replayed(rules: Mapping[str, Rule], x: Tensor, texts: dict[str, Tensor], **fixed: Any) -> Tensor:
    model = tiny_stdit3(x.dtype)
    replay = RecordAndReplay(model, pab.sublayers(model), rules, lambda: TIMESTEPS)

    def call(name: str, step: int, *args: Any, **kwargs: Any) -> Tensor:
        replay.at(step, name)
        return model(*args, **kwargs)

    with replay.running():
        return run_model(call, TIMESTEPS, x, texts, **fixed)


@pytest.mark.parametrize(
    ("case", "shape", "dtype"), pairs(list(CASES), list(SHAPES), [torch.float32, torch.bfloat16, torch.float64])
)
def test_two_contexts_are_bit_identical_to_the_oracle(case: str, shape: str, dtype: torch.dtype) -> None:
    x, texts, fixed = arguments(shape, dtype)
    model = tiny_stdit3(dtype)
    plain_result = under_pab_of_nothing(model, x, texts, **fixed)
    pab.enable(model, config_of(CASES[case]))
    for _ in range(2):  # and nothing is left over from one generation to the next
        with pab.generation(model, timesteps=TIMESTEPS):
            got = under_pab(model, x, texts, **fixed)
        assert torch.equal(got, replayed(CASES[case], x, texts, **fixed))
        assert pab.summary(model).forced == 0 and pab.summary(model).cache_bytes == 0
    assert not torch.equal(got, plain_result)


def under_pab_of_nothing(model: Any, x: Tensor, texts: dict[str, Tensor], **fixed: Any) -> Tensor:
    return run_model(lambda name, step, *args, **kwargs: model(*args, **kwargs), TIMESTEPS, x, texts, **fixed)


@pytest.mark.parametrize("case", ["everything", "blocks and what is in them", "some blocks"])
def test_slots_before_the_projection_change_rounding_alone(case: str) -> None:
    x, texts, fixed = arguments("odd sizes", torch.float64)
    found = []
    for cache_point in ("pre_gate", "unprojected"):
        model = tiny_stdit3(torch.float64)
        pab.enable(model, config_of(CASES[case], cache_point=cache_point), timesteps=TIMESTEPS)
        found.append(under_pab(model, x, texts, **fixed))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("reuse", "cache_dtype"), pairs(["hold", "linear"], ["int8", "float8_e4m3fn"]))
@pytest.mark.parametrize("cache_point", ["pre_gate", "post_gate", "unprojected"])
def test_8_bit_slots_change_little(cache_point: Any, reuse: str, cache_dtype: Any) -> None:
    rules = {kind: Broadcast(reach, reuse=reuse) for kind, reach in (("spatial", 2), ("temporal", 3), ("cross", 4))}
    x, texts, fixed = arguments("odd sizes")
    found, peaks = [], []
    for kept in (None, cache_dtype):
        model = tiny_stdit3()
        config = PABConfig(**rules, mlp=2, cache_dtype=kept, cache_point=cache_point)  # type: ignore[arg-type]
        pab.enable(model, config, timesteps=TIMESTEPS)
        found.append(under_pab(model, x, texts, **fixed))
        peaks.append(max(t.peak_cache_bytes for t in pab.summary(model).contexts["cond"].values()))
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < 0.05 and peaks[1] < 0.4 * peaks[0]


def test_an_error_in_the_middle_leaves_nothing_for_the_next_run() -> None:
    model, (x, texts, fixed) = tiny_stdit3(), arguments("odd sizes")
    pab.enable(model, config_of(CASES["everything"]))
    with pab.generation(model, timesteps=TIMESTEPS):
        under_pab(model, x, texts, TIMESTEPS[:5], **fixed)
        assert pab.summary(model).cache_bytes > 0
        with pytest.raises(ValueError, match="STDiT3 needs fps="):
            model(x, torch.tensor([500.0, 500.0]), TEXTS["cond"])
        assert pab.summary(model).cache_bytes == 0
    with pab.generation(model, timesteps=TIMESTEPS):
        got = under_pab(model, x, texts, **fixed)
    assert torch.equal(got, replayed(CASES["everything"], x, texts, **fixed))


def test_frames_that_become_free_are_no_new_prompt() -> None:
    """Each step has a mask of its own, as where a clip is edited."""
    model = tiny_stdit3()
    pab.enable(model, PABConfig(spatial=Broadcast(2, (0, 1)), cross=Broadcast(3, (0, 1))), num_steps=6)
    y, fixed = text(), conditions()
    for step in range(6):
        mask = given_frames(free=2 - step // 2)
        model(noise(step), torch.tensor([900.0, 900.0]), y, **fixed, x_mask=mask)
    assert pab.summary(model).forced == 0 and pab.summary(model).contexts["#0"]["spatial"].reused > 0
