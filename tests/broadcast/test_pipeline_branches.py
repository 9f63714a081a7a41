"""Pipelines whose calls of the model differ from step to step: three branches, guidance that comes and goes, schedules
of second order or entered in the middle, chunks of a long video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import PIL.Image
import pytest
import torch
from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

import pab_kernels as pab
from pab_kernels import PABConfig
from tests.adapters.tiny_pipes import HUNYUAN_IMAGE, Pipe, embedding, named, ones, prompts, transformer
from tests.broadcast.sampled_pipelines import CONFIG, assert_runs_as_the_oracle
from tests.tiny_pipelines import image_vae

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),  # AnyFlow's
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),  # diffusers' schedulers hand tensors to numpy
]

STEPS = 6


def with_parts(tiny: Pipe, **parts: Any) -> Pipe:
    return replace(tiny, parts=lambda: tiny.parts() | {name: make() for name, make in parts.items()})


# Three branches, and guidance in an interval


def test_skip_layer_guidance_of_sd3_is_a_context_of_its_own_that_comes_late_and_goes_early() -> None:
    tiny = named("StableDiffusion3Pipeline")
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.7}
    summary = assert_runs_as_the_oracle(tiny, STEPS, **skip)
    assert list(summary.contexts) == ["#0", "#1"]
    # Steps 1 to 4, without one of three blocks. Attention at 1 and MLPs at 4 would reuse what this branch did not
    # write.
    assert summary.contexts["#1"]["spatial"].forced == 3 and summary.contexts["#1"]["mlp"].forced == 0
    assert all(t.forced == 0 for t in summary.contexts["#0"].values())


GUIDERS = {
    "skip layers": lambda: diffusers.SkipLayerGuidance(
        guidance_scale=4.0,
        skip_layer_guidance_start=0.2,
        skip_layer_guidance_stop=0.9,
        skip_layer_config=diffusers.LayerSkipConfig([1], fqn="transformer_blocks"),
    ),
    "perturbed attention": lambda: diffusers.PerturbedAttentionGuidance(
        guidance_scale=4.0,
        perturbed_guidance_start=0.0,
        perturbed_guidance_stop=1.0,
        perturbed_guidance_config=diffusers.LayerSkipConfig(
            [1], fqn="transformer_blocks", skip_attention=False, skip_attention_scores=True, skip_ff=False
        ),
    ),
    "an interval": lambda: diffusers.ClassifierFreeGuidance(guidance_scale=4.0, start=0.4, stop=0.8),
}


@pytest.mark.parametrize("guider", GUIDERS)
def test_a_guider_of_diffusers(guider: str) -> None:
    summary = assert_runs_as_the_oracle(
        with_parts(HUNYUAN_IMAGE, guider=GUIDERS[guider], ocr_guider=GUIDERS[guider]), STEPS
    )
    third = [] if guider == "an interval" else ["pred_cond_skip"]
    assert list(summary.contexts) == ["pred_cond", "pred_uncond", *third]
    assert all(t.forced == 0 and t.reused > 0 for t in summary.contexts["pred_cond"].values())


def test_perturbed_attention_guidance_in_one_batch() -> None:
    tiny = replace(named("PixArtSigmaPipeline"), name="PixArtSigmaPAGPipeline")
    tiny = with_parts(tiny, pag_applied_layers=lambda: ["blocks.1"])
    summary = assert_runs_as_the_oracle(tiny, STEPS, pag_scale=3.0)
    assert list(summary.contexts) == ["#0"] and summary.forced == 0


def test_guidance_switched_off_half_way_by_the_pipeline() -> None:
    summary = assert_runs_as_the_oracle(named("Lumina2Pipeline"), STEPS, cfg_trunc_ratio=0.5)
    assert list(summary.contexts) == ["#0", "#1"] and summary.forced == 0
    assert {name: c["spatial"].computed + c["spatial"].reused for name, c in summary.contexts.items()} == {
        "#0": 12,
        "#1": 6,
    }


def test_guidance_switched_off_half_way_by_a_callback_halves_the_batch() -> None:
    def off(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == 2:
            pipe._guidance_scale = 1.0
            return {name: tensor[1:] for name, tensor in tensors.items()}
        return {}

    call = {
        "callback_on_step_end": off,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"],
    }
    summary = assert_runs_as_the_oracle(named("StableDiffusion3Pipeline"), STEPS, **call)
    assert list(summary.contexts) == ["#0"]
    assert summary.contexts["#0"]["spatial"].forced == 4  # step 3 would reuse


# Schedulers of second order


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("PixArtSigmaPipeline", diffusers.HeunDiscreteScheduler),
        ("PixArtSigmaPipeline", diffusers.KDPM2DiscreteScheduler),
        ("PixArtSigmaPipeline", diffusers.KDPM2AncestralDiscreteScheduler),
        ("WanPipeline", diffusers.FlowMatchHeunDiscreteScheduler),
        ("CogVideoXPipeline", diffusers.HeunDiscreteScheduler),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_a_scheduler_of_second_order_has_more_steps_than_timesteps(name: str, scheduler: Any) -> None:
    summary = assert_runs_as_the_oracle(with_parts(named(name), scheduler=scheduler), 4)
    assert summary.plan is not None and len(summary.plan.steps) == 7 and summary.forced == 0


# Schedules entered in the middle


def _of(name: str, config: dict[str, Any] | None = None, **call: Any) -> Pipe:
    """The parts and inputs of the pipeline `name`, for another one."""
    tiny = named(name)
    if config is not None:
        kind = type(tiny.parts()["transformer"]).__name__
        tiny = with_parts(tiny, transformer=lambda: transformer(kind, **config))
    return replace(tiny, call={k: v for k, v in tiny.call.items() if k != "num_frames"} | call)


def _shifted_vae() -> Any:
    vae = image_vae(4)
    vae.register_to_config(shift_factor=0.1)
    return vae


IMAGE_TO_IMAGE = {
    "FluxImg2ImgPipeline": lambda: _of(
        "FluxPipeline", {"in_channels": 64, "guidance_embeds": True}, image=embedding(7, 16, 4, 6)
    ),
    "StableDiffusion3Img2ImgPipeline": lambda: with_parts(
        _of("StableDiffusion3Pipeline", image=embedding(7, 3, 64, 48).sigmoid()), vae=_shifted_vae
    ),
    "WanVideoToVideoPipeline": lambda: _of("WanPipeline", video=None, latents=embedding(7, 4, 3, 4, 6)),
    "CogVideoXVideoToVideoPipeline": lambda: _of("CogVideoXPipeline", video=None, latents=embedding(7, 2, 4, 8, 6)),
}


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_image_to_image_and_video_to_video_enter_the_schedule_in_the_middle(name: str, strength: float) -> None:
    first = 0 if strength == 1 else 4
    summary = assert_runs_as_the_oracle(replace(IMAGE_TO_IMAGE[name](), name=name), 10, first, strength=strength)
    assert summary.plan is not None and list(summary.plan.steps) == list(range(first, 10))
    assert summary.forced == 0


# Chunks of a long video


def _framepack() -> Pipe:
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    return Pipe(
        "HunyuanVideoFramepackPipeline",
        lambda: {
            "transformer": transformer("HunyuanVideoFramepackTransformer3DModel"),
            "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            "vae": diffusers.AutoencoderKLHunyuanVideo(
                latent_channels=4, block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1
            ),
            "image_encoder": SiglipVisionModel(SiglipVisionConfig(**vision)).eval(),
            "feature_extractor": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        },
        prompts(6, ones, pooled_prompt_embeds=8)
        | {
            "height": 32,
            "width": 48,
            "num_frames": 15,
            "latent_window_size": 3,
            "true_cfg_scale": 4.0,
            "sampling_type": "vanilla",
        }
        | {"negative_pooled_prompt_embeds": embedding(11, 8), "image": PIL.Image.new("RGB", (48, 32), (9, 99, 200))},
        ("#0", "#1"),
        {},
    )


def test_each_section_of_framepack_is_a_generation_of_its_own() -> None:
    summary = assert_runs_as_the_oracle(_framepack(), STEPS)
    assert list(summary.contexts) == ["#0", "#1"] and summary.forced == 0


def _far(*chunks: int) -> Pipe:
    return Pipe(
        "AnyFlowFARPipeline",
        lambda: {
            "transformer": transformer("AnyFlowFARTransformer3DModel", full_chunk_limit=len(chunks) + 1),
            "scheduler": diffusers.FlowMapEulerDiscreteScheduler(),
        },
        prompts(6)
        | {
            "height": 32,
            "width": 64,
            "num_frames": 4 * sum(chunks) - 3,
            "guidance_scale": 4.0,
            "chunk_partition": list(chunks),
        },
        ("#0",),
        {},
    )


def test_a_call_after_the_last_step_runs_plainly_and_is_counted() -> None:
    """A chunk that others look back at: its keys and values are kept by such a call."""
    assert assert_runs_as_the_oracle(_far(2), STEPS).forced == 0
    tiny = _far(1, 1)
    pipe = tiny.build()
    plain = tiny.sample(pipe, STEPS)
    pab.enable(pipe, PABConfig(1, 1, 1, 1, 1))
    assert torch.equal(tiny.sample(pipe, STEPS), plain)
    pab.enable(pipe, CONFIG)
    first = tiny.sample(pipe, STEPS)
    assert first.isfinite().all() and not torch.equal(first, plain)
    assert torch.equal(tiny.sample(pipe, STEPS), first)
    assert pab.summary(pipe).forced == 0
    pab.disable(pipe)
    assert torch.equal(tiny.sample(pipe, STEPS), plain)


def _diffusion_forcing(**call: Any) -> Pipe:
    tiny = with_parts(
        named("SkyReelsV2Pipeline"),
        transformer=lambda: transformer("SkyReelsV2Transformer3DModel", inject_sample_info=True),
    )
    return replace(tiny, name="SkyReelsV2DiffusionForcingPipeline", call=tiny.call | {"prompt": None} | call)


def test_diffusion_forcing_steps_copies_of_its_scheduler_and_the_branches_tell_the_steps() -> None:
    """All frames at once: one call of the model a branch and step. The schedule's own scheduler never steps."""
    tiny = _diffusion_forcing()
    pipe = tiny.build()
    plain = tiny.sample(pipe, STEPS)
    pab.enable(pipe, PABConfig(1, 1, 1, 1, 1))
    assert torch.equal(tiny.sample(pipe, STEPS), plain)
    pab.enable(pipe, CONFIG)
    first = tiny.sample(pipe, STEPS)
    assert not torch.equal(first, plain)
    for _ in range(2):
        assert torch.equal(tiny.sample(pipe, STEPS), first)
        summary = pab.summary(pipe)
        assert list(summary.contexts) == ["cond", "uncond"] and summary.forced == 0 and summary.cache_bytes == 0
        assert summary.plan is not None
        for tallies in summary.contexts.values():
            assert {kind: (t.computed, t.reused) for kind, t in tallies.items()} == {
                kind: (c.computed, c.reused) for kind, c in summary.plan.counts().items()
            }


@pytest.mark.parametrize(
    "call",
    [{"num_frames": 17, "base_num_frames": 9, "overlap_history": 1}, {"ar_step": 2, "causal_block_size": 1}],
    ids=["windows of a long video", "frames at different steps"],
)
def test_diffusion_forcing_with_more_steps_than_its_scheduler_has_runs_the_others_plainly(
    call: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    tiny = _diffusion_forcing(**call)
    pipe = tiny.build()
    plain = tiny.sample(pipe, STEPS)
    pab.enable(pipe, PABConfig(1, 1, 1, 1, 1))
    assert torch.equal(tiny.sample(pipe, STEPS), plain)
    pab.enable(pipe, CONFIG)
    first = tiny.sample(pipe, STEPS)
    assert first.isfinite().all() and torch.equal(tiny.sample(pipe, STEPS), first)
    assert pab.summary(pipe).plain_calls > 0
    assert any("after the last of the scheduler's 6 steps" in r.getMessage() for r in caplog.records)
    pab.disable(pipe)
    assert torch.equal(tiny.sample(pipe, STEPS), plain)
