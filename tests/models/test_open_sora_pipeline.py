"""OpenSoraPipeline against sampling written out in float64, from prompts to frames, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import pab_kernels as pab
from pab_kernels import PABConfig
from pab_kernels.models.open_sora.pipeline import OpenSoraPipeline
from pab_kernels.models.open_sora.schedule import shift, sigmas
from pab_kernels.models.stdit3 import STDiT3
from tests.models.open_sora_oracle import sampled
from tests.models.tiny_open_sora import CLIP, TinyVAE, noise, one_layer, prompts, tiny_pipe

STEPS = 4


def in_float64() -> OpenSoraPipeline:
    pipe = tiny_pipe()
    pipe.transformer.double()
    return pipe


def latents(pipe: OpenSoraPipeline, **call: Any) -> Tensor:
    call = {"num_inference_steps": STEPS, "output_type": "latent", **CLIP, **call}
    return pipe(**call).frames


def assert_close(found: Tensor, expected: Tensor) -> None:
    """The scheduler and the model's output are in float32."""
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cfg", ["batched", "apart"])
@pytest.mark.parametrize("lengths", [(4, 7), (3,)])
def test_latents_are_those_of_the_written_out_sampling(cfg: str, lengths: tuple[int, ...]) -> None:
    pipe, text, start = in_float64(), prompts(lengths), noise(len(lengths))
    found = latents(pipe, latents=start, cfg=cfg, **text)
    assert found.shape == start.shape and found.dtype == torch.float32
    assert_close(found, sampled(pipe.transformer, start, **text, steps=STEPS, **CLIP))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_other_sizes_guidance_and_frame_rates(guidance: float) -> None:
    pipe, text = in_float64(), prompts((5,))
    size = {"num_frames": 22, "height": 24, "width": 31}  # 7 latent frames of 3 x 3
    start = torch.randn(1, 4, 7, 3, 3)
    found = latents(pipe, latents=start, guidance_scale=guidance, fps=8, num_inference_steps=5, **size, **text)
    assert_close(found, sampled(pipe.transformer, start, **text, steps=5, guidance=guidance, fps=8, **size))


def test_an_image_has_120_frames_a_second() -> None:
    pipe, text, start = in_float64(), prompts(), noise(2, 1)
    size = CLIP | {"num_frames": 1}
    found = latents(pipe, latents=start, **size, **text)
    assert_close(found, sampled(pipe.transformer, start, **text, steps=STEPS, fps=120, **size))


def test_rounded_sizes_are_those_that_bfloat16_holds() -> None:
    pipe, text, start = in_float64(), prompts((5,)), noise(1)
    seen: dict[str, Any] = {}
    pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    latents(pipe, latents=torch.randn(1, 4, 5, 4, 106), width=854, round_sizes=True, **text)
    assert (seen["height"], seen["width"], float(seen["fps"])) == (32, 856, 24)
    expected = 1000 * torch.tensor(sigmas(STEPS, shift(17, 32, 854, rounded=True)))
    torch.testing.assert_close(pipe.scheduler.timesteps, expected)
    assert torch.equal(*(latents(pipe, latents=start, round_sizes=rounded, **text) for rounded in (False, True)))


# Given frames


@pytest.mark.parametrize("cfg", ["batched", "apart"])
@pytest.mark.parametrize(
    ("at", "given", "mask"),
    [
        (0, 1, None),  # image to video
        (-1, 1, None),  # the last frame
        (0, 3, [0, 0.7, 0.7, 1, 1]),  # edited
        (1, 2, [0.95, 0.3, 0, 1, 0]),  # at several levels, with frames of the noise held too
    ],
)
def test_given_frames_are_sampled_as_written_out(at: int, given: int, mask: list[float] | None, cfg: str) -> None:
    pipe, text, start = in_float64(), prompts(), noise()
    frames = noise(2, given, seed=5)
    found = latents(
        pipe,
        latents=start,
        frame_latents=frames,
        frames_at=at,
        frame_mask=mask,
        generator=torch.Generator().manual_seed(6),
        num_inference_steps=8,
        cfg=cfg,
        **text,
    )
    first = at % 5
    placed = start.clone()
    placed[:, :, first : first + given] = frames
    numbers = mask or [0.0 if first <= i < first + given else 1.0 for i in range(5)]
    source = torch.Generator().manual_seed(6)
    drawn = [torch.randn(start.shape, generator=source, dtype=torch.float64) for _ in range(3)]
    expected = sampled(pipe.transformer, start, **text, steps=8, **CLIP, given=placed, mask=numbers, noises=drawn)
    assert_close(found, expected)
    kept = [i for i, number in enumerate(numbers) if number == 0]
    assert torch.equal(found[:, :, kept], placed[:, :, kept])


