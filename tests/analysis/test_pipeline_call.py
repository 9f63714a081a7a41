"""How a wish becomes the arguments of a pipeline, how its steps are told, and what counts as frames."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from pab_kernels.analysis.pipeline_call import Wish, arguments, call, frames_of

IMAGE = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10  # [height, width, channels]
FLOATS = IMAGE.astype(np.float32) / 255
CHANNELS_FIRST = torch.from_numpy(FLOATS).movedim(-1, 0)


class Video:
    """A pipeline whose scheduler takes `actual` steps, whatever is asked for."""

    def __init__(self, actual: int = 3) -> None:
        self.actual = actual
        self.got: dict[str, Any] = {}

    def __call__(
        self,
        prompt: str,
        negative_prompt: str = "",
        num_inference_steps: int = 3,
        guidance_scale: float = 7.0,
        num_frames: int = 9,
        height: int = 8,
        width: int = 8,
        generator: Any = None,
        output_type: str = "pil",
        callback_on_step_end: Any = None,
    ) -> Any:
        self.got = {name: value for name, value in locals().items() if name != "self"}
        self.num_timesteps = self.actual
        for i in range(self.actual if callback_on_step_end else 0):
            assert callback_on_step_end(self, i, 1000 - i, {}) == {}
        return SimpleNamespace(frames=torch.rand(1, 2, 3, height, width, generator=generator))


class Older:
    """A pipeline with the older callback and few options."""

    def __call__(self, prompt: str, num_inference_steps: int = 2, callback: Any = None, callback_steps: int = 5) -> Any:
        assert callback_steps == 1
        for i in range(num_inference_steps):
            callback(i, 0, None)
        return SimpleNamespace(images=[Image.fromarray(IMAGE)])


def test_only_what_is_wished_for_is_asked_for() -> None:
    pipe = Video()
    assert arguments(pipe, Wish("a")) == {"prompt": "a", "output_type": "pt"}
    whole = Wish("a", "b", 5, 0.0, (4, 16, 32), 7)
    asked = {"prompt": "a", "negative_prompt": "b", "num_inference_steps": 5, "guidance_scale": 0.0}
    size = {"num_frames": 4, "height": 16, "width": 32}
    assert arguments(pipe, whole) == asked | size | {"output_type": "pt"}
    further = Wish("a", steps=5, further={"output_type": "np", "num_inference_steps": 6})
    assert arguments(pipe, further) == {"prompt": "a", "num_inference_steps": 6, "output_type": "np"}
    assert arguments(pipe, Wish("a", size=(16, 32))) == {"prompt": "a", "height": 16, "width": 32, "output_type": "pt"}
    call(pipe, whole)
    assert pipe.got | {"generator": None} == asked | size | {
        "output_type": "pt",
        "generator": None,
        "callback_on_step_end": None,
    }


def test_frames_are_counted_by_the_pipeline_s_own_name() -> None:
    class Latte:
        def __call__(self, prompt: str, video_length: int = 16, height: int = 8, width: int = 8) -> None: ...

    assert arguments(Latte(), Wish("a", size=(4, 16, 32))) == {
        "prompt": "a",
        "video_length": 4,
        "height": 16,
        "width": 32,
    }


def test_a_model_of_a_fixed_number_of_frames_is_asked_for_those_that_it_was_trained_with() -> None:
    class Latte:
        transformer = SimpleNamespace(config=SimpleNamespace(video_length=8, sample_size=4))
        vae_scale_factor = 8

        def __call__(self, prompt: str, video_length: int = 16, height: int = 512, width: int = 512) -> None: ...

    assert arguments(Latte(), Wish("a")) == {"prompt": "a", "video_length": 8, "height": 32, "width": 32}
    assert arguments(Latte(), Wish("a", size=(16, 64))) == {"prompt": "a", "height": 16, "width": 64}


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        (Wish("a", negative_prompt="b"), "negative_prompt"),
        (Wish("a", guidance=1.0), "guidance_scale"),
        (Wish("a", size=(8, 8)), "height"),
        (Wish("a", size=(3, 8, 8)), "num_frames"),
        (Wish("a", further={"image": "b.png"}), "image"),
    ],
)
def test_what_the_pipeline_does_not_take_is_refused(wish: Wish, name: str) -> None:
    with pytest.raises(ValueError, match=f"Older takes no {name}; leave it out"):
        arguments(Older(), wish)


def test_the_seed_makes_the_noise() -> None:
    first, again, other = (call(Video(), Wish("a", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_steps_are_told_with_their_number() -> None:
    seen: list[tuple[int, int | None]] = []
    call(Video(actual=5), Wish("a", steps=3), lambda *step: seen.append(step))  # a second-order scheduler takes more
    assert seen == [(1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]
    seen.clear()
    call(Older(), Wish("a"), lambda *step: seen.append(step))
    assert seen == [(1, 2), (2, 2)]


def test_a_pipeline_without_a_callback_runs_all_the_same() -> None:
    class Silent:
        def __call__(self, prompt: str) -> Any:
            return SimpleNamespace(images=FLOATS[None])

    assert call(Silent(), Wish("a"), lambda *step: pytest.fail("no step")).shape == (1, 3, 2, 3)


@pytest.mark.parametrize(
    ("output", "count"),
    [
        (SimpleNamespace(frames=CHANNELS_FIRST.expand(2, 4, -1, -1, -1)), 4),  # tensors [batch, frames, ...]
        (SimpleNamespace(images=CHANNELS_FIRST.expand(2, -1, -1, -1)), 1),
        (SimpleNamespace(frames=np.stack([np.stack([FLOATS] * 4)] * 2)), 4),
        (SimpleNamespace(images=FLOATS[None]), 1),
        (SimpleNamespace(frames=[[Image.fromarray(IMAGE)] * 4]), 4),
        (SimpleNamespace(images=[Image.fromarray(IMAGE)]), 1),
        (SimpleNamespace(frames=None, images=[CHANNELS_FIRST.bfloat16()]), 1),
    ],
)
def test_frames_and_images_of_any_form_are_read(output: Any, count: int) -> None:
    frames = frames_of(output)
    assert frames.dtype == torch.float32 and frames.shape == (count, 3, 2, 3)
    assert all((frame - CHANNELS_FIRST).abs().max() < 2**-8 for frame in frames)


@pytest.mark.parametrize("output", [SimpleNamespace(audios=[1]), SimpleNamespace(images=[]), (1, 2), None])
def test_an_output_without_pictures_is_refused(output: Any) -> None:
    with pytest.raises(ValueError, match="which has neither frames nor images"):
        frames_of(output)


@pytest.mark.parametrize("error", [TypeError, RuntimeError, ValueError, torch.OutOfMemoryError, NotImplementedError])
def test_a_pipeline_that_fails_does_so_in_one_line(error: type[Exception]) -> None:
    class Failing:
        def __call__(self, prompt: str) -> Any:
            raise error("set_timesteps() got an unexpected argument\nand a long story")

    with pytest.raises(ValueError) as info:
        call(Failing(), Wish("a"))
    assert str(info.value) == "Failing failed: set_timesteps() got an unexpected argument" and isinstance(
        info.value.__cause__, error
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_that_is_not_finite_is_refused(value: float) -> None:
    class Overflowing:
        def __call__(self, prompt: str) -> Any:
            return SimpleNamespace(images=torch.full((1, 3, 2, 2), value))

    with pytest.raises(ValueError, match="the output of Overflowing is not finite; try dtype bfloat16 or float32"):
        call(Overflowing(), Wish("a"))
