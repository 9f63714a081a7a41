"""Where a scheduler's steps lie in its own coordinates: what is extrapolated between them, as numbers on the host.

With a sample X = alpha x0 + sigma n and a model output V, the noise is n = a X + b V:

    epsilon             a = 0              b = 1
    sample              a = 1 / sigma      b = -alpha / sigma
    v_prediction        a = sigma          b = alpha           (alpha^2 + sigma^2 = 1)
    flow_prediction     a = 1              b = 1 - sigma       (alpha = 1 - sigma, V = n - x0)

and the data is x0 = (X - sigma n) / alpha, of the same form. Schedulers after Karras et al. 2022 (Euler, Heun, ...)
have X = x0 + sigma n and scale the model's input by 1 / sqrt(sigma^2 + 1), where v-prediction has
a = sigma / (sigma^2 + 1), b = 1 / sqrt(sigma^2 + 1).

Along the trajectory of an ODE the noise changes most evenly, over lambda = log(alpha / sigma) (Lu et al. 2022,
DPM-Solver, section 3.2). Where a step adds new noise, the data does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Coordinates:
    """One step: what is extrapolated is `a X + b V`, at `position`.

    Args:
        a, b: of the sample and of the model output.
        position: lambda, the logarithm of alpha / sigma.
    """

    a: float
    b: float
    position: float


@dataclass(frozen=True)
class Solver:
    """What is known of a scheduler.

    Args:
        steps: the coordinates of every step; None for a step without. Empty where the conversions are not known.
        exact: whether a step can be taken again: it draws no noise, and its state lies in the scheduler's attributes.
    """

    steps: Sequence[Coordinates | None] = ()
    exact: bool = False


def solver(scheduler: Any, eta: float = 0.0) -> Solver:
    """What is known of a scheduler whose timesteps are set; its tables are read to the host.

    Args:
        scheduler: any.
        eta: the share of new noise that `step` is called with, for DDIM.

    Raises:
        ValueError: it begins from new noise at every step, and nothing can be predicted from one to the next.
    """
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    if refused := _CONSISTENCY.intersection(names):
        raise ValueError(
            f"{min(refused)} begins from new noise at every step, and outputs are not predicted across it; use another "
            "scheduler, or fewer steps"
        )
    name = next((name for name in names if name in _LEVELS), None)
    if name is None:
        return Solver()
    config = scheduler.config
    if name == "PNDMScheduler" and not config.skip_prk_steps:  # its first steps add to tensors in place
        return Solver()
    noisy = (
        name in _NOISY
        or bool(eta)
        or getattr(config, "algorithm_type", "").startswith("sde")
        or bool(getattr(config, "stochastic_sampling", False))
    )
    own = type(scheduler).__name__ == name and type(scheduler).__module__.startswith("diffusers.")
    steps = [_of_level(*level, data=noisy) for level in _LEVELS[name](scheduler)]
    return Solver(steps, exact=own and not noisy)


Level = tuple[float, float, str]
"""alpha, sigma and the type of prediction; "karras_v_prediction" where the scheduler scales the model's input."""


def _of_level(alpha: float, sigma: float, prediction: str, data: bool) -> Coordinates | None:
    if not (alpha > 0 and 0 < sigma < math.inf):
        return None
    a, b = {
        "epsilon": (0.0, 1.0),
        "sample": (1 / sigma, -alpha / sigma),
        "v_prediction": (sigma, alpha),
        "flow_prediction": (1.0, 1 - sigma),
        "karras_v_prediction": (sigma / (sigma**2 + 1), 1 / math.sqrt(sigma**2 + 1)),
    }.get(prediction, (0.0, 0.0))
    if data:
        a, b = (1 - sigma * a) / alpha, -sigma * b / alpha
    return Coordinates(a, b, math.log(alpha / sigma)) if b else None


def _by_timestep(scheduler: Any) -> Sequence[Level]:
    """alpha and sigma from `alphas_cumprod` at the timesteps, of which a new `PNDMScheduler` has none."""
    if scheduler.timesteps is None:
        return ()
    kept = scheduler.alphas_cumprod.double().tolist()
    steps = [kept[int(t)] for t in scheduler.timesteps.tolist()]
    return [(math.sqrt(kept), math.sqrt(1 - kept), scheduler.config.prediction_type) for kept in steps]


def _by_own_conversion(scheduler: Any) -> Sequence[Level]:
    """alpha and sigma as the solver converts its `sigmas`."""
    alphas, sigmas = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas.double())
    return [(a, s, scheduler.config.prediction_type) for a, s in zip(alphas.tolist(), sigmas.tolist(), strict=True)]


def _karras(scheduler: Any) -> Sequence[Level]:
    """`sigmas` of samples that are noised without being scaled."""
    kind = scheduler.config.prediction_type
    kind = {"v_prediction": "karras_v_prediction", "original_sample": "sample"}.get(kind, kind)
    return [(1.0, sigma, kind) for sigma in scheduler.sigmas.tolist()]


def _flow(scheduler: Any) -> Sequence[Level]:
    """`sigmas` between noise, 1, and the sample, 0."""
    return [(1 - sigma, sigma, "flow_prediction") for sigma in scheduler.sigmas.tolist()]


_CONSISTENCY = frozenset({"LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler"})
_NOISY = frozenset({"DDPMScheduler", "SASolverScheduler", "EulerAncestralDiscreteScheduler", "CogVideoXDPMScheduler"})
_LEVELS: dict[str, Callable[[Any], Sequence[Level]]] = {
    "DDIMScheduler": _by_timestep,
    "DDPMScheduler": _by_timestep,
    "PNDMScheduler": _by_timestep,
    "CogVideoXDDIMScheduler": _by_timestep,
    "CogVideoXDPMScheduler": _by_timestep,
    "DPMSolverMultistepScheduler": _by_own_conversion,
    "DPMSolverSinglestepScheduler": _by_own_conversion,
    "DEISMultistepScheduler": _by_own_conversion,
    "UniPCMultistepScheduler": _by_own_conversion,
    "SASolverScheduler": _by_own_conversion,
    "EulerDiscreteScheduler": _karras,
    "EulerAncestralDiscreteScheduler": _karras,
    "HeunDiscreteScheduler": _karras,
    "LMSDiscreteScheduler": _karras,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
}
