from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("diffusers")

import pab_kernels as pab
from pab_kernels.analysis.pipelines import load_pipeline
from pab_kernels.analysis.quality.psnr_ssim import psnr
from pab_kernels.models.video import SCHEDULERS, Caption, VideoPipeline, load, parse
from pab_kernels.models.video.captions import VOCABULARY
from pab_kernels.models.video.network import FRAMES, SHIFT, SIZE
from pab_kernels.models.video.pipeline import make_scheduler, read_weights

# diffusers' schedulers hand tensors to numpy in a way that numpy 2.4 says is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a driver, close, slow", "a street"]


@pytest.fixture(scope="module")
def video() -> VideoPipeline:
    return load(device="cpu")


def test_the_pipeline_is_diffusers_own(video: VideoPipeline) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

    assert type(video.pipe) is WanPipeline and "__call__" not in vars(video.pipe)
    assert type(video.pipe.transformer) is WanTransformer3DModel
    assert type(video.pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    assert (video.pipe.vae_scale_factor_temporal, video.pipe.vae_scale_factor_spatial) == (4, 2)
    assert not any(p.requires_grad for p in video.pipe.transformer.parameters())


def test_the_shipped_weights_are_small_half_precision_and_say_their_training() -> None:
    weights = read_weights()
    assert all(t.dtype is torch.float16 and torch.isfinite(t).all() for t in weights.tensors.values())
    assert sum(t.nbytes for t in weights.tensors.values()) <= 8e6
    assert int(weights.training["steps"]) > 0


def test_clips_are_frames_in_zero_to_one_that_differ_in_time(video: VideoPipeline) -> None:
    clips = video.generate(PROMPTS, seeds=[0, 1], steps=8)
    assert clips.shape == (2, FRAMES, 3, SIZE, SIZE) and clips.dtype is torch.float32
    assert clips.min() >= 0 and clips.max() <= 1 and torch.isfinite(clips).all()
    steps_in_time = clips.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
    assert (steps_in_time > 1e-3).all() and (steps_in_time < clips.std()).all()


def test_the_same_seed_gives_the_same_clip_and_another_seed_another(video: VideoPipeline) -> None:
    first, again, other = (video.generate(PROMPTS[:1], seeds=[seed], steps=2) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.05)


def test_every_word_of_a_caption_matters(video: VideoPipeline) -> None:
    clips = [video.generate([p], [3], steps=4) for p in ("a driver", "a street", "a driver, close", "a driver, fast")]
    for one, other in itertools.combinations(clips, 2):
        assert not torch.allclose(one, other, atol=0.01)


def test_guidance_changes_a_clip_and_the_open_caption_is_its_own_negative(video: VideoPipeline) -> None:
    plain, guided = (video.generate(PROMPTS[:1], [2], steps=4, guidance=scale) for scale in (1.0, 3.0))
    assert not torch.allclose(plain, guided, atol=0.02)
    plain, guided = (video.generate([""], [2], steps=2, guidance=scale) for scale in (1.0, 3.0))
    assert torch.allclose(plain, guided, atol=1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_follows_the_sigmas_of_training(video: VideoPipeline, name: str) -> None:
    stock = video.pipe.scheduler
    steps: list[int] = []

    def callback(_pipe: object, i: int, _t: object, _tensors: object) -> dict[str, torch.Tensor]:
        steps.append(i)
        return {}

    try:
        video.pipe.scheduler = make_scheduler(name)
        clips = video.generate(PROMPTS[:1], seeds=[0], steps=4, callback=callback)
        sigmas, timesteps = video.pipe.scheduler.sigmas, video.pipe.scheduler.timesteps
        calls = video.schedule(4).num_steps
    finally:
        video.pipe.scheduler = stock
    assert torch.isfinite(clips).all() and clips.std() > 0.01
    assert steps == list(range(calls)) and calls == {"heun": 7}.get(name, 4)
    assert torch.allclose(timesteps.float() / 1000, sigmas[:-1].float(), atol=2e-3)  # some are whole numbers
    u = sigmas / (SHIFT - (SHIFT - 1) * sigmas)
    assert u[0] > 0.99 and sigmas[-1] == 0 and (sigmas.diff() <= 0).all()
    assert 0.3 < float(u[len(u) // 2]) < 0.6  # even steps of u; two of them end at 0.003 and not at 0


def test_a_bad_scheduler_and_missing_weights_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"video model has no scheduler 'ddim'; it has flow, heun, unipc, dpm\+\+"):
        load("ddim")
    with pytest.raises(FileNotFoundError, match="train_video_model.py --export pab_kernels/models/video"):
        load(weights=tmp_path / "absent.safetensors")


def test_captions_are_read_from_prompts() -> None:
    for words in itertools.product(*((None, *words) for words in VOCABULARY.values())):
        assert parse(str(Caption(*words))) == Caption(*words)
    with pytest.raises(ValueError, match="the video model does not know the word 'dog'; it knows scene: driver,"):
        parse("a dog, close")
    with pytest.raises(ValueError, match="two words for view, 'wide' and 'close'"):
        parse("a wide street, close")


def test_the_pipeline_reads_prompts_in_words_and_goes_through_a_folder(video: VideoPipeline, tmp_path) -> None:
    video.pipe.save_pretrained(tmp_path)
    saved = load_pipeline(tmp_path, device="cpu", dtype=torch.float32)
    saved.set_progress_bar_config(disable=True)
    expected = video.generate(PROMPTS[:1], [4], steps=2)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", **video.size}
    for pipe in (video.pipe, saved):
        noise = torch.Generator().manual_seed(4)
        clip = pipe(PROMPTS[0], max_sequence_length=len(VOCABULARY), generator=noise, **options).frames
        assert torch.allclose(clip, expected, atol=1e-5)


def test_skipping_the_model_stays_close_to_the_full_run(video: VideoPipeline) -> None:
    full = video.generate(PROMPTS, [0, 1], steps=16)
    fewer = video.generate(PROMPTS, [0, 1], steps=11)
    pab.enable(video.pipe, pab.PABConfig.preset("balanced"))
    try:
        skipped, found = video.generate(PROMPTS, [0, 1], steps=16), pab.summary(video.pipe)
    finally:
        pab.disable(video.pipe)
    assert found.share <= 11 / 16
    for clip, shorter, whole in zip(skipped, fewer, full, strict=True):
        decibels, against = (psnr(float((other - whole).square().mean())) for other in (clip, shorter))
        assert decibels > against + 5 > 35  # 52 and 40 dB
