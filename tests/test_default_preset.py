"""What `pab.enable` does without a config: the model is skipped where that suits the schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, LCMScheduler
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.broadcaster import broadcaster_of
from tests.adapters.tiny_latte import noise, prompt, sample, tiny_latte, tiny_pipe

# diffusers' schedulers hand tensors to numpy in a way that numpy deprecates
pytestmark = [
    pytest.mark.usefixtures("no_flops"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

INPUTS = {"hidden_states": noise(), "timestep": torch.tensor([500]), "encoder_hidden_states": prompt()}


def test_the_default_skips_the_model_and_predicts_its_output_where_a_scheduler_is_followed() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe)
    sample(pipe, 14)
    summary = pab.summary(pipe)
    assert summary.plan is not None and summary.plan.config == PABConfig.preset("balanced")
    assert sum(kinds["model"].reused for kinds in summary.contexts.values()) > 0
    model = tiny_latte()
    pab.enable(model, num_steps=14)
    plan = pab.summary(model).plan
    assert plan is not None and plan.config == PABConfig.preset("balanced-line")
    pab.enable(model, timesteps=[900, 500])
    assert broadcaster_of(model).config == PABConfig.preset("balanced-line")  # type: ignore[union-attr]


def test_the_default_is_the_line_where_a_pipeline_steps_a_second_scheduler() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pipe.audio_scheduler = DDIMScheduler()
    pab.enable(pipe)
    assert broadcaster_of(pipe.transformer).config == PABConfig.preset("balanced-line")  # type: ignore[union-attr]
    pab.disable(pipe)
    with pytest.raises(ValueError, match="reuse='forecast' predicts .* also has audio_scheduler"):
        pab.enable(pipe, PABConfig.preset("balanced"))


@pytest.mark.parametrize("config", [None, PABConfig.preset("fast")], ids=["default", "preset"])
@pytest.mark.parametrize(
    ("scheduler", "steps", "why"),
    [(DDIMScheduler, 11, "below 12 outputs change too much"), (LCMScheduler, 14, "begins from new noise")],
)
def test_a_preset_leaves_a_model_alone_that_it_does_not_suit_and_says_so_once(
    scheduler: Any, steps: int, why: str, config: PABConfig | None, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny_pipe(scheduler())
    plain = sample(pipe, steps)
    pab.enable(pipe, config)
    for _ in range(2):
        assert torch.equal(sample(pipe, steps), plain)
    said = [record.message for record in caplog.records if "PAB leaves it alone" in record.message]
    assert len(said) == 1 and why in said[0]
    pab.enable(pipe, PABConfig(model=Broadcast(2, (0, 1), reuse="hold")))  # rules of one's own are obeyed
    assert not torch.equal(sample(pipe, steps), plain)


class Wrapped:
    """A scheduler by delegation: its class has no `step`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_the_default_leaves_a_wrapped_scheduler_alone() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    plain = sample(pipe, 14)
    pipe.scheduler = Wrapped(DDIMScheduler.from_config(pipe.scheduler.config))
    pab.enable(pipe)
    assert torch.equal(sample(pipe, 14), plain)


@torch.no_grad()
def test_a_request_on_the_model_of_a_pipeline_with_the_default_takes_the_line() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe)
    request = pab.generation(pipe.transformer, num_steps=14)
    with request:
        pipe.transformer(**INPUTS)
    plan = pab.summary(request).plan
    assert plan is not None and plan.config == PABConfig.preset("balanced-line")
    pab.enable(pipe.transformer, num_steps=14)
    assert broadcaster_of(pipe.transformer).config == PABConfig.preset("balanced")  # type: ignore[union-attr]


def test_a_pipeline_enabled_after_its_model_predicts_in_its_scheduler() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    pab.enable(pipe.transformer, num_steps=14)
    pab.enable(pipe)
    assert broadcaster_of(pipe.transformer).config == PABConfig.preset("balanced")  # type: ignore[union-attr]


def test_rules_that_a_user_wrote_are_obeyed_though_they_equal_those_of_a_preset() -> None:
    pipe = tiny_pipe(DDIMScheduler())
    plain = sample(pipe, 11)
    pab.enable(pipe, PABConfig.from_dict(PABConfig.preset("fast").to_dict()))
    assert not torch.equal(sample(pipe, 11), plain)


def test_heun_counts_steps_and_not_evaluations() -> None:
    pipe = tiny_pipe(HeunDiscreteScheduler())
    plain = sample(pipe, 9)
    pab.enable(pipe)
    assert torch.equal(sample(pipe, 9), plain)


