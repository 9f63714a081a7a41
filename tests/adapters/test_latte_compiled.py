"""Blocks compiled with `fullgraph=True`: one graph for each pattern of compute, store and reuse, and the results of
plain blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from pab_kernels.rules.schedule import Schedule
from tests.adapters.compiled_latte import STEPS, THIRDS, compiled, config, outputs
from tests.adapters.tiny_latte import inputs, noise, prompt, tiny_latte
from tests.rules.random_weights import with_random_weights


@pytest.fixture(autouse=True)
def _forgotten_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def patterns(model: Any, block: str) -> int:
    """How many columns the plan has for the sublayers of a block."""
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None and broadcaster.latest is not None and broadcaster.latest.plan is not None
    plan = broadcaster.latest.plan
    rows = [row for name, row in plan.rows.items() if name.startswith(f"{block}.")]
    return len({tuple((row[i].action, len(row[i].reads)) for row in rows) for i in range(STEPS)})


def enabled(pab_config: PABConfig) -> Any:
    model = tiny_latte(num_layers=1)
    pab.enable(model, pab_config, num_steps=STEPS)
    return model


@pytest.mark.parametrize(
    "pab_config",
    [
        config("linear"),
        with_random_weights(config("linear"), pab.sublayers(tiny_latte(num_layers=1)), Schedule(STEPS)),
        replace(THIRDS, cache_dtype="int4"),
    ],
    ids=["linear", "fitted", "int4"],
)
def test_as_many_graphs_as_patterns_and_none_in_a_second_generation_nor_pab_after_disable(
    pab_config: PABConfig,
) -> None:
    plain, model = enabled(pab_config), enabled(pab_config)
    graphs = compiled(model)
    for first in (True, False):
        if first:
            expected, found = outputs(plain), outputs(model)
            made = dict(graphs)
            assert made == {
                name: patterns(model, name) for name in ("transformer_blocks.0", "temporal_transformer_blocks.0")
            }
        else:
            with pab.generation(plain, num_steps=STEPS), pab.generation(model, num_steps=STEPS):
                expected, found = outputs(plain), outputs(model)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert str(pab.summary(model)) == str(pab.summary(plain))
    assert dict(graphs) == made
    pab.disable(model)
    with torch.no_grad():
        before = tiny_latte(num_layers=1)(**inputs()).sample
        torch.testing.assert_close(model(**inputs()).sample, before, atol=1e-5, rtol=1e-5)


def test_a_whole_block_may_be_reused() -> None:
    pab_config = replace(THIRDS, block=Broadcast(2, (0.7, 0.95)))
    plain, model = enabled(pab_config), enabled(pab_config)
    compiled(model)
    for a, b in zip(outputs(model), outputs(plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert str(pab.summary(model)) == str(pab.summary(plain))


def test_what_was_computed_from_another_shape_is_not_reused() -> None:
    def changing(step: int) -> Tensor:
        return noise(step, height=16 if step < 4 else 8)

    gated = replace(THIRDS, cache_point="post_gate")
    plain, model = enabled(gated), enabled(gated)
    compiled(model, ("transformer_blocks",))
    with torch._dynamo.config.patch(
        recompile_limit=16
    ):  # both shapes have graphs of their own, as they have without PAB
        for a, b in zip(outputs(model, changing), outputs(plain, changing), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert str(pab.summary(model)) == str(pab.summary(plain)) and pab.summary(model).forced > 0


def test_a_context_that_comes_late_computes_first() -> None:
    models = [enabled(PABConfig(spatial=Broadcast(3, (0, 1), reuse="linear"))) for _ in range(2)]
    compiled(models[1])
    results = []
    for model in models:
        with torch.no_grad():
            found = []
            for step in range(STEPS):
                for name in ("cond", "late") if step >= 4 else ("cond",):
                    with pab.context(model, name, step):
                        found.append(model(**inputs() | {"hidden_states": noise(step)}).sample)
            results.append(found)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert str(pab.summary(models[1])) == str(pab.summary(models[0])) and pab.summary(models[1]).forced > 0


def test_an_exception_in_a_compiled_block_leaves_nothing_behind() -> None:
    model = enabled(THIRDS)
    compiled(model)
    with torch.no_grad(), pytest.raises(RuntimeError):
        for step in range(STEPS):
            with pab.context(model, "cond", step):
                model(
                    **inputs()
                    | {
                        "hidden_states": noise(step),
                        "encoder_hidden_states": prompt() if step < 4 else prompt()[..., :3],
                    }
                )
    assert pab.summary(model).cache_bytes == 0
