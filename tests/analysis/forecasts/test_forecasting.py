"""The forecast equals what a generation on the meta device counts, and gives the published figures."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

import diffusers
import numpy as np
import torch

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig, ops
from pab_kernels.analysis.forecasts.families import FAMILIES
from pab_kernels.analysis.forecasts.forecasting import forecast
from pab_kernels.analysis.forecasts.model_calls import MODEL_CALLS, Size
from pab_kernels.analysis.forecasts.transformers import build, find_config

TINY: dict[str, tuple[dict[str, Any], Size]] = {
    "latte": (
        dict(FAMILIES["latte"].config)
        | {"num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64, "num_layers": 2},
        Size(16, 32, 48),
    ),
    "cogvideox": (
        {
            "_class_name": "CogVideoXTransformer3DModel",
            "num_attention_heads": 2,
            "num_layers": 2,
            "use_rotary_positional_embeddings": True,
        },
        Size(5, 32, 48),
    ),
    "wan": (
        {
            "_class_name": "WanTransformer3DModel",
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "ffn_dim": 96,
            "num_layers": 2,
        },
        Size(5, 32, 48),
    ),
    "stdit3": ({"_class_name": "STDiT3", "hidden_size": 64, "num_heads": 2, "depth": 2}, Size(17, 40, 56)),
    "open-sora-plan-1.1": (
        dict(FAMILIES["open-sora-plan-1.1"].config)
        | {"num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64, "num_layers": 2},
        Size(65, 32, 48),
    ),
    "open-sora-plan-1.2": (
        dict(FAMILIES["open-sora-plan-1.2"].config)
        | {"num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48, "num_layers": 2},
        Size(9, 32, 48),
    ),
}
RULES = PABConfig(spatial=2, temporal=3, cross=Broadcast(4, reuse="linear"), mlp=2)
BLOCKS = PABConfig(spatial=2, cross=3, block=Broadcast(3, reuse="linear", layers=(1,)))


def all_steps(range: int, **options: Any) -> Broadcast:
    return Broadcast(range, (0, 1), **options)


@pytest.mark.parametrize(
    ("name", "rules", "cache_dtype"),
    [
        ("latte", dataclasses.replace(RULES, budget="80 KiB"), None),
        ("cogvideox", dataclasses.replace(RULES, budget=20_000), "int8"),
        ("stdit3", dataclasses.replace(RULES, budget="60 KiB"), None),
        ("latte", RULES, None),
        ("cogvideox", RULES, "int8"),
        ("wan", RULES, None),
        ("stdit3", RULES, "int4"),
        ("open-sora-plan-1.1", RULES, None),
        ("open-sora-plan-1.2", PABConfig(spatial=2, cross=Broadcast(4, reuse="linear"), mlp=2), "int8"),
        ("wan", BLOCKS, "int4"),
        ("cogvideox", BLOCKS, None),
    ],
)
def test_the_forecast_is_what_a_generation_on_the_meta_device_counts(
    name: str, rules: PABConfig, cache_dtype: Any
) -> None:
    config, clip = TINY[name]
    rules = dataclasses.replace(rules, cache_dtype=cache_dtype)
    found = forecast(config, clip, steps=10, config=rules, text=7)

    how = MODEL_CALLS[config["_class_name"]]
    model = build(find_config(config), torch.bfloat16)
    inputs = how.tensors(model.config, how.batch, how.latents(model.config, clip), 7, torch.bfloat16)
    with torch.no_grad(), ops.flop_counter() as plain:
        model(**inputs)
    steps = len(found.plan.steps)  # PNDM takes more than are asked for
    pab.enable(model, rules, num_steps=steps)
    with torch.no_grad(), ops.flop_counter() as counter:
        for _ in range(steps):
            for branch in range(how.contexts):
                with pab.context(model, str(branch)):
                    model(**inputs)
    summary = pab.summary(model)
    assert counter.get_total_flops() == found.total.flops
    assert steps * how.contexts * plain.get_total_flops() == found.total.flops_without > found.total.flops
    kept = cache_dtype or "model" if rules.budget is None else "budget"
    assert summary.peak_cache_bytes == found.total.peak_cache_bytes == found.peak_cache_bytes[kept] > 0
    assert summary.plan is not None and summary.plan.given_up == found.plan.given_up
    held = found.total.cache_bytes_by_kind
    assert found.total.cache_bytes == tuple(map(sum, zip(*held.values(), strict=True)))
    for kind, one in found.kinds.items():
        ran = [tallies[kind] for tallies in summary.contexts.values()]
        expected = (sum(t.computed for t in ran), sum(t.stored for t in ran), sum(t.reused for t in ran))
        assert (one.counts.computed, one.counts.stored, one.counts.reused) == expected
    assert sum(one.flops for one in found.kinds.values()) + found.rest_flops == found.total.flops


LATTE, WAN = 2 * 16 * 6 * 64 * 2, 12 * 64 * 2
"""Bytes of an output in bfloat16: batch 2, 16 frames of 2 x 3 tokens, 64 channels; 12 tokens, 64 channels."""
EIGHT = 2 * 16 * 6 * (64 + 4)
"""Bytes of LATTE's output in int8: 64 values and a float32 scale a token."""


