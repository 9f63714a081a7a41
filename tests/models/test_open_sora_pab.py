"""OpenSoraPipeline under PAB: exact at range 1, the published counts, forecasts, given frames, several clips."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import FlowMatchEulerDiscreteScheduler

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.adapters import adapter_for
from pab_kernels.broadcast.summary import Summary
from pab_kernels.models.open_sora import pipeline
from pab_kernels.models.open_sora.pipeline import OpenSoraPipeline
from pab_kernels.models.open_sora.schedule import LatentSize, shift, sigmas
from tests.broadcast.forecast_oracle import AT, RULE, STEPS, written_out
from tests.models.tiny_open_sora import CLIP, noise, prompts, tiny_pipe

pytestmark = pytest.mark.usefixtures("no_flops")

CONTEXTS = {"batched": {"#0"}, "apart": {"cond", "uncond"}}
EDITED = {"frame_latents": noise(2, 3, seed=5), "frame_mask": [0, 0.9, 0.4, 1, 1]}
GIVEN: dict[str, dict[str, Any]] = {"none given": {}, "image": {"frame_latents": noise(2, 1, seed=5)}, "edited": EDITED}


def sampled(pipe: OpenSoraPipeline, steps: int = STEPS, **call: Any) -> Tensor:
    options = {"latents": noise(), "num_inference_steps": steps, "output_type": "latent", **CLIP, **prompts(), **call}
    return pipe(generator=torch.Generator().manual_seed(0), **options).frames


def published(pipe: OpenSoraPipeline) -> PABConfig:
    """The published config, at a cache point that the model's adapter has."""
    config, points = PABConfig.preset("open-sora-1.2"), adapter_for(pipe.transformer).cache_points
    return config if config.cache_point in points else dataclasses.replace(config, cache_point=points[0])


def counts(summary: Summary, name: str) -> dict[str, dict[str, int]]:
    return {
        context: {kind: getattr(tally, name) for kind, tally in kinds.items()}
        for context, kinds in summary.contexts.items()
    }


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("cfg", CONTEXTS)
def test_range_1_changes_no_bit_and_disable_restores(cfg: str, given: str) -> None:
    pipe = tiny_pipe()
    plain = sampled(pipe, cfg=cfg, **GIVEN[given])
    before = [set(vars(part)) for part in (pipe, pipe.scheduler, pipe.transformer)]
    pab.enable(pipe, PABConfig(spatial=1, temporal=1, cross=1, mlp=1))
    assert torch.equal(sampled(pipe, cfg=cfg, **GIVEN[given]), plain)
    pab.enable(pipe, PABConfig(spatial=2, temporal=2, cross=2, mlp=2))
    assert not torch.equal(sampled(pipe, cfg=cfg, **GIVEN[given]), plain)
    pab.disable(pipe)
    assert torch.equal(sampled(pipe, cfg=cfg, **GIVEN[given]), plain)
    assert [set(vars(part)) for part in (pipe, pipe.scheduler, pipe.transformer)] == before


@pytest.mark.parametrize("cfg", CONTEXTS)
@pytest.mark.parametrize(
    ("size", "computed", "mlp"),
    [
        ((51, 480, 854), (21, 17, 16), 6),
        ((102, 480, 854), (22, 18, 17), 2),
        ((204, 480, 854), (22, 18, 17), 2),
        ((51, 720, 1280), (22, 18, 17), 2),
        ((102, 720, 1280), (23, 19, 18), 2),
    ],
)
def test_the_published_config_computes_as_many_steps_as_published(
    monkeypatch: pytest.MonkeyPatch, cfg: str, size: tuple[int, int, int], computed: tuple[int, ...], mlp: int
) -> None:
    """At the noise levels of the size, on latents of 5 x 4 x 5. A layer has two blocks, each with cross and MLP."""
    monkeypatch.setattr(pipeline, "latent_size", lambda *_: LatentSize(5, 4, 5))
    pipe = tiny_pipe()
    pab.enable(pipe, published(pipe))
    frames, height, width = size
    sampled(pipe, 30, cfg=cfg, num_frames=frames, height=height, width=width)
    summary = pab.summary(pipe)
    spatial, temporal, cross = computed
    reused = {"spatial": 30 - spatial, "temporal": 30 - temporal, "cross": 2 * (30 - cross), "mlp": 2 * mlp}
    assert counts(summary, "reused") == dict.fromkeys(CONTEXTS[cfg], reused)
    assert counts(summary, "forced") == dict.fromkeys(CONTEXTS[cfg], dict.fromkeys(reused, 0))


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("cfg", CONTEXTS)
def test_the_default_skips_the_model_and_keeps_given_frames(cfg: str, given: str) -> None:
    pipe = tiny_pipe()
    plain = sampled(pipe, 20, cfg=cfg, **GIVEN[given])
    pab.enable(pipe)
    skipped = sampled(pipe, 20, cfg=cfg, **GIVEN[given])
    found = counts(pab.summary(pipe), "reused")
    assert found.keys() == CONTEXTS[cfg] and all(kinds["model"] == 7 for kinds in found.values())
    assert 0 < (skipped - plain).abs().max() < 0.2 * plain.std()
    if given != "none given":
        assert torch.equal(skipped[:, :, 0], GIVEN[given]["frame_latents"][:, :, 0])


