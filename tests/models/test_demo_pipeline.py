from __future__ import annotations

import json
import struct

import pytest
import torch

pytest.importorskip("diffusers")

from pab_kernels.models.demo import check, shapes
from pab_kernels.models.demo.pipeline import SCHEDULERS, DemoPipeline, load, make_scheduler, read_weights

# diffusers' schedulers hand tensors to numpy in a way that numpy 2.4 says is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red circle moves right at night", "a white bar"]


@pytest.fixture(scope="module")
def demo() -> DemoPipeline:
    return load(device="cpu")


def test_the_pipeline_is_diffusers_own(demo: DemoPipeline):
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    assert type(demo.pipe) is LattePipeline and "__call__" not in vars(demo.pipe)
    assert type(demo.pipe.transformer) is LatteTransformer3DModel and type(demo.pipe.scheduler) is DDIMScheduler
    assert demo.pipe.vae_scale_factor == 1 and demo.pipe.device == torch.device("cpu")
    assert not any(p.requires_grad for p in demo.pipe.transformer.parameters())


def test_the_shipped_weights_are_small_half_precision_and_say_their_training():
    weights = read_weights()
    assert all(t.dtype is torch.float16 and torch.isfinite(t).all() for t in weights.tensors.values())
    assert sum(t.nbytes for t in weights.tensors.values()) <= 8e6
    assert int(weights.training["steps"]) > 0
    assert len(weights.sha256) == 64


def test_clips_are_frames_in_zero_to_one(demo: DemoPipeline):
    clips = demo.generate(PROMPTS, seeds=[0, 1], steps=1)
    assert clips.shape == (2, shapes.FRAMES, 3, shapes.SIZE, shapes.SIZE) and clips.dtype is torch.float32
    assert clips.min() >= 0 and clips.max() <= 1 and torch.isfinite(clips).all()


def test_the_same_seed_gives_the_same_clip_and_another_seed_another(demo: DemoPipeline):
    first, again, other = (demo.generate(PROMPTS[:1], seeds=[seed], steps=2) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.05)


def test_a_clip_depends_on_its_own_seed_and_not_on_its_neighbours(demo: DemoPipeline):
    together = demo.generate(PROMPTS, seeds=[7, 8], steps=2)
    alone = demo.generate(PROMPTS[1:], seeds=[8], steps=2)
    assert torch.allclose(together[1], alone[0], atol=1e-3)


def test_a_shorter_caption_is_guided_against_the_open_one(demo: DemoPipeline):
    inputs = demo.inputs([shapes.Caption(colour="red"), shapes.Caption()], [0, 1])
    cond, negative = inputs["prompt_embeds"], inputs["negative_prompt_embeds"]
    assert cond.shape == negative.shape == (2, len(shapes.VOCABULARY), 72)
    assert torch.equal(cond[1], negative[1]) and torch.equal(cond[0, 1:], negative[0, 1:])
    assert not torch.equal(cond[0, 0], negative[0, 0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_samples(demo: DemoPipeline, name: str):
    pipe = demo.pipe
    stock = pipe.scheduler
    steps: list[int] = []

    def callback(_pipe: object, i: int, _t: object, _tensors: object) -> dict[str, torch.Tensor]:
        steps.append(i)
        return {}

    try:
        pipe.scheduler = make_scheduler(name)
        assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.beta_end == 0.02
        assert pipe.scheduler.config.timestep_spacing == ("leading" if name == "ddim" else "trailing")
        clips = demo.generate(PROMPTS[:1], seeds=[0], steps=3, callback=callback)
        calls = demo.schedule(3).num_steps
    finally:
        pipe.scheduler = stock
    assert torch.isfinite(clips).all() and clips.std() > 0.01
    assert steps == list(range(calls)) and calls == {"heun": 5, "pndm": 4}.get(name, 3)


def test_an_unknown_scheduler_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no scheduler 'magic'; it has ddim, dpm\+\+, pndm, heun, euler, unipc"):
        load("magic")


def test_bad_arguments_are_refused(demo: DemoPipeline):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        demo.generate(PROMPTS, seeds=[0, 1], steps=0)
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        demo.generate(PROMPTS, seeds=[0])
    with pytest.raises(ValueError, match="'dog'"):
        demo.generate(["a red dog"], seeds=[0])


def test_missing_weights_say_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_demo_model.py --export"):
        load(weights=tmp_path / "absent.safetensors")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"the demo model needs the package diffusers.*pip install 'pab-kernels\[demo\]'"
    ):
        load()


def test_weights_of_another_file_are_read_with_their_own_sha(tmp_path):
    from safetensors.torch import save_file

    shipped = read_weights()
    save_file(shipped.tensors, tmp_path / "other.safetensors", metadata={"steps": "1"})
    other = read_weights(tmp_path / "other.safetensors")
    assert other.sha256 != shipped.sha256 and other.training["steps"] == "1"
    raw = (tmp_path / "other.safetensors").read_bytes()
    assert json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])["__metadata__"] == {"steps": "1"}


def test_the_shipped_weights_follow_words(demo: DemoPipeline):
    captions = shapes.held_out()[:4]
    report = check.check_model(demo, captions, steps=12)
    assert report.share >= 0.9


def test_the_pipeline_reads_prompts_in_words_and_goes_through_a_folder(demo: DemoPipeline, tmp_path):
    from diffusers import LattePipeline

    demo.pipe.save_pretrained(tmp_path)
    pipe = LattePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": shapes.SIZE, "width": shapes.SIZE, "video_length": shapes.FRAMES}
    prompt, options = (
        "a red circle moves up",
        {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt", **size},
    )
    expected = demo.generate([prompt], [4], steps=2)
    for drawing in (demo.pipe, pipe):
        assert torch.equal(drawing(prompt, generator=torch.Generator().manual_seed(4), **options).frames, expected)
    with pytest.raises(ValueError, match="does not know the word 'dog'"):
        pipe("a red dog", **options)
