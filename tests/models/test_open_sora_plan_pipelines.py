"""Open-Sora-Plan from a prompt to a video, at a small size, from folders as the hub has them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import pab_kernels as pab
from pab_kernels import PABConfig
from pab_kernels.analysis.pipeline_call import Wish, call
from pab_kernels.analysis.pipelines import load_pipeline
from pab_kernels.models.open_sora_plan.pipelines import (
    OpenSoraPlan11Pipeline,
    OpenSoraPlan12Pipeline,
    latent_frames,
)
from pab_kernels.models.open_sora_plan.transformers import build
from pab_kernels.models.published_pipelines import load
from tests.models.open_sora_plan_oracle import LATTE, PLAN_12, latte, plan_12
from tests.models.tiny_checkpoints import save

pytestmark = [
    pytest.mark.usefixtures("no_flops"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers' schedulers
]

FIRST, SECOND = "open-sora-plan-1.1", "open-sora-plan-1.2"
STEPS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save(name, tmp_path_factory.mktemp("hub")) for name in (FIRST, SECOND)}


@pytest.mark.parametrize(("model", "frames"), [(FIRST, 17), (SECOND, 9)])
def test_a_prompt_becomes_a_clip_under_pab_and_without(folders: dict[str, Path], model: str, frames: int) -> None:
    pipe = load(model, folders[model], local_files_only=True)
    assert isinstance(pipe, OpenSoraPlan11Pipeline if model == FIRST else OpenSoraPlan12Pipeline)
    pipe.set_progress_bar_config(disable=True)
    further = {"clean_caption": False}
    wish = Wish("a red circle moves right", steps=STEPS, size=(frames, 32, 48), seed=1, further=further)
    plain = call(pipe, wish)
    assert plain.shape == (frames, 3, 32, 48) and float(plain.std()) > 0
    pab.enable(pipe, PABConfig.preset("pab246"))
    other = call(pipe, wish)
    reused = {kind: t.reused for kind, t in next(iter(pab.summary(pipe).contexts.values())).items()}
    assert reused["spatial"] > 0 and reused["cross"] > 0 and not torch.equal(other, plain)
    pab.enable(pipe, PABConfig(1, 1, 1))
    assert torch.equal(call(pipe, wish), plain)
    pab.disable(pipe)
    assert torch.equal(call(pipe, wish), plain)


def test_the_first_version_cuts_text_to_the_tokens_of_one_prompt(folders: dict[str, Path]) -> None:
    pipe: Any = load(FIRST, folders[FIRST], dtype=torch.float64, local_files_only=True)
    one, negative = pipe.encode_prompt("a red circle", negative_prompt="right")
    assert one.shape == negative.shape == (1, 3, 16)
    ids = torch.tensor([[3, 4, 5] + 297 * [0]])
    assert torch.allclose(one, pipe.text_encoder(ids, attention_mask=(ids > 0).long())[0][:, :3])
    both, _ = pipe.encode_prompt(["a red circle", "right"], num_images_per_prompt=2)
    assert both.shape == (4, 300, 16) and torch.equal(both[0, :3], one[0]) and torch.equal(both[0], both[1])
    assert not both[0, 3:].any() and not both[2, 1:].any(), "several keep 300 tokens, those without text are zeros"


def euler(denoise: Any, x: Tensor, scheduler: Any) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("model", [FIRST, SECOND])
def test_latents_are_those_of_the_loop_written_out(folders: dict[str, Path], model: str) -> None:
    """Negative prompt first, guidance, and the first four channels of a model that predicts a variance too."""
    pipe: Any = load(model, folders[model], dtype=torch.float64, local_files_only=True)
    pipe.scheduler = DDIMScheduler()
    pipe.set_progress_bar_config(disable=True)
    weights = {name: p.double() for name, p in pipe.transformer.state_dict().items()}
    frames = 5 if model == FIRST else 3
    x = torch.randn(1, 4, frames, 4, 6, generator=torch.Generator().manual_seed(2)).double()
    given = {"num_frames": 4 * frames - 3, "height": 32, "width": 48, "latents": x, "num_inference_steps": STEPS}
    found = pipe(
        "a red circle", negative_prompt="right", output_type="latent", guidance_scale=3.0, clean_caption=False, **given
    ).frames
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(STEPS)
    length = 3 if model == FIRST else 512
    ids = torch.zeros(2, 300 if model == FIRST else 512, dtype=torch.int64)
    ids[0, 0], ids[1, :3] = 7, torch.tensor([3, 4, 5])
    mask = (ids > 0).long()
    text = pipe.text_encoder(ids, attention_mask=mask)[0][:, :length]
    config = LATTE if model == FIRST else PLAN_12

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        both, times = torch.cat([x, x]), t.expand(2)
        if model == FIRST:
            v = latte(weights, config, both, times, text)[:, :4]
        else:
            v = plan_12(weights, config, both, times, text, mask)
        return v[:1] + 3.0 * (v[1:] - v[:1])

    assert torch.allclose(found, euler(denoise, x, scheduler), atol=1e-3)


def test_a_saved_pipeline_keeps_the_positions_of_its_frames(folders: dict[str, Path], tmp_path: Path) -> None:
    """s is 3 for 56 frames, and diffusers, which has 1, does not save them."""
    pipe: Any = load(FIRST, folders[FIRST], local_files_only=True)
    pipe.transformer = build(LATTE | {"video_length": 56})
    pipe.save_pretrained(tmp_path)
    again: Any = load_pipeline(tmp_path, device="cpu")
    assert type(again) is OpenSoraPlan11Pipeline
    assert float(again.transformer.temp_pos_embed[0, 3, 0]) == pytest.approx(math.sin(3 / 3))
    assert torch.equal(again.transformer.temp_pos_embed, pipe.transformer.temp_pos_embed)


def test_a_saved_pipeline_of_the_second_version_is_loaded(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = load(SECOND, folders[SECOND], local_files_only=True)
    pipe.save_pretrained(tmp_path)
    assert type(load_pipeline(tmp_path, device="cpu")) is OpenSoraPlan12Pipeline


def test_frames_that_do_not_fit_are_refused(folders: dict[str, Path]) -> None:
    assert [latent_frames(n) for n in (1, 29, 65, 93, 221)] == [1, 8, 17, 24, 56]
    pipe: Any = load(FIRST, folders[FIRST], local_files_only=True)
    with pytest.raises(ValueError, match="this model was trained for 17 frames, and has positions for them; got 29"):
        pipe("a red circle", num_frames=29)
    with pytest.raises(ValueError, match="1 more than a multiple of 4, got 30; such as 29"):
        pipe("a red circle", num_frames=30)