class Oracle:
    """The same sampling for `written_out`, whose scheduler takes the negative of the velocity."""

    def __init__(self, pipe: OpenSoraPipeline) -> None:
        self.transformer, self.scheduler = pipe.transformer, Levels()

    def noise(self) -> Tensor:
        return noise()

    def stochastic(self) -> dict[str, Any]:
        return {}

    def guided(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        embeds, mask = prompts()["prompt_embeds"], prompts()["prompt_attention_mask"]
        null = self.transformer.y_embedder.y_embedding.expand_as(embeds)
        told = {"fps": torch.tensor([24.0]), "height": CLIP["height"], "width": CLIP["width"]}
        text, empty = (self.transformer(x, t.expand(2), y[:, None], mask, **told)[:, :4] for y in (embeds, null))
        return -(empty + 7 * (text - empty))


class Levels(FlowMatchEulerDiscreteScheduler):
    """With the noise levels of `CLIP`."""

    def set_timesteps(self, num_inference_steps: int, **_: Any) -> None:
        super().set_timesteps(sigmas=sigmas(num_inference_steps, shift(**CLIP)))


@pytest.mark.parametrize("cfg", CONTEXTS)
def test_forecasts_are_those_of_the_written_out_ones(cfg: str) -> None:
    pipe = tiny_pipe()
    expected = written_out(Oracle(pipe), set(AT))  # type: ignore[arg-type]
    plain = sampled(pipe, cfg=cfg)
    pab.enable(pipe, PABConfig(model=RULE))
    found = sampled(pipe, cfg=cfg)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 10 * (found - expected).abs().max()


def test_every_clip_is_a_generation() -> None:
    pipe = tiny_pipe()
    call = {"num_frames": 34, "num_clips": 2, "latents": None}
    plain = sampled(pipe, 30, **call)
    pab.enable(pipe, published(pipe))
    reused = sampled(pipe, 30, **call)
    assert 0 < (reused - plain).abs().max() < 0.2 * plain.std()
    summary = pab.summary(pipe)
    assert summary.contexts["#0"]["spatial"].reused > 0 and summary.contexts["#0"]["spatial"].forced == 0
    again = sampled(pipe, 30, **call)
    assert torch.equal(again, reused)


def test_a_run_that_a_callback_interrupts_or_fails_leaves_nothing_to_the_next() -> None:
    pipe = tiny_pipe()

    def stop(p: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        p._interrupt = step == 15
        return {}

    def fail(p: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step == 3:
            raise KeyError("a callback")
        return {}

    pab.enable(pipe, published(pipe))
    whole = sampled(pipe, 30)
    assert not torch.equal(sampled(pipe, 30, callback_on_step_end=stop), whole)
    assert torch.equal(sampled(pipe, 30), whole)
    with pytest.raises(KeyError, match="a callback"):
        sampled(pipe, 30, callback_on_step_end=fail)
    assert pab.summary(pipe).cache_bytes == 0
    assert torch.equal(sampled(pipe, 30), whole)


@pytest.mark.parametrize("cfg", CONTEXTS)
def test_a_mask_that_changes_during_a_run_shows_no_new_prompt(cfg: str) -> None:
    pipe = tiny_pipe()
    pab.enable(pipe, PABConfig(spatial=Broadcast(3, (0, 1))))
    sampled(pipe, 9, cfg=cfg, **EDITED)
    contexts = pab.summary(pipe).contexts
    assert {
        name: (kinds["spatial"].reused, kinds["spatial"].forced) for name, kinds in contexts.items()
    } == dict.fromkeys(CONTEXTS[cfg], (6, 0))


def test_steps_of_a_half_precision_model_have_latents_of_one_dtype() -> None:
    """The first step's are drawn in the model's dtype, and the scheduler's are in float32."""
    pipe = tiny_pipe()
    pipe.transformer.bfloat16()
    pab.enable(pipe, PABConfig(spatial=Broadcast(2, (0, 1))))
    assert sampled(pipe, 4, latents=None).dtype == torch.float32
    tally = pab.summary(pipe).contexts["#0"]["spatial"]
    assert (tally.reused, tally.forced) == (2, 0)


def test_given_frames_are_kept_where_latents_are_not_corrected() -> None:
    pipe = tiny_pipe()
    pab.enable(pipe)

    def edited(p: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": tensors["latents"].clone()}

    found = sampled(pipe, 20, callback_on_step_end=edited, **GIVEN["image"])
    assert torch.equal(found[:, :, 0], GIVEN["image"]["frame_latents"][:, :, 0])