def test_samples_of_a_batch_have_their_own_masks() -> None:
    pipe, text, start = in_float64(), prompts(), noise()
    frames, masks = noise(1, 2, seed=5), [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    found = latents(pipe, latents=start, frame_latents=frames, frame_mask=torch.tensor(masks), **text)
    for b, mask in enumerate(masks):
        alone = {name: tensor[b : b + 1] for name, tensor in text.items()}
        placed = torch.cat([frames, start[b : b + 1, :, 2:]], 2)
        noised = torch.cat([placed[:, :, : 2 - b], start[b : b + 1, :, 2 - b :]], 2)
        if b == 0:
            expected = sampled(pipe.transformer, noised, **alone, steps=STEPS, **CLIP, given=placed, mask=mask)
            assert_close(found[b : b + 1], expected)
        assert torch.equal(found[b, :, : 2 - b], placed[0, :, : 2 - b])


def test_an_image_is_the_first_frame_of_a_video() -> None:
    pipe, text = tiny_pipe(), prompts((5,))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8))
    start = noise(1)
    call = {"num_inference_steps": STEPS, "latents": start, **CLIP, **text}
    video = pipe(frames=picture, output_type="pt", **call).frames
    assert video.shape == (1, 17, 3, 32, 40)
    blocks = torch.tensor(np.asarray(picture)).permute(2, 0, 1).float().unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))
    expected = (blocks / 255).repeat_interleave(8, 1).repeat_interleave(8, 2)
    torch.testing.assert_close(video[0, 0], expected, rtol=0, atol=1e-5)
    array = torch.tensor(np.asarray(picture)).permute(2, 0, 1)[None, None] / 255  # [B, F, 3, H, W]
    assert torch.equal(pipe(frames=array, output_type="pt", **call).frames, video)
    wide = Image.fromarray(np.tile(np.asarray(picture), (2, 3, 1)))  # 64 x 120: its middle, 64 x 80, is 2 x 2 pictures
    assert pipe(frames=[wide], output_type="latent", **call).frames.shape == start.shape


def test_a_video_goes_on_from_the_last_frames_of_another() -> None:
    pipe, text = tiny_pipe(), prompts((5,))
    before = torch.rand(1, 17, 3, 32, 40)
    found = latents(pipe, frames=before, num_frames=34, generator=torch.Generator().manual_seed(0), **text)
    assert found.shape == (1, 4, 10, 4, 5)
    encoded = TinyVAE().encode(2 * before.transpose(1, 2) - 1).latent_dist.sample(None)
    torch.testing.assert_close(found[:, :, :5], encoded)


def test_each_clip_is_given_the_last_frames_of_the_one_before() -> None:
    pipe, text = tiny_pipe(), prompts((5,))
    call = {"num_inference_steps": STEPS, **CLIP, **text} | {"num_frames": 34}
    found = pipe(num_clips=3, generator=torch.Generator().manual_seed(7), output_type="latent", **call).frames
    source = torch.Generator().manual_seed(7)
    clips = [pipe(generator=source, output_type="latent", **call).frames]
    for _ in range(2):
        clips.append(pipe(frame_latents=clips[-1][:, :, -5:], generator=source, output_type="latent", **call).frames)
    assert found.shape == (1, 4, 20, 4, 5)
    assert torch.equal(found, torch.cat([clips[0], clips[1][:, :, 5:], clips[2][:, :, 5:]], 2))
    video = pipe(num_clips=3, generator=torch.Generator().manual_seed(7), output_type="pt", **call).frames
    assert video.shape == (1, 34 + 17 + 17, 3, 32, 40)
    decoded = TinyVAE().decode(clips[2], 34).sample[:, :, 17:].transpose(1, 2)
    torch.testing.assert_close(video[:, -17:], (decoded / 2 + 0.5).clamp(0, 1))


# At full size


