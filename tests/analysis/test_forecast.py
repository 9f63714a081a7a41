"""The forecast equals what a generation on the meta device counts, and gives the published figures."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("diffusers")

import torch

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.analysis.families import FAMILIES
from pab_kernels.analysis.forecasting import forecast
from pab_kernels.analysis.inputs import INPUTS, Size
from pab_kernels.analysis.transformers import build, find_config

TINY: dict[str, tuple[dict[str, Any], Size]] = {
    "latte": (
        dict(FAMILIES["latte"].config) | {"num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64, "num_layers": 2},
        Size(16, 32, 48),
    ),
    "cogvideox": (
        {"_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 2, "num_layers": 2, "use_rotary_positional_embeddings": True},
        Size(5, 32, 48),
    ),
    "wan": (
        {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 96, "num_layers": 2},
        Size(5, 32, 48),
    ),
    "stdit3": ({"_class_name": "STDiT3", "hidden_size": 64, "num_heads": 2, "depth": 2}, Size(17, 40, 56)),
}
RULES = PABConfig(spatial=2, temporal=3, cross=Broadcast(4, reuse="linear"), mlp=2)


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@pytest.mark.parametrize("name", TINY)
def test_the_forecast_is_what_a_generation_on_the_meta_device_counts(name: str, cache_dtype: Any) -> None:
    config, clip = TINY[name]
    rules = PABConfig(RULES.spatial, RULES.temporal, RULES.cross, RULES.mlp, cache_dtype=cache_dtype)
    found = forecast(config, clip, steps=10, config=rules, text=7)

    how = INPUTS[config["_class_name"]]
    model = build(find_config(config), torch.bfloat16)
    inputs = how.tensors(model.config, how.batch, how.latents(model.config, clip), 7, torch.bfloat16, clip)
    with torch.no_grad(), ops.flop_counter() as plain:
        model(**inputs)
    pab.enable(model, rules, num_steps=10)
    with torch.no_grad(), ops.flop_counter() as counter:
        for _ in range(10):
            for branch in range(how.contexts):
                with pab.context(model, str(branch)):
                    model(**inputs)
    summary = pab.summary(model)
    assert counter.get_total_flops() == found.total.flops
    assert 10 * how.contexts * plain.get_total_flops() == found.total.flops_without > found.total.flops
    assert summary.peak_cache_bytes == found.total.peak_cache_bytes == found.peak_cache_bytes[cache_dtype or "model"] > 0
    for kind, one in found.kinds.items():
        ran = [tallies[kind] for tallies in summary.contexts.values()]
        expected = (sum(t.computed for t in ran), sum(t.stored for t in ran), sum(t.reused for t in ran))
        assert (one.counts.computed, one.counts.stored, one.counts.reused) == expected
    assert sum(one.flops for one in found.kinds.values()) + found.rest_flops == found.total.flops


@pytest.mark.parametrize(
    ("model", "size", "gib"),
    [
        ("open-sora-1.2", (51, 480, 854), 11.5),
        ("open-sora-1.2", (102, 480, 854), 22.9),
        ("open-sora-1.2", (204, 480, 854), 45.9),
        ("latte", (16, 512, 512), 5.9),
        ("cogvideox-5b", (49, 480, 720), 8.5),
    ],
)
def test_the_published_cache_sizes_come_out(model: str, size: Any, gib: float) -> None:
    kinds = forecast(model, size).kinds
    assert round(sum(kinds[k].cache_bytes["model"] for k in kinds if k != "mlp") / 2**30, 1) == gib