@pytest.mark.parametrize(
    ("name", "steps", "rules", "moved"),
    [
        # 2 steps x 2 layers reuse: 3 outputs in the spatial block and 2 in the temporal one, and the stream there and
        # back in each
        ("latte", 4, {"spatial": 2, "temporal": 2, "cross": 2, "mlp": 2}, 2 * 2 * ((2 + 3) + (2 + 2)) * LATTE),
        (
            "latte",
            4,
            {"spatial": 2, "temporal": 2, "cross": 2, "mlp": 2, "cache_dtype": "int8"},
            2 * 2 * (4 * LATTE + 5 * EIGHT),
        ),
        # cross is computed between the two: the stream goes there and back twice
        ("latte", 4, {"spatial": 2, "mlp": 2}, 2 * 2 * (2 * (2 + 1) + (2 + 1)) * LATTE),
        # step 1 has one output of cross; steps 3 and 5 have two, and the fourth of the block is one too many for one
        # pass
        (
            "latte",
            6,
            {"spatial": 2, "cross": "linear", "mlp": 2},
            2 * ((2 + 3) + 2 * (2 * 2 + 4) + 3 * (2 + 1)) * LATTE,
        ),
        # 2 contexts x 2 layers: spatial reads and writes in 2 steps, cross reads one output and then two
        ("wan", 4, {"spatial": 2, "cross": "linear"}, 2 * 2 * (2 * (1 + 1) + (1 + 1) + (2 + 1)) * WAN),
        ("wan", 4, {"spatial": 2, "block": 2}, 2 * 2 * 2 * (1 + 1) * WAN),
    ],
)
def test_bytes_moved_are_those_counted_by_hand(name: str, steps: int, rules: dict[str, Any], moved: int) -> None:
    def rule(value: Any) -> Any:
        return all_steps(2, reuse="linear") if value == "linear" else all_steps(value)

    config = PABConfig(**{key: value if key == "cache_dtype" else rule(value) for key, value in rules.items()})
    assert forecast(*TINY[name], steps=steps, config=config, text=7).total.moved_bytes == moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["latte", "cogvideox", "wan"])
def test_weights_are_those_of_the_loaded_checkpoint(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, clip = TINY[name]
    cls = getattr(diffusers, config["_class_name"])
    cls.from_config(config).save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, torch_dtype=dtype)
    found = forecast(tmp_path, clip, steps=2, dtype=str(dtype).removeprefix("torch."), text=7)
    assert found.weight_bytes == sum(t.nbytes for t in (*loaded.parameters(), *loaded.buffers())) > 0


