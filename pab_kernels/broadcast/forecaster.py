"""Forecasts of the model's output at steps at which nothing of the model runs, for kind `model`.

V_k is the guided output that the scheduler's `step` gets at step k, X_k its sample; s and p are the last two steps at
which the model ran.

    1. A skipped step j: the noise n_k = a_k X_k + b_k V_k (see `coordinates`) lies on the line through s and p over
       lambda:  n_j = n_s + w (n_s - n_p),  w = (lambda_j - lambda_s) / (lambda_s - lambda_p),
       V_j = (n_j - a_j X_j) / b_j. Where steps draw new noise, the data takes the place of the noise. Where a step has
       no such coordinates, V itself lies on a line over the step index.
    2. The next step e at which the model ran, on the predicted X_e: the scheduler goes back to step s and takes the
       steps s .. e - 1 again with the V that lie on the parabola through e, s and p over the step index. Its sample is
       the corrected X_e, with which step e is taken; V_e is not computed again.

Evaluations at one noise level (the second ones of Heun, the first steps of PNDM) count as one index.

Latents are corrected where that is exact: the scheduler is one of diffusers, known to keep its state in its attributes,
and draws no noise; the sample is what the step before returned, and no other tensor is handed from step to step.
Elsewhere outputs are predicted only.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from .coordinates import Coordinates, Solver, solver


@dataclass
class _Step:
    """A step that the scheduler has taken.

    Args:
        index: in the schedule.
        place: the number of different noise levels before it.
        calls: names of the contexts that the model was called in.
        given: the arguments of `step`.
    """

    index: int
    place: int
    calls: frozenset[str]
    given: inspect.BoundArguments


@dataclass
class _Computed(_Step):
    """One at which the model ran.

    Args:
        output, sample: what `step` was called with.
        state: of the scheduler before the step.
    """

    output: torch.Tensor
    sample: torch.Tensor
    state: dict[str, Any]


class Forecaster:
    """The scheduler's steps of one generation.

    Args:
        scheduler: whose timesteps are set.
        num_steps: of the full schedule.
    """

    def __init__(self, scheduler: Any, num_steps: int) -> None:
        self._scheduler = scheduler
        self._num_steps = num_steps
        self._solver: Solver | None = None
        self._places: list[int] = []
        self._changed: set[str] = set()  # attributes of the scheduler that its steps change
        self._computed: list[_Computed] = []  # the newest first, at most two, of different noise levels
        self._skipped: list[_Step] = []  # since the newest of those
        self._returned: tuple[torch.Tensor, int] | None = None
        self._as_returned = True

    def clear(self) -> None:
        """Forget every step."""
        self._computed, self._skipped, self._returned = [], [], None

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs and samples that are kept."""
        kept = {id(t): t.nbytes for step in self._computed for t in (step.output, step.sample)}
        return sum(kept.values())

    def step(
        self, original: Callable[..., Any], index: int, skipped: bool, calls: frozenset[str], *args: Any, **kwargs: Any
    ) -> Any:
        """In place of the scheduler's `step`.

        Args:
            original: that method.
            index: of the step.
            skipped: whether the model did not run.
            calls: names of the contexts that it was called in.
            args, kwargs: of the call.

        Returns:
            What `original` returns.
        """
        given = arguments_of(self._scheduler, original, args, kwargs)
        output, sample = given.arguments["model_output"], given.arguments["sample"]
        given.arguments |= {"model_output": None, "sample": None}  # each step keeps its own, where they are needed
        if self._solver is None:
            self._solver = solver(self._scheduler, given.arguments.get("eta") or 0.0)
            if len(self._solver.steps) < self._num_steps:  # somebody has shortened the timesteps since
                self._solver = Solver()
            self._places = places_of(self._solver.steps)
        if self._returned is not None and not is_unchanged(sample, self._returned):
            self._as_returned = False  # somebody has edited it since
        step = _Step(index, self._places[index] if self._places else index, calls, given)
        if skipped:
            output = self._predicted(step, output, sample)
            self._skipped.append(step)
        else:
            if self._skipped and self._corrects(step):
                sample = self._corrected(original, step, output)
            before = [c for c in self._computed if c.place != step.place]
            own = output.clone()  # the graphs of a compiled model write to its output again
            now = _Computed(**vars(step), output=own, sample=sample, state=state_of(self._scheduler))
            self._computed, self._skipped, self._as_returned = [now, *before[:1]], [], True
        before_step = state_of(self._scheduler)
        result = call_step(original, given, output, sample)
        self._changed |= _differences(before_step, state_of(self._scheduler))
        latents = latents_of(result)
        self._returned = (latents, version_of(latents))
        return result

    def _predicted(self, step: _Step, held: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The output of a skipped step; `held` where the model is called for other contexts than it was."""
        before = [c for c in self._computed if c.calls == step.calls and c.output.shape == held.shape]
        if len(before) < 2:
            return before[0].output if before else held
        s, p = before
        j, at_s, at_p = (self._at(k.index) for k in (step, s, p))
        if j is None or at_s is None or at_p is None or s.sample.shape != s.output.shape:
            w = (step.place - s.place) / (s.place - p.place)
            return _sum([(1 + w, s.output), (-w, p.output)], s.output.dtype)
        w = (j.position - at_s.position) / (at_s.position - at_p.position)
        terms = [((1 + w) * at_s.b, s.output), (-w * at_p.b, p.output)]
        terms += [((1 + w) * at_s.a, s.sample), (-w * at_p.a, p.sample), (-j.a, sample)]
        return _sum([(weight / j.b, t) for weight, t in terms], s.output.dtype)

    def _at(self, index: int) -> Coordinates | None:
        return self._solver.steps[index] if self._solver is not None and self._solver.steps else None

    def _corrects(self, step: _Step) -> bool:
        """Whether the latents of a step after skipped ones are corrected."""
        since = self._computed[0] if self._computed else None
        if since is None or since.calls != step.calls or not self._as_returned:
            return False
        if self._solver is None or not self._solver.exact:
            return False
        steps = (since, *self._skipped)
        handed = {name for k in steps for name, v in k.given.arguments.items() if isinstance(v, torch.Tensor)}
        churns = any(k.given.arguments.get("s_churn") for k in steps)
        return not churns and not handed - {"timestep"}

    def _corrected(self, original: Callable[..., Any], step: _Step, output: torch.Tensor) -> torch.Tensor:
        """The sample of a step after skipped ones, from the outputs before and after these."""
        since = self._computed[0]
        known = {c.place: c.output for c in self._computed if c.calls == step.calls} | {step.place: output}
        restore_state(self._scheduler, since.state, self._changed)
        x = since.sample
        for k in (since, *self._skipped):
            v = since.output if k is since else _interpolated(known, k.place)
            x = latents_of(call_step(original, k.given, v, x))
        return x


def refusal(scheduler: Any, reuse: str) -> str | None:
    """Why no outputs can be predicted for a scheduler whose timesteps are set; None if they can.

    Args:
        scheduler: any.
        reuse: of the model's outputs.
    """
    try:
        solver(scheduler)
    except ValueError as error:
        return str(error)
    if reuse != "forecast":
        return None
    step = getattr(type(scheduler), "step", None)
    parameters = inspect.signature(step).parameters if callable(step) else {}
    return None if {"model_output", "sample"} <= set(parameters) else _refused(scheduler, parameters)


def _refused(scheduler: Any, parameters: Iterable[str]) -> str:
    takes = ", ".join(parameters) or "nothing that is known"
    return (
        f"{type(scheduler).__name__}.step takes {takes}; reuse='forecast' needs model_output and sample among them: "
        "use reuse='linear' or 'hold'"
    )


def arguments_of(
    scheduler: Any, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """The arguments of `step` by name, also where somebody has put a function of other names in its place."""
    for signature in (inspect.signature(step), inspect.signature(MethodType(type(scheduler).step, scheduler))):
        if {"model_output", "sample"} <= set(signature.parameters):
            return signature.bind(*args, **kwargs)
    raise TypeError(_refused(scheduler, signature.parameters))


def call_step(
    step: Callable[..., Any], given: inspect.BoundArguments, output: torch.Tensor, sample: torch.Tensor
) -> Any:
    """`step` with another output and sample."""
    changed = inspect.BoundArguments(given.signature, given.arguments | {"model_output": output, "sample": sample})
    return step(*changed.args, **changed.kwargs)


def places_of(steps: Sequence[Coordinates | None]) -> list[int]:
    """For each step the number of different noise levels before it."""
    levels = [None if step is None else step.position for step in steps]
    changes = [a is None or a != b for a, b in itertools.pairwise(levels)]
    return [*itertools.accumulate(changes, initial=0)] if levels else []


def _interpolated(known: Mapping[int, Any], index: int) -> torch.Tensor:
    """The value at `index` of the polynomial through all `known` outputs."""
    terms = []
    for at, output in known.items():
        weights = [(index - other) / (at - other) for other in known if other != at]
        terms.append((math.prod(weights), output))
    return _sum(terms, terms[0][1].dtype)


def _sum(terms: Sequence[tuple[float, torch.Tensor]], dtype: torch.dtype) -> torch.Tensor:
    """A weighted sum, in float32 or float64 and rounded once."""
    wide = torch.float64 if any(t.dtype == torch.float64 for _, t in terms) else torch.float32
    total: Any = None
    for weight, t in terms:
        if weight:
            total = t.to(wide) * weight if total is None else total.add(t.to(wide), alpha=weight)
    assert total is not None
    return total.to(dtype)


def latents_of(result: Any) -> torch.Tensor:
    """The sample that a step returned."""
    if isinstance(result, torch.Tensor):
        return result
    if isinstance(result, dict):  # diffusers' own outputs are dicts with attributes
        return result["prev_sample"]
    return result[0] if isinstance(result, tuple) else result.prev_sample


def version_of(t: torch.Tensor) -> int:
    return -1 if t.is_inference() else t._version


def is_unchanged(sample: torch.Tensor, returned: tuple[torch.Tensor, int]) -> bool:
    """Whether a sample is what the step before returned, as it was."""
    latents, version = returned
    return sample is latents and version >= 0 and version_of(sample) == version


def state_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's attributes; its lists copied."""
    return {name: list(value) if isinstance(value, list) else value for name, value in vars(scheduler).items()}


def _differences(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names of the attributes that are others, or lists of others."""
    return {
        name for name in before.keys() | after.keys() if not _same(before.get(name, _ABSENT), after.get(name, _ABSENT))
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b


def restore_state(scheduler: Any, state: dict[str, Any], names: set[str]) -> None:
    """Give a scheduler back the attributes in `names`, those that its steps change."""
    held = vars(scheduler)
    for name in names:
        value = state.get(name, _ABSENT)
        if value is _ABSENT:
            held.pop(name, None)
        elif isinstance(value, list) and isinstance(held.get(name), list):
            held[name][:] = value
        else:
            held[name] = list(value) if isinstance(value, list) else value


_ABSENT = object()
