"""What each output does to the samples, against two recorded runs from one noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDPMScheduler

from pab_kernels.analysis.calibration.influence import Influence
from pab_kernels.analysis.calibration.recording import Recording, record
from pab_kernels.analysis.calibration.sampler import Clip
from tests.analysis.calibration.small_pipe import STEPS, pipe_of, run_of
from tests.broadcast.forecast_oracle import NOISY, SCHEDULERS

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers


@pytest.mark.parametrize("name", SCHEDULERS)
def test_samples_differ_by_what_the_outputs_before_them_do(name: str) -> None:
    pipes = [pipe_of(name) for _ in range(2)]
    a, b = (record(p, run_of(p, Clip(v, 3)), lambda: None) for p, v in zip(pipes, (0.5, -0.5), strict=True))
    outputs = (a.outputs - b.outputs).double().flatten(1)
    moved = torch.from_numpy(a.influence.of_output) @ outputs
    wanted = (a.samples - b.samples).double().flatten(1)
    assert wanted[-1].abs().max() > 0.1
    close = 2e-3 if name in NOISY else 1e-4  # an impulse is added to noise, in float32
    torch.testing.assert_close(moved, wanted, rtol=close, atol=close * float(wanted.abs().max()))
    assert a.influence.corrects is (name not in NOISY)
    assert torch.equal(a.samples[-1], a.result)


def test_a_run_is_recorded_step_by_step_and_the_scheduler_is_left_as_it_was() -> None:
    pipe = pipe_of("unipc")
    ticks: list[int] = []
    plain = run_of(pipe)()
    found = record(pipe, run_of(pipe), lambda: ticks.append(1))
    assert len(ticks) == found.num_steps == len(pipe.scheduler.timesteps) and found.begin == 0
    assert torch.equal(found.result, plain) and "step" not in vars(pipe.scheduler)
    assert len(found.samples) == found.num_steps + 1
    flat = torch.cat([found.outputs, found.samples[:-1]]).flatten(1)
    torch.testing.assert_close(found.gram(), flat @ flat.T / flat.shape[1])


def test_an_influence_is_read_as_it_was_written() -> None:
    pipe = pipe_of("flow heun")
    found = record(pipe, run_of(pipe), lambda: None).influence
    again = Influence.from_dict(found.to_dict())
    assert np.array_equal(again.of_output, found.of_output) and again.coordinates == found.coordinates
    assert (again.places, again.corrects) == (found.places, found.corrects)


def test_latents_that_a_pipeline_edits_are_known_not_to_be_corrected() -> None:
    pipe = pipe_of("ddim v")
    pipe.edit = lambda step, x: x.clone()
    assert not record(pipe, run_of(pipe), lambda: None).influence.corrects


def test_a_pipeline_that_does_not_step_its_scheduler_is_refused() -> None:
    pipe = pipe_of()
    with pytest.raises(ValueError, match="the pipeline did not step its DDIMScheduler"):
        record(pipe, lambda: torch.zeros(1), lambda: None)


def test_a_tensor_that_is_handed_from_step_to_step_is_handed_on() -> None:
    def run(value: float) -> Recording:
        pipe = pipe_of()
        pipe.scheduler = CogVideoXDPMScheduler(prediction_type="v_prediction", clip_sample=False)
        pipe.prompts = torch.full_like(pipe.prompts[0], value), pipe.prompts[1]

        @torch.no_grad()
        def sample() -> torch.Tensor:
            scheduler, x, old = pipe.scheduler, pipe.noise(), None
            scheduler.set_timesteps(STEPS)
            times, generator = scheduler.timesteps, torch.Generator().manual_seed(0)
            for i, t in enumerate(times):
                given = pipe.guided(x, t, i), old, t, times[i - 1] if i else None, x
                x, old = scheduler.step(*given, return_dict=False, generator=generator)
            return x

        return record(pipe, sample, lambda: None)

    a, b = run(0.5), run(-0.5)
    moved = torch.from_numpy(a.influence.of_output) @ (a.outputs - b.outputs).double().flatten(1)
    wanted = (a.samples - b.samples).double().flatten(1)
    torch.testing.assert_close(moved, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))
    assert not a.influence.corrects
