"""Latte under PAB is what the oracle says, for every kind, cache point, context and cache dtype."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.rules.config import CacheDevice
from pab_kernels.rules.schedule import Schedule
from tests.adapters.tiny_latte import noise, prompt, run_model, tiny_latte
from tests.broadcast.bus_recorder import recorded
from tests.oracle import Oracle, Rule
from tests.pairs import pairs
from tests.rules.random_weights import with_random_weights

TIMESTEPS = list(range(950, -1, -100))  # 10 steps
TEXTS = {"cond": prompt(1), "uncond": prompt(2)}


def broadcast(rule: Rule) -> Broadcast:
    return Broadcast(rule.range, rule.window, rule.unit, rule.reuse, rule.layers)


def config_of(rules: dict[str, Rule | list[Rule]], **kwargs: Any) -> PABConfig:
    pairs = [
        (kind, broadcast(rule))
        for kind, listed in rules.items()
        for rule in ([listed] if isinstance(listed, Rule) else listed)
    ]
    return PABConfig(rules=tuple(pairs), **kwargs)


def both(
    rules: dict[str, Any],
    *,
    batch: int = 1,
    texts: dict[str, torch.Tensor] = TEXTS,
    dtype: str | None = None,
    post_gate: bool = False,
    fitted: bool = False,
    cache_device: CacheDevice | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """The adapter's result, the oracle's, and the summary."""
    model = tiny_latte()
    where = {"cache_point": "post_gate" if post_gate else "pre_gate", "cache_device": cache_device}
    config = config_of(rules, cache_dtype=dtype, **where)
    weights: dict[tuple[str, int, int, int], float] = {}
    if fitted:
        config = with_random_weights(config, pab.sublayers(model), Schedule.of(timesteps=TIMESTEPS))
        assert config.fitted is not None
        of_all = [(row, name) for row in config.fitted.rows for name in row.weights]
        weights = {(name, *read): w for row, name in of_all for read, w in row.of(name)}
    x = noise(batch=batch)
    texts = {name: text.expand(batch, -1, -1) if len(text) == 1 else text for name, text in texts.items()}
    kept = None if dtype is None else getattr(torch, dtype)
    oracle = Oracle(model, rules, TIMESTEPS, post_gate=post_gate, dtype=kept, weights=weights)
    expected = run_model(oracle, TIMESTEPS, x, texts)

    pab.enable(model, config)

    def call(name: str, step: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        with pab.context(model, name):
            return model(*args, **kwargs, return_dict=False)[0]

    with pab.generation(model, timesteps=TIMESTEPS):
        got = run_model(call, TIMESTEPS, x, texts)
        summary = pab.summary(model)
    computed = {name: len(calls) for name, calls in oracle.computed.items()}
    for kind, group, part in (
        ("spatial", "transformer_blocks", ".attn1"),
        ("temporal", "temporal_transformer_blocks", ".attn1"),
        ("cross", "transformer_blocks", ".attn2"),
        ("mlp", "", ".ff"),
    ):
        in_oracle = sum(n for name, n in computed.items() if name.startswith(group) and name.endswith(part))
        assert sum(kinds[kind].computed for kinds in summary.contexts.values()) == in_oracle, kind
    return got, expected, summary


WIDE = (0.1, 0.95)
CASES: dict[str, dict[str, Any]] = {
    "spatial": {"spatial": Rule(2, WIDE)},
    "temporal": {"temporal": Rule(3, WIDE)},
    "cross": {"cross": Rule(4, WIDE)},
    "mlp": {"mlp": Rule(3, WIDE)},
    "block": {"block": Rule(2, WIDE)},
    "pyramid": {"spatial": Rule(2), "temporal": Rule(3), "cross": Rule(4)},
    "everything": {"spatial": Rule(2), "temporal": Rule(4), "cross": Rule(6, WIDE), "mlp": Rule(3)},
    "all but spatial": {"temporal": Rule(4, WIDE), "cross": Rule(5, WIDE), "mlp": Rule(6, WIDE)},
    "sublayers of blocks that are reused": {
        "block": Rule(3, WIDE),
        "spatial": Rule(2, WIDE),
        "cross": Rule(5, WIDE),
        "mlp": Rule(4),
    },
    "some blocks": {
        "block": Rule(2, WIDE, layers=(1,)),
        "spatial": Rule(3, WIDE, layers=(0,)),
        "mlp": Rule(2, layers=(1,)),
    },
    "one layer apart from the others": {
        "spatial": [Rule(2, WIDE), Rule(5, WIDE, layers=(1,))],
        "cross": Rule(3, WIDE, layers=(0,)),
    },
    "windows in steps": {"spatial": Rule(3, (1, 9), "step"), "cross": Rule(2, (4, 7), "step")},
    "windows in timesteps": {"temporal": Rule(2, (100, 800), "timestep"), "cross": Rule(5, (70, 951), "timestep")},
    "from the first step to the last": {
        "spatial": Rule(2, (0, 1)),
        "cross": Rule(100, (0, 1)),
        "mlp": Rule(100, (0, 1)),
    },
}


def reusing(reuse: str, rules: dict[str, Any]) -> dict[str, list[Rule]]:
    """The same rules with this way of reuse."""
    return {
        kind: [replace(rule, reuse=reuse) for rule in ([of] if isinstance(of, Rule) else of)]
        for kind, of in rules.items()
    }


@pytest.mark.parametrize(("case", "post_gate", "reuse"), pairs(list(CASES), [False, True], ["hold", "linear"]))
def test_two_contexts_are_bit_identical_to_the_oracle(case: str, post_gate: bool, reuse: str) -> None:
    got, expected, summary = both(reusing(reuse, CASES[case]), post_gate=post_gate)
    assert torch.equal(got, expected)
    assert summary.forced == 0
    assert sum(t.reused for kinds in summary.contexts.values() for t in kinds.values()) > 0


@pytest.mark.parametrize("dtype", [None, "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    "case", ["everything", "sublayers of blocks that are reused", "one layer apart from the others"]
)
def test_fitted_weights_stand_for_those_of_the_line(case: str, dtype: str | None) -> None:
    got, expected, summary = both(reusing("linear", CASES[case]), dtype=dtype, fitted=True)
    assert torch.equal(got, expected) and summary.forced == 0
    on_the_line, _, _ = both(reusing("linear", CASES[case]), dtype=dtype)
    assert not torch.allclose(got, on_the_line, rtol=1e-2)


@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("post_gate", [False, True], ids=["pre-gate", "post-gate"])
def test_batched_guidance_is_bit_identical_to_the_oracle(post_gate: bool, reuse: str) -> None:
    texts = {"": torch.cat([prompt(2), prompt(1)])}
    model = tiny_latte()
    rules = reusing(reuse, CASES["everything"])
    x = noise(batch=1).expand(2, -1, -1, -1, -1)
    expected = run_model(Oracle(model, rules, TIMESTEPS, post_gate=post_gate), TIMESTEPS, x, texts)
    pab.enable(model, config_of(rules, cache_point="post_gate" if post_gate else "pre_gate"), timesteps=TIMESTEPS)
    got = run_model(lambda name, step, *a, **k: model(*a, **k).sample, TIMESTEPS, x, texts)
    assert torch.equal(got, expected)
    assert len(pab.summary(model).contexts) == 1


@pytest.mark.parametrize("reuse", ["hold", "linear"])
@pytest.mark.parametrize("cache_point", ["pre_gate", "post_gate"])
def test_batched_and_separate_guidance_give_the_same(cache_point: str, reuse: str) -> None:
    rules = reusing(reuse, CASES["everything"])
    separate, _, _ = both(rules, post_gate=cache_point == "post_gate")
    model = tiny_latte()
    pab.enable(model, config_of(rules, cache_point=cache_point), timesteps=TIMESTEPS)
    texts = torch.cat(list(TEXTS.values()))
    x = noise()
    for t in TIMESTEPS:
        out = model(torch.cat([x, x]), timestep=torch.tensor([t, t]), encoder_hidden_states=texts).sample[:, :4]
        x = x - 0.1 * out.sum(0, keepdim=True)
    assert (
        x - separate
    ).norm() < 1e-4 * separate.norm()  # a GEMM of two rows may add up in another order than two of one


BOUNDS = {"int8": 0.01, "float8_e4m3fn": 0.04, "int4": 0.2}


@pytest.mark.parametrize(
    ("case", "reuse", "dtype", "post_gate"),
    pairs(
        ["everything", "block", "sublayers of blocks that are reused"], ["hold", "linear"], list(BOUNDS), [False, True]
    ),
)
def test_quantised_slots_round_as_the_oracle_does_and_change_little(
    case: str, reuse: str, dtype: str, post_gate: bool
) -> None:
    rules = reusing(reuse, CASES[case])
    got, expected, summary = both(rules, dtype=dtype, post_gate=post_gate)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    exact, _, wide = both(rules, post_gate=post_gate)
    error = (got - exact).norm() / exact.norm()
    assert (
        0 < error < BOUNDS[dtype] * (1 if reuse == "hold" else 4)
    )  # the line magnifies what rounding does to the two outputs
    assert summary.peak_cache_bytes < 0.3 * wide.peak_cache_bytes


@pytest.mark.parametrize(
    ("model", "frames", "height", "width"),
    [
        ({"cross_attention_dim": None}, 4, 16, 16),
        ({"activation_fn": "geglu", "attention_bias": False}, 4, 16, 16),
        ({"norm_elementwise_affine": True}, 4, 16, 16),
        ({"num_attention_heads": 3, "attention_head_dim": 72, "cross_attention_dim": 216}, 4, 16, 16),
        ({"num_attention_heads": 4, "attention_head_dim": 8, "cross_attention_dim": 32}, 4, 16, 16),
        ({"num_layers": 1}, 4, 4, 4),
        ({}, 1, 4, 20),
        ({"video_length": 3}, 3, 12, 4),
    ],
    ids=[
        "no cross attention",
        "GEGLU",
        "affine norms",
        "3 heads of 72",
        "heads of 8",
        "one token",
        "one frame",
        "odd numbers",
    ],
)
@pytest.mark.parametrize(("dtype", "reuse"), [(None, "hold"), ("int8", "hold"), ("int4", "hold"), (None, "linear")])
def test_other_models_and_shapes_are_as_the_oracle_has_them(
    model: dict[str, Any], frames: int, height: int, width: int, dtype: str | None, reuse: str
) -> None:
    kinds = (("spatial", 2), ("temporal", 3), ("cross", 4), ("mlp", 5))
    rules = {kind: Rule(reach, (0, 1), reuse=reuse) for kind, reach in kinds}
    oracle = Oracle(tiny_latte(**model), rules, TIMESTEPS, dtype=None if dtype is None else getattr(torch, dtype))
    tested = tiny_latte(**model)
    pab.enable(tested, config_of(rules, cache_dtype=dtype), num_steps=len(TIMESTEPS))
    for step in range(6):
        x = torch.randn(2, 4, frames, height, width)
        t, text = torch.tensor([500, 20]), torch.randn(2, 3, 24)
        expected = oracle("", step, x, timestep=t, encoder_hidden_states=text)
        got = tested(x, timestep=t, encoder_hidden_states=text).sample
        torch.testing.assert_close(got, expected, rtol=0 if dtype is None else 1e-5, atol=0 if dtype is None else 1e-5)
    assert pab.summary(tested).forced == 0


def test_inference_mode_is_as_no_grad() -> None:
    expected, _, _ = both(CASES["everything"])
    with torch.inference_mode():
        got, _, _ = both(CASES["everything"])
    assert torch.equal(got, expected)


def test_the_oracle_is_not_the_plain_model() -> None:
    """What the comparisons above compare is not nothing: each kind's reuse changes the result."""
    model = tiny_latte()
    plain = run_model(Oracle(model, {}, TIMESTEPS), TIMESTEPS, noise(), TEXTS)
    direct = run_model(lambda name, step, *a, **k: model(*a, **k).sample, TIMESTEPS, noise(), TEXTS)
    assert torch.equal(plain, direct)
    for kind in ("spatial", "temporal", "cross", "mlp", "block"):
        changed = run_model(Oracle(model, CASES[kind], TIMESTEPS), TIMESTEPS, noise(), TEXTS)
        assert (changed - plain).norm() > 1e-3 * plain.norm(), kind
        linear = run_model(Oracle(model, reusing("linear", CASES[kind]), TIMESTEPS), TIMESTEPS, noise(), TEXTS)
        assert (linear - changed).norm() > 1e-3 * plain.norm() < (linear - plain).norm(), kind