@torch.no_grad()
def test_a_loop_that_steps_by_itself_is_computed_and_told(caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for enabled in (False, True):
        pipe = tiny_pipe(DDIMScheduler())
        if enabled:
            pab.enable(pipe)
        pipe.scheduler.set_timesteps(14)
        x = INPUTS["hidden_states"]
        for t in pipe.scheduler.timesteps:
            x = x - 0.1 * pipe.transformer(**INPUTS | {"hidden_states": x, "timestep": t[None]}).sample[:, : x.shape[1]]
        results.append(x)
    sample(pipe, 2)  # another run, with which the first one is over
    assert torch.equal(*results)
    assert any("nobody called its scheduler's step" in record.message for record in caplog.records)


class _WithAudio(nn.Module):
    """Returns video and audio."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_latte()
        self.config = self.inner.config

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]
        return out, out.mean((-2, -1))


@torch.no_grad()
def test_a_model_of_video_and_audio_is_computed_and_told(caplog: pytest.LogCaptureFixture) -> None:
    """Its pipeline steps the audio by a copy of the scheduler, which is not followed."""
    results = []
    for enabled in (False, True):
        pipe = tiny_pipe(DDIMScheduler(), _WithAudio())
        if enabled:
            pab.enable(pipe)
        pipe.scheduler.set_timesteps(14)
        x = INPUTS["hidden_states"]
        sound, of_sound = x.mean((-2, -1)), copy.deepcopy(pipe.scheduler)
        for t in pipe.scheduler.timesteps:
            video, audio = pipe.transformer(x, t[None], INPUTS["encoder_hidden_states"])
            x = pipe.scheduler.step(video[:, :4], t, x).prev_sample
            sound = of_sound.step(audio[:, :4], t, sound).prev_sample
        results += [x, sound]
    assert all(map(torch.equal, results[:2], results[2:]))
    assert any("the model returns several tensors" in record.message for record in caplog.records)


def test_a_preset_that_the_user_names_is_not_exchanged() -> None:
    model = tiny_latte()
    with pytest.raises(ValueError, match="no scheduler is followed here"):
        pab.enable(model, PABConfig.preset("balanced"), num_steps=14)


def test_the_line_is_left_alone_too_where_every_step_begins_from_new_noise() -> None:
    pipe = tiny_pipe(LCMScheduler())
    plain = sample(pipe, 14)
    pab.enable(pipe, PABConfig.preset("balanced-line"))
    assert torch.equal(sample(pipe, 14), plain)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "a tuple": lambda prev: (prev,),
    "a tensor": lambda prev: prev,
    "a dict": lambda prev: {"prev_sample": prev},
}


class Returning(DDIMScheduler):
    """Its steps return the sample in another form."""

    form: str

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return FORMS[self.form](super().step(model_output, timestep, sample).prev_sample)


@torch.no_grad()
def test_steps_may_return_a_tensor_or_a_dict() -> None:
    found = {}
    for form in FORMS:
        scheduler = Returning()
        scheduler.form = form
        pipe = tiny_pipe(scheduler)
        pab.enable(pipe, PABConfig.preset("balanced"))
        scheduler.set_timesteps(14)
        x = INPUTS["hidden_states"]
        for t in scheduler.timesteps:
            out = pipe.transformer(**INPUTS | {"hidden_states": x, "timestep": t[None]}).sample[:, : x.shape[1]]
            given = scheduler.step(out, t, x)
            x = given["prev_sample"] if isinstance(given, dict) else given[0] if isinstance(given, tuple) else given
        assert sum(kinds["model"].reused for kinds in pab.summary(pipe).contexts.values()) == 5
        found[form] = x
    assert torch.equal(found["a tensor"], found["a tuple"]) and torch.equal(found["a dict"], found["a tuple"])


@torch.no_grad()
def test_the_default_leaves_a_run_alone_that_enters_a_schedule_behind_its_window(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipe = tiny_pipe(DDIMScheduler())

    def late() -> Tensor:
        x = noise()
        pipe.scheduler.set_timesteps(140)
        for t in pipe.scheduler.timesteps[127:]:
            v = pipe.transformer(x, timestep=t[None], encoder_hidden_states=prompt()).sample[:, :4]
            x = pipe.scheduler.step(v, t, x, return_dict=False)[0]
        return x

    plain = late()
    pab.enable(pipe)
    assert torch.equal(late(), plain)
    assert "the preset would skip 0 of 13 steps, which gains less than 3%" in caplog.text