def test_the_published_size_runs_without_a_value_from_the_device() -> None:
    """On the meta device, where there is none."""
    with torch.device("meta"):
        pipe = OpenSoraPipeline(STDiT3().bfloat16())
        text = {"prompt_embeds": torch.empty(1, 300, 4096), "prompt_attention_mask": torch.empty(1, 300)}
        frames = torch.empty(1, 4, 5, 60, 106)
    pipe.set_progress_bar_config(disable=True)
    found = pipe(
        num_inference_steps=2, frame_latents=frames, frame_mask=5 * [0.9] + 10 * [1], output_type="latent", **text
    )
    assert found.frames.shape == (1, 4, 15, 60, 106) and found.frames.is_meta


# From prompts to frames


def test_prompts_become_frames_and_the_same_seed_the_same_ones(tmp_path: Path) -> None:
    pipe = tiny_pipe()
    words = ["a red circle", "a circle moves right and right"]

    def run(pipe: OpenSoraPipeline, output_type: str, **call: Any) -> Any:
        seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        return pipe(words, generator=seeds, num_inference_steps=2, output_type=output_type, clean_prompt=False, **CLIP)

    frames = run(pipe, "pt").frames
    assert frames.shape == (2, 17, 3, 32, 40) and frames.min() >= 0 and frames.max() <= 1
    assert run(pipe, "np").frames.shape == (2, 17, 32, 40, 3)
    pictures = run(pipe, "pil").frames
    assert [len(clip) for clip in pictures] == [17, 17] and pictures[0][0].size == (40, 32)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["pab_kernels.models.stdit3", "STDiT3"]
    loaded = OpenSoraPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(run(loaded, "pt").frames, frames, rtol=0, atol=1e-5)
    hub = tmp_path / "hub"
    (hub / "models--a--b" / "refs").mkdir(parents=True)
    (hub / "models--a--b" / "refs" / "main").write_text(40 * "a")
    pipe.save_pretrained(hub / "models--a--b" / "snapshots" / (40 * "a"))
    assert OpenSoraPipeline.from_pretrained("a/b", cache_dir=hub, local_files_only=True).vae is not None
    without = OpenSoraPipeline.from_pretrained(tmp_path, vae=None, dtype=torch.bfloat16)
    assert without.vae is None and without.transformer.dtype == without.text_encoder.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="torch_dtype"):
        OpenSoraPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    embeds, mask = pipe.encode_prompt(words, clean_prompt=False)
    assert embeds.shape[:2] == mask.shape == (2, 7)
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "generator": seeds, "output_type": "pt"}
    assert torch.equal(pipe(num_inference_steps=2, **given, **CLIP).frames, frames)


def test_cleaned_prompts_are_encoded() -> None:
    pytest.importorskip("ftfy")
    pytest.importorskip("bs4")
    pipe = tiny_pipe()
    plain, clean = (
        pipe.encode_prompt(text, clean_prompt=cleaning, aesthetic_score=None)
        for text, cleaning in (("a red circle", False), ("<i>A</i> ((red))+circle", True))
    )
    assert all(map(torch.equal, plain, clean))


def test_a_part_of_a_module_that_is_not_imported_is_refused(tmp_path: Path) -> None:
    tiny_pipe().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"vae": ["antigravity", "VAE"]}))
    with pytest.raises(ValueError, match="is a antigravity.VAE; import antigravity before loading it"):
        OpenSoraPipeline.from_pretrained(tmp_path)


def test_models_that_are_offloaded_give_the_same_frames() -> None:
    pytest.importorskip("accelerate")
    pipe = tiny_pipe()
    call = {"prompt": "a circle", "clean_prompt": False, "latents": noise(1), "num_inference_steps": 2, **CLIP}
    plain = pipe(output_type="pt", **call).frames
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(pipe(output_type="pt", **call).frames, plain)


@torch.no_grad()
def test_a_transformer_whose_modules_are_offloaded_one_by_one_gives_the_same_also_under_pab() -> None:
    offload = pytest.importorskip("accelerate").cpu_offload
    plain, offloaded = one_layer(), one_layer()
    offload(offloaded, torch.device("cpu"))
    embeds, mask = prompts((5,)).values()
    sizes = {"fps": torch.tensor([24.0]), "height": torch.tensor([32.0]), "width": torch.tensor([40.0])}
    given = {"y": embeds[:, None], "mask": mask} | sizes
    for config in (PABConfig(), PABConfig.preset("pab246")):
        outputs = []
        for model in (plain, offloaded):
            pab.enable(model, config, num_steps=8)
            calls = [model(noise(1, seed=i), torch.tensor([900.0 - 100 * i]), **given) for i in range(8)]
            outputs.append(torch.stack(calls))
        assert torch.equal(*outputs)
    assert next(iter(pab.summary(offloaded).contexts.values()))["spatial"].reused > 0


