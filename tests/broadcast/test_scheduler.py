"""Following a scheduler: each `set_timesteps` begins, each `step` ends a step, and as many steps as there are
timesteps."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch

from pab_kernels.broadcast.scheduler import SchedulerWatch


class Listener:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.timesteps: list[int] = []

    def scheduler_begins(self, scheduler: Any) -> None:
        self.told.append("begin")
        self.timesteps.append(len(scheduler.timesteps))

    def scheduler_steps(self, scheduler: Any) -> None:
        self.told.append("step")

    def step_of(self, scheduler: Any) -> None:
        return None

    def scheduler_failed(self, scheduler: Any) -> None:
        self.told.append("failed")


class Scheduler:
    """The two methods that are followed."""

    def __init__(self) -> None:
        self.timesteps: list[int] = []

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        if num_inference_steps < 1:
            raise ValueError("no steps")
        self.timesteps = list(range(num_inference_steps, 0, -1))

    def step(self, output: int, timestep: int, *, eta: float = 0) -> int:
        if timestep not in self.timesteps:
            raise ValueError("no such timestep")
        return output - 1


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


def followed(scheduler: Any, listener: Listener) -> SchedulerWatch:
    watch = SchedulerWatch.of(scheduler)
    watch.add(listener)
    return watch


def test_a_listener_is_told_after_the_scheduler_has_done_its_part(scheduler: Scheduler) -> None:
    listener = Listener()
    followed(scheduler, listener)
    scheduler.set_timesteps(3, device="cpu")
    assert [scheduler.step(10, t) for t in (3, 2)] == [9, 9]
    scheduler.set_timesteps(num_inference_steps=5)
    assert listener.told == ["begin", "step", "step", "begin"]
    assert listener.timesteps == [3, 5]


def test_a_call_that_fails_begins_and_ends_nothing(scheduler: Scheduler) -> None:
    listener = Listener()
    followed(scheduler, listener)
    for call in (lambda: scheduler.set_timesteps(0), lambda: scheduler.step(1, 99)):
        with pytest.raises(ValueError, match="no "):
            call()
    assert listener.told == ["failed", "failed"]


def test_two_listeners_share_a_scheduler_and_leave_it_one_by_one(scheduler: Scheduler) -> None:
    first, second = Listener(), Listener()
    watch = followed(scheduler, first)
    assert followed(scheduler, second) is watch
    scheduler.set_timesteps(2)
    watch.remove(first)
    scheduler.step(1, 2)
    watch.remove(second)
    scheduler.step(1, 1)
    assert (first.told, second.told) == (["begin"], ["begin", "step"])
    assert vars(scheduler).keys() == {"timesteps"}


def test_two_schedulers_are_apart(scheduler: Scheduler) -> None:
    other, listeners = Scheduler(), [Listener(), Listener()]
    watches = [followed(s, listener) for s, listener in zip((scheduler, other), listeners, strict=True)]
    assert watches[0] is not watches[1]
    other.set_timesteps(2)
    assert [listener.told for listener in listeners] == [[], ["begin"]]


def test_a_listener_that_leaves_when_told_does_not_hide_the_news_from_the_next(scheduler: Scheduler) -> None:
    class Leaving(Listener):
        def scheduler_begins(self, scheduler: Any) -> None:
            super().scheduler_begins(scheduler)
            watch.remove(self)

    leaving, staying = Leaving(), Listener()
    watch = followed(scheduler, leaving)
    followed(scheduler, staying)
    scheduler.set_timesteps(2)
    scheduler.step(1, 2)
    assert (leaving.told, staying.told) == (["begin"], ["begin", "step"])


def test_methods_that_others_wrapped_since_stay_and_tell_nobody_after_the_last_listener_left(
    scheduler: Scheduler,
) -> None:
    listener, late = Listener(), Listener()
    watch = followed(scheduler, listener)
    inner = scheduler.step
    scheduler.step = wrapper = lambda *args: 2 * inner(*args)  # type: ignore[method-assign]
    scheduler.set_timesteps(2)
    assert scheduler.step(5, 2) == 8
    again = followed(scheduler, late)
    assert scheduler.step(5, 1) == 8
    assert (listener.told, late.told) == (["begin", "step", "step"], ["step"])
    watch.remove(listener)
    again.remove(late)
    assert scheduler.step(5, 1) == 8 and scheduler.step is wrapper
    assert (listener.told, late.told) == (["begin", "step", "step"], ["step"])


def test_a_deep_copy_is_a_plain_scheduler(scheduler: Scheduler) -> None:
    listener = Listener()
    watch = followed(scheduler, listener)
    other = copy.deepcopy(scheduler)
    other.set_timesteps(4)
    assert other.step(1, 4) == 0
    assert listener.told == [] and scheduler.timesteps == []
    assert followed(other, Listener()) is not watch


def test_signatures_are_those_of_the_scheduler(scheduler: Scheduler) -> None:
    before = [inspect.signature(m) for m in (scheduler.set_timesteps, scheduler.step)]
    watch = followed(scheduler, Listener())
    assert [inspect.signature(m) for m in (scheduler.set_timesteps, scheduler.step)] == before
    assert "eta" in inspect.signature(scheduler.step).parameters  # what pipelines ask for
    watch.remove(watch.listeners[0])
    assert [inspect.signature(m) for m in (scheduler.set_timesteps, scheduler.step)] == before


# The schedulers of diffusers

DIFFUSERS = [
    ("DDIMScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverSinglestepScheduler", {}),
    ("PNDMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("HeunDiscreteScheduler", {}),
    ("KDPM2DiscreteScheduler", {}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("UniPCMultistepScheduler", {}),
    ("DEISMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {}),
    ("FlowMatchHeunDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("CogVideoXDDIMScheduler", {}),
]


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers, with NumPy 2
@pytest.mark.parametrize(("name", "options"), DIFFUSERS, ids=str)
def test_diffusers_schedulers_take_as_many_steps_as_they_have_timesteps(name: str, options: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler, listener = getattr(diffusers, name)(**options), Listener()
    methods = set(vars(scheduler))
    watch = followed(scheduler, listener)
    assert "num_inference_steps" in inspect.signature(scheduler.set_timesteps).parameters
    for num_steps in (20, 12):  # a second generation with fewer steps
        listener.told.clear()
        scheduler.set_timesteps(num_steps)
        sample = torch.zeros(1, 1, 2, 2)
        for t in scheduler.timesteps:
            x = scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else sample
            sample = scheduler.step(x, t, sample).prev_sample
        assert listener.told == ["begin"] + ["step"] * len(scheduler.timesteps)
        assert listener.timesteps[-1] == len(scheduler.timesteps) >= num_steps
    watch.remove(listener)
    assert "step" not in vars(scheduler) and "set_timesteps" not in vars(scheduler)
    assert methods <= set(vars(scheduler))
