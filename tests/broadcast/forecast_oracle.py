"""Sampling with forecasts of the whole model, written out by its equations, and a small pipeline to compare with.

The oracle finds alpha and sigma from the scheduler's own `add_noise`, goes back by deep copies of the scheduler, and
knows nothing of the package's snapshots and tables.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Set
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from pab_kernels import Broadcast

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
    def __init__(self, step: int, place: int, x: Tensor, v: Tensor, scheduler: Any) -> None:
        self.step, self.place, self.x, self.v = step, place, x, v
        self.scheduler = copy.deepcopy(scheduler)


@torch.no_grad()
def written_out(pipe: Pipe, computed: Set[int], corrected: Set[int] | None = None, noisy: bool = False) -> Tensor:
    """The latents after the last step.

    Args:
        pipe: a new one.
        computed: steps at which the model runs.
        corrected: those of them at which latents are corrected; default all that follow a skipped one.
        noisy: whether the data is extrapolated instead of the noise.
    """
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
        if points and step - points[-1].step > 1 and (corrected is None or step in corrected):
            s = points[-1]
            through = {p.place: p.v for p in points[-2:]} | {places[step]: v}
            again, x = copy.deepcopy(s.scheduler), s.x
            for k in range(s.step, step):
                v_k = s.v if k == s.step else lagrange(through, places[k])
                x = again.step(v_k, times[k], x, **extra, return_dict=False)[0]
            scheduler = pipe.scheduler = again
        point = Point(step, places[step], x, v, scheduler)
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


RULE = Broadcast(at=AT, unit="step", reuse="forecast")