# Callbacks


def test_a_callback_sees_every_step_and_may_change_latents() -> None:
    pipe, text, start = tiny_pipe(), prompts((5,)), noise(1)
    seen: list[tuple[int, float]] = []

    def zeroed(p: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert p is pipe and torch.equal(t, p.current_timestep) and p.num_timesteps == STEPS
        seen.append((step, float(t)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    assert not latents(pipe, latents=start, callback_on_step_end=zeroed, **text).any()
    assert [step for step, _ in seen] == list(range(STEPS))
    assert [t for _, t in seen] == pipe.scheduler.timesteps.tolist() and pipe.current_timestep is None


def test_a_callback_may_interrupt() -> None:
    pipe, text, start = tiny_pipe(), prompts((5,)), noise(1)
    states: list[Tensor] = []

    def stop(p: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        states.append(tensors["latents"])
        p._interrupt = step == 1
        return {}

    found = latents(pipe, latents=start, callback_on_step_end=stop, **text)
    assert len(states) == 2 and torch.equal(found, states[-1])
    assert not torch.equal(latents(pipe, latents=start, **text), found)
    clips = latents(pipe, latents=noise(1, 10), num_frames=34, num_clips=3, callback_on_step_end=stop, **text)
    assert len(states) == 4 and torch.equal(clips, states[-1]), "no clip of noise follows"


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": "a"}, "pass either prompt or prompt_embeds"),
        ({"frames": noise(), "frame_latents": noise()}, "pass either frames or frame_latents"),
        ({"frame_mask": [0, 1, 1, 1, 1]}, "pass them as frames or frame_latents"),
        ({"cfg": "both"}, "cfg must be one of batched, apart, got 'both'"),
        ({"output_type": "gif"}, "output_type must be one of pil, np, pt, latent, got 'gif'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"num_clips": 0}, "got num_clips=0 with 17 frames; 1, or with 34, 51, ... frames any number"),
        ({"num_clips": 2}, "got num_clips=2 with 17 frames; 1, or with 34, 51, ... frames any number"),
        ({"num_clips": 2, "num_frames": 38}, "got num_clips=2 with 38 frames"),  # its last chunk has 4 frames
        ({"height": 7}, "got 7 x 40 pixels; at least 8 x 8"),
        ({"generator": 3 * [torch.Generator()]}, "got 3 generators for 2 clips; one, or one for each"),
        ({"num_frames": 5}, "got 5 frames; supported are 1, an image, and 17 or more"),
        ({"latents": noise(1)}, r"latents have shape \[1, 4, 5, 4, 5\]; for this size it must be \[2, 4, 5, 4, 5\]"),
        ({"prompt_embeds": torch.zeros(2, 8, 24)}, r"shape \[2, 8, 24\]; \[B, L, 24\] with L up to 7"),
        ({"prompt_attention_mask": torch.ones(2, 6)}, r"mask has shape \[2, 6\]; \[2, 7\] is supported"),
        ({"frame_latents": noise(3)}, r"shape \[3, 4, 5, 4, 5\]; \[2 or 1, 4, t, 4, 5\] is supported"),
        ({"frame_latents": noise(2, 2), "frames_at": 4}, "2 given latent frames at 4 do not fit into a clip of 5"),
        ({"frame_latents": noise(), "frame_mask": [0, 2, 1, 1, 1]}, r"with numbers from 0 to 1 is supported"),
        ({"callback_on_step_end_tensor_inputs": ["t"]}, r"callbacks are given \['latents'\], got \['t'\]"),
    ],
)
def test_calls_that_do_not_fit_are_refused(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latents(tiny_pipe(), **prompts() | call)


def test_a_scheduler_that_would_shift_again_is_refused() -> None:
    pipe = tiny_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="the scheduler has shift 3.0, and Open-Sora's noise levels are shifted by"):
        latents(pipe, **prompts())


def test_parts_that_are_missing_are_named() -> None:
    pipe = OpenSoraPipeline(tiny_pipe().transformer)
    with pytest.raises(ValueError, match="this pipeline has no vae; pass it to the class"):
        pipe(**prompts())
    with pytest.raises(ValueError, match="has no text_encoder and tokenizer; pass them to the class or prompt_embeds"):
        pipe("a", output_type="latent")
