"""Kind `model` with a forecast, on diffusers' schedulers, against its equations written out in float64.

The oracle finds alpha and sigma from the scheduler's own `add_noise`, goes back by deep copies of the scheduler and of
the noise generator, and knows nothing of the package's snapshots and tables.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

import pab_kernels as pab
from pab_kernels import Broadcast, PABConfig
from pab_kernels.broadcast.coordinates import solver

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers

STEPS = 12
AT = (0, 1, 2, 4, 7, 8, 11)
"""Steps that are computed; of schedulers of second order there are more."""
SHAPE = (2, 3, 4, 4)

TRAINED = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing"}


def trained(name: str, prediction: str = "epsilon", **config: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(prediction_type=prediction, **{**TRAINED, **config})


def flow(name: str, **config: Any) -> Callable[[], Any]:
    return lambda: getattr(diffusers, name)(**config)


SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim epsilon": trained("DDIMScheduler", clip_sample=False),
    "ddim v": trained("DDIMScheduler", "v_prediction", clip_sample=False),
    "ddim sample": trained("DDIMScheduler", "sample", clip_sample=False),
    "ddpm": trained("DDPMScheduler", clip_sample=False),
    "dpm++ 1": trained("DPMSolverMultistepScheduler", solver_order=1),
    "dpm++ 2 v": trained("DPMSolverMultistepScheduler", "v_prediction"),
    "dpm++ 3": trained("DPMSolverMultistepScheduler", solver_order=3),
    "dpm++ sde": trained("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    "dpm++ single": lambda: diffusers.DPMSolverSinglestepScheduler(beta_start=1e-4, beta_end=0.02),
    "dpm++ flow": trained(
        "DPMSolverMultistepScheduler", "flow_prediction", use_flow_sigmas=True, timestep_spacing="linspace"
    ),
    "unipc": trained("UniPCMultistepScheduler"),
    "unipc flow": trained(
        "UniPCMultistepScheduler", "flow_prediction", use_flow_sigmas=True, flow_shift=3.0, timestep_spacing="linspace"
    ),
    "deis": trained("DEISMultistepScheduler"),
    "euler": trained("EulerDiscreteScheduler"),
    "euler v": trained("EulerDiscreteScheduler", "v_prediction"),
    "euler ancestral": trained("EulerAncestralDiscreteScheduler"),
    "heun": trained("HeunDiscreteScheduler"),
    "lms": trained("LMSDiscreteScheduler"),
    "pndm": trained("PNDMScheduler", skip_prk_steps=True),
    "flow euler": flow("FlowMatchEulerDiscreteScheduler", shift=3.0),
    "flow heun": flow("FlowMatchHeunDiscreteScheduler"),
}

NOISY = ("ddpm", "dpm++ sde", "euler ancestral")
"""Whose steps draw noise: the data is extrapolated, and latents are not corrected."""


class Denoiser(nn.Module):
    """A curved function of the sample, the timestep and the prompt, `[B, C, H, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(SHAPE[-1], 1, batch_first=True)
        self.calls = 0

    def forward(self, hidden_states: Tensor, timestep: Tensor, prompt: Tensor) -> Tensor:
        self.calls += 1
        t = timestep.to(hidden_states) / 1000
        x = torch.tanh(hidden_states / 3 + prompt) + 0.3 * torch.sin(3 * t)
        mixed, _ = self.attn(*3 * (x.flatten(1, 2),), need_weights=False)
        return x + mixed.view_as(x)


class Pipe:
    """A loop with guidance, batched or apart, in float64; noise is drawn by a generator."""

    def __init__(self, scheduler: Any, guidance: str = "apart") -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.transformer = Denoiser().double().eval().requires_grad_(False)
        self.scheduler, self.guidance = scheduler, guidance
        self.prompts = torch.full(SHAPE[1:], 0.5).double(), torch.zeros(SHAPE[1:]).double()
        self.edit: Callable[[int, Tensor], Tensor] = lambda step, x: x

    def guided(self, x: Tensor, t: Tensor, step: int) -> Tensor:
        scaled = self.scheduler.scale_model_input(x, t) if hasattr(self.scheduler, "scale_model_input") else x
        cond, uncond = self.prompts
        if self.guidance == "none" or (self.guidance == "interval" and not 3 <= step < 9):
            return self.transformer(scaled, t, cond)  # type: ignore[no-any-return]
        if self.guidance == "batched":
            prompts = torch.stack([uncond] * len(x) + [cond] * len(x))
            u, c = self.transformer(torch.cat([scaled, scaled]), t, prompts).chunk(2)
        else:
            u, c = self.transformer(scaled, t, uncond), self.transformer(scaled, t, cond)
        out = u + 2 * (c - u)
        if self.guidance == "rescaled":
            out = 0.7 * out * (c.std() / out.std()) + 0.3 * out
        return out  # type: ignore[no-any-return]

    def noise(self) -> Tensor:
        scale = float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).double() * scale

    def stochastic(self) -> dict[str, Any]:
        takes = "generator" in type(self.scheduler).step.__code__.co_varnames
        return {"generator": torch.Generator().manual_seed(2)} if takes else {}

    @torch.no_grad()
    def steps(self, count: int = STEPS) -> Iterator[Tensor]:
        self.scheduler.set_timesteps(count)
        x, extra = self.noise(), self.stochastic()
        for step, t in enumerate(self.scheduler.timesteps):
            x = self.edit(step, x)
            x = self.scheduler.step(self.guided(x, t, step), t, x, **extra, return_dict=False)[0]
            yield x

    def sample(self, count: int = STEPS) -> Tensor:
        *_, last = self.steps(count)
        return last


# The oracle


def level(scheduler: Any, t: Tensor) -> tuple[float, float]:
    """alpha and sigma at a timestep, from what the scheduler makes of ones."""
    one, zero = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    noised = copy.deepcopy(scheduler)
    for name in ("_step_index", "_begin_index"):
        if hasattr(noised, name):
            setattr(noised, name, None)
    add = noised.add_noise if hasattr(noised, "add_noise") else noised.scale_noise
    if add.__name__ == "scale_noise":
        return float(add(one, t[None], zero)), float(add(zero, t[None], one))
    return float(add(one, zero, t[None])), float(add(zero, one, t[None]))


def noise_in(scheduler: Any, x: Tensor, v: Tensor, alpha: float, sigma: float) -> Tensor:
    """The noise that an output says is in a sample."""
    kind = getattr(scheduler.config, "prediction_type", "flow_prediction")
    if kind == "epsilon":
        return v
    if kind == "sample":
        return (x - alpha * v) / sigma
    if kind == "flow_prediction":
        return x + alpha * v
    size = math.hypot(alpha, sigma)  # 1, but where the model's input is scaled
    return alpha / size * v + sigma / size * (x / size)


def output_of(scheduler: Any, x: Tensor, n: Tensor, alpha: float, sigma: float) -> Tensor:
    """The output that says so: `noise_in` is affine in it."""
    zero = torch.zeros_like(n)
    rest = noise_in(scheduler, x, zero, alpha, sigma)
    slope = noise_in(scheduler, x, zero + 1, alpha, sigma) - rest
    return (n - rest) / slope


class Point:
    def __init__(self, step: int, place: int, x: Tensor, v: Tensor, scheduler: Any, extra: dict[str, Any]) -> None:
        self.step, self.place, self.x, self.v = step, place, x, v
        self.scheduler = copy.deepcopy(scheduler)
        self.extra = copied(extra)


def copied(extra: dict[str, Any]) -> dict[str, Any]:
    return {name: g.clone_state() for name, g in extra.items()}


@torch.no_grad()
def written_out(pipe: Pipe, computed: set[int], corrects: bool = True, noisy: bool = False) -> Tensor:
    """The latents after the last step."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    x, extra = pipe.noise(), pipe.stochastic()
    times = list(scheduler.timesteps)
    levels = [level(scheduler, t) for t in times]
    places = [0]
    for before, now in zip(levels, levels[1:], strict=False):
        places.append(places[-1] + (before != now))
    points: list[Point] = []  # the newest last
    for step, t in enumerate(times):
        alpha, sigma = levels[step]
        if step not in computed:
            points_then = points[-2:]
            s = points_then[-1]
            v = s.v if len(points_then) == 1 else forecast(scheduler, points_then, levels, step, x, noisy)
            x = scheduler.step(v, t, x, **extra, return_dict=False)[0]
            continue
        v = pipe.guided(x, t, step)
        if points and corrects and step - points[-1].step > 1:
            s = points[-1]
            through = {p.place: p.v for p in points[-2:]} | {places[step]: v}
            again, x, extra = copy.deepcopy(s.scheduler), s.x, copied(s.extra)
            for k in range(s.step, step):
                v_k = s.v if k == s.step else lagrange(through, places[k])
                x = again.step(v_k, times[k], x, **extra, return_dict=False)[0]
            scheduler = pipe.scheduler = again
        point = Point(step, places[step], x, v, scheduler, extra)
        points = [*(p for p in points if p.place != point.place), point]
        x = scheduler.step(v, t, x, **extra, return_dict=False)[0]
    return x


def forecast(
    scheduler: Any, points: list[Point], levels: list[tuple[float, float]], step: int, x: Tensor, noisy: bool
) -> Tensor:
    p, s = points
    lam = [math.log(a / b) if a > 0 and b > 0 else math.nan for a, b in (levels[p.step], levels[s.step], levels[step])]
    if any(map(math.isnan, lam)):
        return lagrange({p.place: p.v, s.place: s.v}, s.place + step - s.step)
    n_p, n_s = (noise_in(scheduler, k.x, k.v, *levels[k.step]) for k in (p, s))
    w = (lam[2] - lam[1]) / (lam[1] - lam[0])
    n = n_s + w * (n_s - n_p)
    if noisy:
        data = [(k.x - levels[k.step][1] * n_k) / levels[k.step][0] for k, n_k in ((p, n_p), (s, n_s))]
        alpha, sigma = levels[step]
        n = (x - alpha * (data[1] + w * (data[1] - data[0]))) / sigma
    return output_of(scheduler, x, n, *levels[step])


def lagrange(through: dict[int, Tensor], place: int) -> Tensor:
    total: Any = 0
    for at, value in through.items():
        total = total + value * math.prod((place - other) / (at - other) for other in through if other != at)
    return total  # type: ignore[no-any-return]


# Against it

RULE = Broadcast(at=AT, unit="step", reuse="forecast")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_gives_what_the_equations_give(name: str) -> None:
    pipe = Pipe(SCHEDULERS[name]())
    plain = pipe.sample()
    count, calls = len(pipe.scheduler.timesteps), pipe.transformer.calls
    computed = (set(AT) | {STEPS + 1, count - 1}) & set(range(count))
    rule = Broadcast(at=sorted(computed), unit="step", reuse="forecast")
    wanted = written_out(Pipe(SCHEDULERS[name]()), computed, name not in NOISY, name in NOISY)
    pab.enable(pipe, PABConfig(model=rule))
    found = pipe.sample()
    assert pipe.transformer.calls - calls == 2 * len(computed)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=1e-4), "it would show nothing"
    assert torch.equal(pipe.sample(), found)
    pab.disable(pipe)
    assert torch.equal(pipe.sample(), plain)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_coordinates_are_those_of_the_schedulers_own_noise(name: str) -> None:
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(STEPS)
    found = solver(scheduler)
    assert found.exact is (name not in NOISY)
    x, v = torch.randn(2, 3, 3).double()
    for t, at in zip(scheduler.timesteps, found.steps, strict=False):
        alpha, sigma = level(scheduler, t)
        if alpha == 0:
            assert at is None
            continue
        assert at is not None
        assert at.position == pytest.approx(math.log(alpha / sigma), rel=1e-4, abs=1e-4)
        noise = noise_in(scheduler, x, v, alpha, sigma)
        wanted = (x - sigma * noise) / alpha if name in NOISY else noise
        torch.testing.assert_close(at.a * x + at.b * v, wanted, rtol=1e-4, atol=1e-4 * (1 + sigma / alpha))


@pytest.mark.parametrize("guidance", ["none", "batched", "rescaled", "interval"])
@pytest.mark.parametrize("name", ["ddim v", "dpm++ 2 v", "flow euler"])
def test_guidance_of_every_kind_is_part_of_what_is_predicted(name: str, guidance: str) -> None:
    """In the interval, guidance is on from step 3 to 8, and no step is predicted from outputs without it."""
    computed = {0, 1, 2, 3, 4, 6, 8, 9, 10} if guidance == "interval" else set(AT)
    wanted = written_out(Pipe(SCHEDULERS[name](), guidance), computed)
    pipe = Pipe(SCHEDULERS[name](), guidance)
    pab.enable(pipe, PABConfig(model=Broadcast(at=sorted(computed), unit="step", reuse="forecast")))
    torch.testing.assert_close(pipe.sample(), wanted, rtol=1e-6, atol=1e-6)


def test_where_other_branches_are_called_than_before_the_last_outputs_are_held() -> None:
    """Guidance is on from step 3 to 8. Steps 3 and 9 are the first with and without it."""
    pipe = Pipe(SCHEDULERS["ddim epsilon"](), "interval")
    stepped: list[Tensor] = []
    outputs: list[Tensor] = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda v, *args, **kwargs: (stepped.append(v), step(v, *args, **kwargs))[1]  # of other names
    pipe.transformer.register_forward_hook(lambda module, args, out: outputs.append(out))
    pab.enable(pipe, PABConfig(model=Broadcast(at=[0, 1, 4, 5, 8], unit="step", reuse="forecast")))
    for _ in pipe.steps():
        pass
    uncond, cond = outputs[-5:-3]  # of step 8, before three steps of one branch
    assert pipe.transformer.calls == 10 and not torch.equal(cond, uncond)
    assert all(torch.equal(v, cond) for v in stepped[-3:]), "of the branch that is called, which another place had"


def test_a_scheduler_whose_step_has_other_arguments_is_refused() -> None:
    class Odd(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, noise: Tensor, when: Tensor, latents: Tensor, **kwargs: Any) -> Any:
            return super().step(noise, when, latents, **kwargs)

    pipe = Pipe(Odd(clip_sample=False))
    pab.enable(pipe, PABConfig(model=RULE))
    with pytest.raises(TypeError, match=r"Odd.step takes noise, when, latents, kwargs; reuse='forecast' needs"):
        pipe.sample()


def edited(pipe: Pipe) -> Pipe:
    pipe.edit = lambda step, x: x.clone()
    return pipe


def edited_in_place(pipe: Pipe) -> Pipe:
    pipe.edit = lambda step, x: x.add_(0)
    return pipe


@pytest.mark.parametrize("edit", [edited, edited_in_place])
def test_latents_that_the_pipeline_edits_are_not_corrected(edit: Callable[[Pipe], Pipe]) -> None:
    wanted = written_out(Pipe(SCHEDULERS["unipc"]()), set(AT), corrects=False)
    pipe = edit(Pipe(SCHEDULERS["unipc"]()))
    pab.enable(pipe, PABConfig(model=RULE))
    torch.testing.assert_close(pipe.sample(), wanted, rtol=1e-6, atol=1e-6)


def test_latents_edited_before_some_steps_are_corrected_at_the_others() -> None:
    pipe = Pipe(SCHEDULERS["ddim v"]())
    pipe.edit = lambda step, x: x.clone() if step == 9 else x  # between computed steps 8 and 11
    both = [written_out(Pipe(SCHEDULERS["ddim v"]()), set(AT), corrects) for corrects in (True, False)]
    pab.enable(pipe, PABConfig(model=RULE))
    found = pipe.sample()
    assert not any(torch.allclose(found, other, rtol=1e-6, atol=1e-6) for other in both)


def test_a_scheduler_without_known_conversions_is_predicted_on_the_line_and_not_corrected() -> None:
    class Mine:
        """Euler steps of a flow, and state outside of its attributes."""

        init_noise_sigma = 1.0

        def set_timesteps(self, count: int) -> None:
            self.num_inference_steps = count
            self.sigmas = torch.linspace(1, 0, count + 1).double()
            self.timesteps = 1000 * self.sigmas[:-1]
            self.step_index = 0

        def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True) -> Any:
            before, after = self.sigmas[self.step_index : self.step_index + 2]
            self.step_index += 1
            return (sample + (after - before) * model_output,)

    pipe = Pipe(Mine())
    pab.enable(pipe, PABConfig(model=RULE))
    found = pipe.sample()
    pab.disable(pipe)
    scheduler = Mine()
    scheduler.set_timesteps(STEPS)
    x, known = pipe.noise(), {}
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            v = pipe.guided(x, t, step) if step in AT else lagrange(dict(list(known.items())[-2:]), step)
            if step in AT:
                known[step] = v
            (x,) = scheduler.step(v, t, x)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_a_tensor_that_is_handed_from_step_to_step_prevents_correction() -> None:
    def sample(pipe: Pipe) -> Tensor:
        scheduler = pipe.scheduler
        scheduler.set_timesteps(STEPS)
        x, old, times = pipe.noise(), None, scheduler.timesteps
        with torch.no_grad():
            for step, t in enumerate(times):
                back = times[step - 1] if step else None
                x, old = scheduler.step(
                    pipe.guided(x, t, step), old, t, back, x, generator=generator, return_dict=False
                )
        return x

    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(2)
        pipe = Pipe(diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction", clip_sample=False))
        pab.enable(pipe, PABConfig(model=RULE))
        calls: list[int] = []
        step = type(pipe.scheduler).step
        results.append(sample(pipe))
        assert pipe.transformer.calls == 2 * len(AT)
        del calls, step
    assert torch.equal(*results) and torch.isfinite(results[0]).all()


# What is kept


def test_what_is_kept_is_counted_and_released_after_the_last_skip() -> None:
    pipe = Pipe(SCHEDULERS["dpm++ 2 v"]())
    pab.enable(pipe, PABConfig(model=Broadcast(at=(0, 1, 3, 4, 6, 7, 8, 9, 10, 11), unit="step", reuse="forecast")))
    latents = math.prod(SHAPE) * 8
    held = []
    for _ in pipe.steps():
        held.append(pab.summary(pipe).cache_bytes / latents)
    # An output of each of two branches before a skip; beside them two guided outputs and two samples.
    assert held[:6] == [2, 6, 4, 4, 6, 4]
    assert held[6:] == [0] * 6
    found = pab.summary(pipe)
    assert found.peak_cache_bytes == 6 * latents
    assert {
        (t.computed, t.stored, t.reused) for c in found.contexts.values() for k, t in c.items() if k == "model"
    } == {(10, 2, 2)}


def test_a_run_that_fails_keeps_nothing_and_the_next_one_is_right() -> None:
    pipe = Pipe(SCHEDULERS["unipc"]())
    pab.enable(pipe, PABConfig(model=RULE))
    wanted = pipe.sample()

    def fail(step: int, x: Tensor) -> Tensor:
        if step == 6:
            raise ArithmeticError("on purpose")
        return x

    pipe.edit = fail
    with pytest.raises(ArithmeticError):
        pipe.sample()
    pipe.edit = lambda step, x: x
    assert torch.equal(pipe.sample(), wanted)
    assert pab.summary(pipe).cache_bytes == 0


def test_a_bare_model_has_no_sampler_to_predict_in() -> None:
    with pytest.raises(ValueError, match="reuse='forecast' predicts what a scheduler's `step` gets"):
        pab.enable(Denoiser(), PABConfig(model=Broadcast(2, reuse="forecast")), num_steps=4)


@pytest.mark.parametrize("kind", ["hold", "linear"])
def test_a_bare_model_gives_back_its_last_output_or_the_line_through_two(kind: str) -> None:
    model, plain = (Pipe(None).transformer for _ in range(2))
    pab.enable(model, PABConfig(model=Broadcast(3, (0, 1), reuse=kind)), num_steps=7)
    xs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).double() for i in range(7)]
    prompt, known = torch.zeros(SHAPE[1:]).double(), []
    for step, x in enumerate(xs):
        t = torch.tensor(900.0 - 100 * step)
        found = model(x, t, prompt)
        if step % 3 == 0:
            wanted = plain(x, t, prompt)
            known = [(step, wanted), *known[:1]]
        elif kind == "hold" or len(known) == 1:
            wanted = known[0][1]
        else:
            (s, c), (p, before) = known
            wanted = c + (step - s) / (s - p) * (c - before)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        found.mul_(0)  # whoever gets it may write to it
    assert model.calls == plain.calls == 3
    assert pab.summary(model).contexts["#0"]["model"].reused == 4


def test_other_rules_count_the_steps_at_which_the_model_runs() -> None:
    pipe = Pipe(SCHEDULERS["ddim v"]())
    pab.enable(pipe, PABConfig(model=Broadcast(2, (0, 1), reuse="forecast"), spatial=Broadcast(2, (0, 1))))
    pipe.sample()
    found = pab.summary(pipe).contexts["#0"]
    assert (found["model"].computed, found["model"].reused) == (6, 6)
    assert (found["spatial"].computed, found["spatial"].reused, found["spatial"].forced) == (3, 3, 0)


@pytest.mark.flops
def test_flops_of_skipped_steps_are_saved_whole() -> None:
    pipe = Pipe(SCHEDULERS["ddim v"]())
    pab.enable(pipe, PABConfig(model=Broadcast(2, (0, 1), reuse="forecast")))
    pipe.sample()
    found = pab.summary(pipe)
    assert found.flops_without and found.flops * 2 == found.flops_without


def test_range_1_is_the_model_without_pab() -> None:
    pipe = Pipe(SCHEDULERS["unipc"]())
    plain = pipe.sample()
    pab.enable(pipe, PABConfig(model=Broadcast(1, reuse="forecast")))
    assert torch.equal(pipe.sample(), plain)


def test_two_pipelines_step_by_step_do_not_mix() -> None:
    pipes = [Pipe(SCHEDULERS[name]()) for name in ("ddim v", "unipc")]
    alone = []
    for pipe in pipes:
        pab.enable(pipe, PABConfig(model=RULE))
        alone.append(pipe.sample())
    runs = [pipe.steps() for pipe in pipes]
    *_, together = zip(*runs, strict=True)
    assert all(map(torch.equal, together, alone))


def test_a_pipeline_that_steps_a_second_scheduler_is_refused() -> None:
    pipe: Any = Pipe(SCHEDULERS["flow euler"]())
    pipe.audio_scheduler = copy.deepcopy(pipe.scheduler)
    with pytest.raises(ValueError, match="Pipe also has audio_scheduler; use reuse='linear' or 'hold'"):
        pab.enable(pipe, PABConfig(model=RULE))
    assert not [name for name in vars(pipe) if name.startswith("_pab")]


def test_in_inference_mode_outputs_are_predicted_only() -> None:
    wanted = written_out(Pipe(SCHEDULERS["ddim v"]()), set(AT), corrects=False)
    pipe = Pipe(SCHEDULERS["ddim v"]())
    pab.enable(pipe, PABConfig(model=RULE))
    with torch.inference_mode():
        found = pipe.sample()
    torch.testing.assert_close(found.clone(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"])
def test_consistency_models_are_refused(name: str) -> None:
    pipe = Pipe(getattr(diffusers, name)())
    pab.enable(pipe, PABConfig(model=RULE))
    with pytest.raises(ValueError, match=f"{name} begins from new noise at every step"):
        pipe.sample()
    assert pab.summary(pipe).cache_bytes == 0


class Summing(diffusers.DDIMScheduler):  # type: ignore[misc]
    """Somebody's own, with a sum that it adds to in place."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.sum = getattr(self, "sum", torch.zeros_like(sample))
        self.sum.add_(model_output)
        return super().step(model_output + 0.01 * self.sum, timestep, sample, *args, **kwargs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Summing(beta_start=1e-4, beta_end=0.02, clip_sample=False),
        lambda: diffusers.PNDMScheduler(beta_start=1e-4, beta_end=0.02),
    ],
    ids=["subclass", "PNDM with Runge-Kutta steps"],
)
def test_schedulers_that_change_their_state_in_place_are_not_stepped_again(make: Callable[[], Any]) -> None:
    pipe = Pipe(make())
    scheduler, stepped = pipe.scheduler, []
    step = scheduler.step
    scheduler.step = lambda *args, **kwargs: (stepped.append(1), step(*args, **kwargs))[1]
    pab.enable(pipe, PABConfig(model=RULE))
    pipe.sample()
    assert len(stepped) == len(scheduler.timesteps)


def test_only_what_steps_change_is_taken_back_in_a_scheduler() -> None:
    pipe = Pipe(SCHEDULERS["unipc"]())
    log: list[int] = []
    pipe.scheduler.log = log

    def note(step: int, x: Tensor) -> Tensor:
        pipe.scheduler.note = step
        log.append(step)
        pipe.scheduler.register_to_config(mine=step)
        return x

    pipe.edit = note
    pab.enable(pipe, PABConfig(model=RULE))
    found = pipe.sample()
    assert pipe.scheduler.note == pipe.scheduler.config.mine == STEPS - 1
    assert pipe.scheduler.log is log and log == list(range(STEPS))
    torch.testing.assert_close(found, written_out(Pipe(SCHEDULERS["unipc"]()), set(AT)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_step_that_fails_leaves_no_bytes(at: int) -> None:
    pipe = Pipe(SCHEDULERS["ddim v"]())
    step = pipe.scheduler.step
    steps: list[int] = []

    def fails(*args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == at + 1:
            raise ArithmeticError("on purpose")
        return step(*args, **kwargs)

    pipe.scheduler.step = fails
    pab.enable(pipe, PABConfig(model=RULE))
    with pytest.raises(ArithmeticError):
        pipe.sample()
    assert pab.summary(pipe).cache_bytes == 0


@pytest.mark.parametrize("step", [4, 5], ids=["at a computed step", "at a skipped one"])
@pytest.mark.parametrize("branches", [(0, 1), (0,)], ids=["both", "the second"])
def test_outputs_for_another_prompt_are_not_predicted_from(branches: tuple[int, ...], step: int) -> None:
    """From the exchange on, everything is as in a run of its own from there."""
    pipe = Pipe(SCHEDULERS["ddim v"]())
    seen: list[Tensor] = []

    def exchange(now: int, x: Tensor) -> Tensor:
        if now == step:
            pipe.prompts = tuple(p + 1 if i in branches else p for i, p in enumerate(pipe.prompts))  # type: ignore[assignment]
        return x

    pipe.edit = exchange
    original = pipe.scheduler.step
    pipe.scheduler.step = lambda v, *args, **kwargs: (seen.append(v), original(v, *args, **kwargs))[1]
    pab.enable(pipe, PABConfig(model=Broadcast(at=(0, 1, 2, 4, 7, 8, 11), unit="step", reuse="forecast")))
    runs = pipe.steps()
    for _ in range(step):
        next(runs)
    before = len(seen)
    next(runs)
    assert len(seen) == before + 1, "nothing is corrected across the exchange"
    assert torch.isfinite(seen[-1]).all()


def test_timesteps_that_somebody_shortened_are_predicted_on_the_line() -> None:
    pipe = Pipe(SCHEDULERS["ddim v"]())
    pab.enable(pipe, PABConfig(model=Broadcast(at=(0, 1, 2, 4, 6, 7), unit="step", reuse="forecast")))
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    scheduler.timesteps = scheduler.timesteps[4:]
    x = pipe.noise()
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            x = scheduler.step(pipe.guided(x, t, step), t, x, return_dict=False)[0]
    assert torch.isfinite(x).all()