@st.composite
def rule_sets(draw: st.DrawFn) -> dict[str, list[Rule]]:
    rules: dict[str, list[Rule]] = {}
    for kind in draw(
        st.lists(st.sampled_from(["spatial", "temporal", "cross", "mlp", "block"]), min_size=1, unique=True)
    ):
        lo, hi = sorted(draw(st.lists(st.integers(0, 10), min_size=2, max_size=2, unique=True)))
        layers = draw(st.sampled_from([None, (0,), (1,)]))
        rules[kind] = [
            Rule(draw(st.integers(1, 7)), (lo, hi), "step", layers, draw(st.sampled_from(["hold", "linear"])))
        ]
    return rules


@settings(max_examples=20)
@given(rules=rule_sets(), post_gate=st.booleans(), on_host=st.booleans(), early=st.booleans())
def test_any_rules_are_bit_identical_to_the_oracle_wherever_slots_are(
    rules: dict[str, list[Rule]], post_gate: bool, on_host: bool, early: bool
) -> None:
    with recorded(early) as bus:
        got, expected, summary = both(rules, post_gate=post_gate, cache_device="cpu" if on_host else None)
    assert torch.equal(got, expected)
    assert bool(bus.log) == (summary.peak_host_bytes > 0) and not bus.pending and not bus.present
    assert on_host or not bus.log
    assert summary.forced == 0
    assert summary.cache_bytes == 0
