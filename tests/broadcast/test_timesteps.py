"""Where a run enters its schedule, and which step a call is at, told by the timestep wherever it is and whatever is
made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler, HeunDiscreteScheduler
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels.broadcast import timesteps
from pab_kernels.broadcast.timesteps import Moment, Timesteps
from tests.broadcast.toy import CONFIG, TOKENS, Pipe, Wrapper, noise, toy

TABLE = torch.tensor([999.0, 875.0, 750.0, 750.0, 2.0])


def host() -> Timesteps:
    return Timesteps(TABLE.tolist(), TABLE)


# What is known of a timestep


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (875, Moment(875.0)),
        (0.5, Moment(0.5)),
        (torch.tensor(875), Moment(875.0, torch.int64)),
        (torch.tensor([875.0, 875.0]), Moment(875.0, torch.float32)),
        (torch.tensor([0.0, 875.0]), Moment(875.0, torch.float32, single=False)),
        (torch.tensor([[0.0, 0.0, 3.0]]), Moment(3.0, torch.float32, single=False)),
        (torch.tensor(875.0, dtype=torch.bfloat16), Moment(876.0, torch.bfloat16)),
        (torch.tensor(875.0).expand(4), Moment(875.0, torch.float32)),
        (torch.empty(0), None),
        (torch.empty(1, device="meta"), None),
        (None, None),
        ("soon", None),
    ],
)
def test_the_largest_element_is_the_moment(timestep: Any, expected: Moment | None) -> None:
    assert host().moment(timestep) == expected


def test_a_view_of_the_schedule_is_known_without_reading_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timesteps, "_on_host", lambda t: False)
    monkeypatch.setattr(Tensor, "item", lambda t: pytest.fail("it was read"))
    for i, t in enumerate(TABLE):
        for view in (t, t[None], t.expand(3), TABLE[i : i + 1]):
            assert host().moment(view) == Moment(float(TABLE.tolist()[i]), torch.float32, own=True)
    for other in (TABLE[0] + 0, TABLE[:2], TABLE.clone()[0], TABLE.view(torch.int32)[0]):
        assert host().moment(other) is None


def test_a_run_is_entered_where_its_timestep_or_a_thousandth_of_it_is() -> None:
    times = Timesteps([1000.0, 700.0, 400.0, 1.0])
    assert times.recognise(Moment(700.0)) == [1] and times.at(1, Moment(700.0))
    assert times.recognise(Moment(0.7)) == [1] and times.at(2, Moment(0.4)) and not times.at(2, Moment(400.0))
    assert times.recognise(Moment(1.0)) == [0], "a thousandth of the first, not the last itself"
    assert times.recognise(Moment(float(torch.tensor(0.4)), torch.float32)) == [2]
    assert times.recognise(Moment(0.123)) == [] and times.recognise(None) == []
    assert host().recognise(Moment(750.0)) == [2, 3]


# Entering a schedule in the middle


def peft(model: nn.Module) -> nn.Module:
    library = pytest.importorskip("peft")
    return library.get_peft_model(model, library.LoraConfig(target_modules=["to_q"])).requires_grad_(False)


def by_keyword(model: nn.Module, x: Tensor, t: Any, text: Tensor) -> Tensor:
    return model(hidden_states=x, timestep=t, encoder_hidden_states=text)


def by_position(model: nn.Module, x: Tensor, t: Any, text: Tensor) -> Tensor:
    return model(x, t, text)


def of_rows(t: Tensor) -> Tensor:
    return t.expand(1)


def of_tokens(t: Tensor) -> Tensor:
    """The first tokens are given, and clean."""
    return torch.cat([torch.zeros(1, 2), t.expand(1, TOKENS - 2)], 1)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, CogVideoXDDIMScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("timestep", [of_rows, of_tokens])
@pytest.mark.parametrize("call", [by_keyword, by_position])
@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, peft], ids=["bare", "a wrapper", "peft"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_run_entered_in_the_middle_is_known_through_wrappers(
    wrap: Any, call: Any, timestep: Any, scheduler: Any
) -> None:
    pipe = Pipe(wrap(toy()), scheduler())
    pab.enable(pipe, CONFIG)
    pipe.scheduler.set_timesteps(8)
    times, x = pipe.scheduler.timesteps[4:], noise(0)
    with torch.no_grad():
        for t in times:
            out = call(pipe.transformer, x, timestep(t), pipe.prompt)
            x = (
                pipe.scheduler.step(out, t, x)[0]
                if scheduler is not HeunDiscreteScheduler
                else pipe.scheduler.step(out, t, x).prev_sample
            )
    summary = pab.summary(pipe)
    assert summary.plan is not None and summary.plan.schedule.begin == 4 and len(summary.plan.steps) == len(times)
    assert summary.forced == 0 and summary.cache_bytes == 0


def test_a_timestep_that_is_nowhere_in_the_schedule_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pipe = Pipe(toy(), DDIMScheduler())
    pab.enable(pipe, CONFIG)
    for _ in range(2):
        pipe.scheduler.set_timesteps(8)
        with torch.no_grad():
            pipe.transformer(noise(0), torch.tensor([0.123]), pipe.prompt)
    said = [r.getMessage() for r in caplog.records if "enters the schedule" in r.getMessage()]
    assert len(said) == 1 and "call scheduler.set_begin_index" in said[0]
    plan = pab.summary(pipe).plan
    assert plan is not None and plan.schedule.begin == 0


@pytest.mark.parametrize("call", [by_keyword, by_position])
def test_a_schedule_is_entered_at_its_begin_index_whatever_the_model_is_called_with(call: Callable[..., Any]) -> None:
    pipe = Pipe(toy())
    pab.enable(pipe, CONFIG)
    pipe.scheduler.set_timesteps(8)
    pipe.scheduler.set_begin_index(3)
    with torch.no_grad():
        call(pipe.transformer, noise(0), torch.tensor([0.123]), pipe.prompt)
    plan = pab.summary(pipe).plan
    assert plan is not None and plan.schedule.begin == 3