@pytest.mark.parametrize("name", TINY)
def test_device_memory_is_weights_activations_and_cache(name: str) -> None:
    config, clip = TINY[name]
    found = forecast(config, clip, steps=10, config=RULES, text=7)
    how = MODEL_CALLS[config["_class_name"]]
    model = build(find_config(config), torch.bfloat16)
    inputs = how.tensors(model.config, how.batch, how.latents(model.config, clip), 7, torch.bfloat16)
    alive = [0]

    def note(module: Any, args: Any, out: Any) -> None:  # what a layer reads and what it makes are alive together
        alive.append(
            sum(
                t.nbytes
                for t in {id(t): t for t in (*args, out, *inputs.values()) if isinstance(t, torch.Tensor)}.values()
            )
        )

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(note)
    model(**inputs)
    assert found.activation_bytes >= max(alive) > 0
    assert found.total.peak_cache_bytes == max(found.total.cache_bytes) > 0
    assert found.device_bytes == found.weight_bytes + found.activation_bytes + found.total.peak_cache_bytes


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
@pytest.mark.parametrize("steps", [1, 7, 30, 50])
def test_timesteps_are_those_of_the_schedulers_of_the_pipelines(steps: int) -> None:
    """Euler's are float32; all others are whole."""
    S = diffusers
    clip, image = Size(21, 16, 22), Size(1, 128, 128)
    to_zero, to_last = np.linspace(1, 0, steps + 1)[:-1], np.linspace(1, 1 / steps, steps)
    flux = S.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    ltx = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
    wan = S.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    # what the pipelines hand to set_timesteps; mu is on the line through the two lengths and shifts
    cases: list[tuple[str, Size, Any, dict[str, Any]]] = [
        ("Latte", clip, S.DDIMScheduler(beta_schedule="linear"), {"num_inference_steps": steps}),
        ("CogVideoX", clip, S.CogVideoXDDIMScheduler(timestep_spacing="trailing"), {"num_inference_steps": steps}),
        ("Wan", clip, wan, {"num_inference_steps": steps}),
        ("Hunyuan", clip, S.FlowMatchEulerDiscreteScheduler(shift=7.0), {"sigmas": to_zero}),
        ("Flux", image, flux, {"sigmas": to_last, "mu": 1.15}),
        ("OpenSoraT2V", clip, S.EulerAncestralDiscreteScheduler(), {"num_inference_steps": steps}),
    ]
    if steps > 3:  # its first three steps are Runge-Kutta steps
        cases.append(("LatteT2V", clip, S.PNDMScheduler(), {"num_inference_steps": steps}))
    if steps > 1:  # this scheduler divides by zero in one step
        scheduler = S.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **ltx)
        mu = 0.95 + (21 * 16 * 22 - 1024) * (2.05 - 0.95) / (4096 - 1024)
        cases.append(("LTX", clip, scheduler, {"sigmas": to_last, "mu": mu}))
    for family, latents, scheduler, given in cases:
        scheduler.set_timesteps(**given)
        classes = (family, f"{family}Transformer2DModel", f"{family}Transformer3DModel")
        (name,) = MODEL_CALLS.keys() & {*classes, f"{family}VideoTransformer3DModel"}
        exact = family in ("Latte", "LatteT2V", "CogVideoX", "Wan")
        expected = pytest.approx(scheduler.timesteps.tolist(), rel=0 if exact else 1e-6, abs=0 if exact else 1e-4)
        assert MODEL_CALLS[name].timesteps(steps, latents, latents) == expected, family


@pytest.mark.parametrize(
    ("model", "size", "gib", "digits"),
    [
        ("open-sora-1.2", (51, 480, 854), 11.5, 1),
        ("open-sora-1.2", (204, 480, 854), 45.9, 1),
        ("open-sora-1.2", (102, 720, 1280), 52, 0),
        ("latte", (16, 512, 512), 5.9, 1),
        ("cogvideox-5b", (49, 480, 720), 8.5, 1),
    ],
)
def test_the_published_cache_sizes_come_out(model: str, size: Any, gib: float, digits: int) -> None:
    published = PABConfig.preset({"cogvideox-5b": "cogvideox"}.get(model, model))
    kinds = forecast(model, size, config=published).kinds
    assert round(sum(kinds[k].cache_bytes["model"] for k in kinds if k != "mlp") / 2**30, digits) == gib


@pytest.mark.parametrize(
    ("model", "size", "sequences"),
    [
        ("open-sora-plan-1.1", (65, 512, 512), (17, 1024)),
        ("open-sora-plan-1.1-221", (221, 512, 512), (56, 1024)),
        ("open-sora-plan-1.2", (29, 480, 640), (8, 1200)),
        ("open-sora-plan-1.2", (93, 480, 640), (24, 1200)),
        ("open-sora-plan-1.2", (93, 720, 1280), (24, 3600)),
    ],
)
def test_open_sora_plan_has_its_published_frames_and_tokens(
    model: str, size: tuple[int, int, int], sequences: tuple[int, int]
) -> None:
    source = find_config(model)
    frames, height, width = MODEL_CALLS[source.class_name].latents(source.config, Size(*size))
    assert (frames, height // 2 * (width // 2)) == sequences and FAMILIES[model].steps in (100, 150)
    with pytest.raises(ValueError, match="frames do not fit"):
        forecast(model, (28, 480, 640))
