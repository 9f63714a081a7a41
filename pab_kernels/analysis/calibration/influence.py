"""How the outputs that a scheduler steps with move its samples, through the scheduler alone.

Schedulers of diffusers are affine in the outputs and the first sample, element by element (but for clipping and
thresholds, which are left out of account):

    X_k = c_k X_0 + sum_{i < k} A[k, i] V_i + noise

A follows from taking all steps once with as many samples of one element as there are steps: sample i gets the impulse
h at step i and zeros else. The same steps without impulses, and with the same noise, are subtracted.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ...broadcast.coordinates import Coordinates, solver
from ...broadcast.forecaster import call_step, latents_of, places_of

_IMPULSE = 2.0**-10
"""So small that nothing is clipped; a power of two, which floating point scales without error."""


@dataclass(frozen=True)
class Influence:
    """What the steps of one sampling do.

    Args:
        of_output: A, `[K + 1, K]`, float64: the change of sample k with output i; row K is the final sample.
        coordinates: of each step, in which outputs are predicted; None for a step without.
        places: for each step the number of different noise levels before it.
        corrects: whether samples are corrected when the next output is known.
        handover: the step at which a second model takes over, which neither predicts from outputs of the first nor
            corrects them; None if there is none.
    """

    of_output: np.ndarray
    coordinates: tuple[Coordinates | None, ...]
    places: tuple[int, ...]
    corrects: bool
    handover: int | None = None

    @property
    def num_steps(self) -> int:
        """K, the steps that were taken."""
        return len(self.places)

    @property
    def known(self) -> bool:
        """Whether outputs before the last one move the final sample through the scheduler alone.

        They do not where the model predicts the data and the last step returns it, nor without a scheduler.
        """
        size = np.abs(self.of_output[-1])
        return bool((size[:-1] > 1e-6 * size.max()).any())

    @property
    def final(self) -> np.ndarray:
        """W, `[K]`: the change of the final sample with each output; ones where it is not known."""
        return self.of_output[-1] if self.known else np.ones(self.num_steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` reads it."""
        at = [None if c is None else [c.a, c.b, c.position] for c in self.coordinates]
        return {
            "of_output": self.of_output.tolist(),
            "coordinates": at,
            "places": list(self.places),
            "corrects": self.corrects,
            "handover": self.handover,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Influence:
        """The influence that `to_dict` wrote."""
        at = tuple(None if c is None else Coordinates(*c) for c in data["coordinates"])
        return cls(np.array(data["of_output"]), at, tuple(data["places"]), data["corrects"], data["handover"])


@dataclass(frozen=True)
class Steps:
    """The calls of a scheduler's `step` in one sampling, to be repeated with other tensors.

    Args:
        scheduler: a copy of it, as it was before the first of them.
        given: the arguments of each call, without output and sample.
        handed: for each call, the arguments that are parts of what the call before returned, by their places in it.
        shape, device: of the samples.
        as_returned: whether each sample was what the call before returned.
        begin: the step of the schedule at which the sampling entered it.
    """

    scheduler: Any
    given: tuple[inspect.BoundArguments, ...]
    handed: tuple[dict[str, int], ...]
    shape: tuple[int, ...]
    device: torch.device
    as_returned: bool
    begin: int

    def influence(self) -> Influence:
        """See the module.

        Raises:
            ValueError: the scheduler begins from new noise at every step.
        """
        found = solver(self.scheduler, self.given[0].arguments.get("eta") or 0.0)
        known = found.steps[self.begin : self.begin + len(self.given)]
        count = len(self.given)
        at = tuple(known) if len(known) == count else (None,) * count
        places = places_of(at) or list(range(count))
        corrects = found.exact and self.as_returned and bool(known) and not any(self.handed)
        moved = self._taken(_IMPULSE) - self._taken(0.0)
        return Influence((moved / _IMPULSE).numpy(), at, tuple(places), corrects)

    def _taken(self, impulse: float) -> torch.Tensor:
        """All samples `[K + 1, K]` where sample i gets an impulse at step i."""
        scheduler, count = copy.deepcopy(self.scheduler), len(self.given)
        shape = (count, *(1,) * max(len(self.shape) - 1, 0))
        x = torch.zeros(shape, dtype=torch.float64, device=self.device)
        rows, result = [x.flatten()], None
        with torch.no_grad(), torch.random.fork_rng(_cuda_devices(self.device)):
            torch.manual_seed(0)
            for k, (given, handed) in enumerate(zip(self.given, self.handed, strict=True)):
                v = torch.zeros_like(x)
                v[k] = impulse
                now = inspect.BoundArguments(given.signature, dict(given.arguments))
                if "generator" in now.arguments:
                    now.arguments["generator"] = torch.Generator().manual_seed(k)
                for name, place in handed.items():
                    now.arguments[name] = result[place]  # type: ignore[index]
                result = call_step(scheduler.step, now, v, x)
                x = latents_of(result).double()
                rows.append(x.flatten())
        return torch.stack(rows).double().cpu()


def _cuda_devices(device: torch.device) -> Sequence[int]:
    if device.type != "cuda":
        return []
    return [torch.cuda.current_device() if device.index is None else device.index]
