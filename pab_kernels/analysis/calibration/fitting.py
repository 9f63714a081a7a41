"""`fit`: weights of linear reuses by sublayer and step, from full runs.

For a sublayer with outputs c_i, whose plan reads c_s and c_p at step i, the value of a reuse is c_s + w (c_s - c_p).
The w of least squares over all elements, contexts and clips is

    w = a / b  with  a = sum <c_i - c_s, c_s - c_p>,  b = sum ||c_s - c_p||^2

The sums are taken while the model runs in full; no more outputs are kept than the plan itself keeps. Two free numbers,
x c_s + y c_p, would fit single outputs better; with x + y = 1, an output that does not change is kept exactly, and the
operations need one weight.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import adapter_for
from ...broadcast.adapter import Adapter
from ...broadcast.broadcaster import broadcaster_of
from ...broadcast.call import Call
from ...broadcast.generation import Generation
from ...broadcast.pipeline import denoisers
from ...broadcast.whole import shared
from ...compat import uncompiled
from ...messages import shown
from ...progress import Progress
from ...rules.config import PABConfig
from ...rules.fitted import LARGEST_WEIGHT, FittedRow, FittedWeights
from ...rules.plan import WHOLE, Action, Plan, Sublayer
from ...rules.schedule import Schedule
from ..observer import Observer, observing
from ..pipeline_call import Wish
from ..pipeline_call import call as call_of
from ..sampling import check_seed

_Place = tuple[str, int, int, int]
"""Sublayer, step, and the two steps that it reads, the newest first."""


@dataclass
class Sums:
    """The sums of full runs.

    Args:
        schedule: of the runs.
        products: a and b of each sublayer and reuse.
    """

    schedule: Schedule
    products: dict[_Place, tuple[float, float]] = field(default_factory=dict)

    def add(self, other: Sums) -> None:
        """Add the sums of further runs.

        Raises:
            ValueError: they have another schedule.
        """
        if (other.schedule.num_steps, other.schedule.timesteps) != (self.schedule.num_steps, self.schedule.timesteps):
            raise ValueError(
                "the fitted runs have different schedules; weights are for one: sample all prompts with the same steps "
                "and sizes"
            )
        for place, (a, b) in other.products.items():
            self.put(place, a, b)

    def put(self, place: _Place, a: float, b: float) -> None:
        """Add the products of an output."""
        before = self.products.get(place, (0.0, 0.0))
        self.products[place] = before[0] + a, before[1] + b

    def fitted(self, config: PABConfig) -> PABConfig:
        """`config` with the weights of least squares; without any if its plan has no linear reuse."""
        places: dict[str, list[_Place]] = {}
        for place in sorted(self.products):
            places.setdefault(place[0], []).append(place)
        rows: dict[tuple[tuple[int, int, int], ...], dict[str, tuple[float, ...]]] = {}
        for name, of_name in places.items():
            reads = tuple((i, s, p) for _, i, s, p in of_name)
            rows.setdefault(reads, {})[name] = tuple(_weight(place, *self.products[place]) for place in of_name)
        made = tuple(FittedRow(reads, weights) for reads, weights in rows.items())
        schedule = self.schedule
        return replace(config, fitted=FittedWeights(schedule.num_steps, made, schedule.timesteps) if made else None)

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists, which `from_dict` reads."""
        schedule = {"num_steps": self.schedule.num_steps, "timesteps": self.schedule.timesteps}
        return schedule | {"products": [[*place, *pair] for place, pair in self.products.items()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sums:
        """The sums that `to_dict` wrote."""
        products = {(name, i, s, p): (a, b) for name, i, s, p, a, b in data["products"]}
        return cls(Schedule.of(data["num_steps"], data["timesteps"]), products)


def together(sums: Sequence[Sums]) -> Sums:
    """The sums of all runs.

    Raises:
        ValueError: they have different schedules.
    """
    total = Sums(sums[0].schedule)
    for of_runs in sums:
        total.add(of_runs)
    return total


def _weight(place: _Place, a: float, b: float) -> float:
    """The weight, to four digits; that of the line where the outputs are equal or the weight would be out of bounds."""
    _, i, s, p = place
    fitted = a / b if b > 0 else float("nan")
    return round(fitted if abs(fitted) <= LARGEST_WEIGHT else (i - s) / (s - p), 4)


class _Fit(Observer):
    """Sums up the products of a model's outputs at the steps that the plan of `config` reads."""

    def __init__(self, model: nn.Module, adapter: Adapter, config: PABConfig, progress: Progress | None) -> None:
        rule = config.rule("model", 0)
        whole = [] if rule is None or rule.reuse != "linear" else [WHOLE]
        super().__init__(model, [*adapter.sublayers, *whole])
        self._config = config
        self._progress = progress
        self._generation: Generation | None = None
        self._plan: Plan | None = None  # of this generation
        self._step = -1
        self._kept: dict[tuple[str, str, int], list[tuple[int, list[Tensor]]]] = {}  # by context, sublayer and run
        self._runs: Counter[tuple[str, str]] = Counter()  # in this step, by context and sublayer
        self._found: list[tuple[_Place, Tensor]] = []  # [2] each
        self.sums: Sums | None = None

    def observe(self, call: Call, sublayer: Sublayer, outputs: list[Tensor]) -> None:
        """Keep an output that a later step reads; at a reuse, add the products with those that it reads."""
        if call.generation is not self._generation or self._plan is None:
            self.collect()
            self._generation, self._step = call.generation, -1
            self._plan = Plan(self._config, call.generation.schedule, tuple(self.sublayers))
        if call.step != self._step:
            self._step = call.step
            self._runs.clear()
            if self._progress:
                schedule = self._plan.schedule
                self._progress(call.step - schedule.begin + 1, schedule.num_steps - schedule.begin)
        if self._plan.outputs(sublayer.name) < 2:
            return
        place = call.context.name, sublayer.name
        key = *place, self._runs[place]  # a module may run several times in one call
        self._runs[place] += 1
        decision, kept = self._plan.decision(sublayer.name, call.step), self._kept.get(key, [])
        if decision.action is Action.STORE:
            kept = [(call.step, [t.clone() for t in outputs]), *kept]
        elif decision.reads and decision.reads == tuple(step for step, _ in kept) and len(kept) == 2:
            (s, newest), (p, before) = kept
            if outputs and [t.shape for t in outputs] == [t.shape for t in newest] == [t.shape for t in before]:
                self._found.append(((sublayer.name, call.step, s, p), _products(outputs, newest, before)))
        self._kept[key] = kept[: decision.held]

    def collect(self) -> None:
        """Read the products of a run from the device.

        Raises:
            ValueError: the run took fewer steps than its schedule has, or outputs are not finite.
        """
        if self._generation is None:
            return
        schedule, taken = self._generation.schedule, self._generation.taken
        if self._generation.scheduler is None and taken < len(schedule.steps):
            raise ValueError(
                f"the call took {taken} of {len(schedule.steps)} steps, and weights are for whole runs: give fit the "
                "num_steps that call takes"
            )
        sums = Sums(schedule)
        if self._found:
            stacked = torch.stack([pair.cpu() for _, pair in self._found])
            if not stacked.isfinite().all():
                (name, step, *_), _ = self._found[int((~stacked.isfinite()).any(dim=1).nonzero()[0])]
                raise ValueError(
                    f"an output of {name or 'the model'} that is read at step {step} is not finite, or its square is "
                    "not: nothing can be fitted to it; try dtype bfloat16 or float32"
                )
            pairs = stacked.tolist()
            for (place, _), (a, b) in zip(self._found, pairs, strict=True):
                sums.put(place, a, b)
        self._generation, self._found, self._kept = None, [], {}
        self.sums = sums if self.sums is None else together([self.sums, sums])


def _products(now: Sequence[Tensor], newest: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """`[a, b]` over all of an output's tensors, in float32 or wider on their device."""
    a, b = [], []
    for c_i, c_s, c_p in zip(now, newest, before, strict=True):
        wide = torch.promote_types(c_i.dtype, torch.float32)
        step, change = c_i.to(wide) - c_s.to(wide), c_s.to(wide) - c_p.to(wide)
        a.append((step * change).sum())
        b.append(change.square().sum())
    return torch.stack([torch.stack(a).sum(), torch.stack(b).sum()])


def sums_of(
    model_or_pipe: Any,
    config: PABConfig,
    run: Callable[[], Any],
    *,
    num_steps: int | None = None,
    kinds: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Sums:
    """The sums of full runs, for the plan of `config`.

    Args:
        model_or_pipe: a diffusers pipeline, or a bare DiT, on which PAB is not enabled.
        config: the rules.
        run: samples with it, once or several times.
        num_steps: of `run`, for a bare DiT.
        kinds: as in `pab.enable`.
        progress: called at every step with the number of steps begun and of all steps.

    Raises:
        ValueError: PAB is enabled, or `run` did not call the model, or has different schedules, fewer steps than a bare
            DiT was given, or outputs that are not finite.
        TypeError: no sublayers are found in the model.
    """
    pipe = None if isinstance(model_or_pipe, nn.Module) else model_or_pipe
    models = [uncompiled(model_or_pipe)] if pipe is None else list(denoisers(pipe).values())
    for model in models:
        if broadcaster_of(model) is not None:
            raise ValueError(f"PAB is enabled on this {type(model).__name__}; call pab.disable before fitting it")
        if shared(model) is not None:
            raise ValueError(
                f"this {type(model).__name__} is parallel, and a fit sees the part of one rank; call pab.unparallelize "
                "first"
            )
    fits = [_Fit(model, adapter_for(model, kinds), config, progress) for model in models]
    # Observers are Python: compiled blocks run eagerly.
    with contextlib.ExitStack() as stack, torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for model, of_model in zip(models, fits, strict=True):
            stack.enter_context(observing(model, of_model, pipe, num_steps))
        run()
    for of_model in fits:
        of_model.collect()
    sums = [of_model.sums for of_model in fits if of_model.sums is not None]
    if not sums:
        raise ValueError(f"the call did not run the {type(models[0]).__name__}: there is nothing to fit")
    return together(sums)


def fit(
    model_or_pipe: Any,
    prompts: Sequence[Any],
    config: PABConfig,
    *,
    num_steps: int,
    call: Callable[..., Any] | None = None,
    seed: int = 0,
    kinds: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> PABConfig:
    """Fit the weights of linear reuses to a model, by one full run of each prompt.

    A linear reuse at step i stands for c_i by `c_s + w (c_s - c_p)`, with the outputs of the steps s and p that the
    plan of `config` reads. On the line, w is `(i - s) / (s - p)`; here it is the one of least squares for each sublayer
    and step. It costs nothing when sampling: the same outputs are kept and the same operations run.

    The weights are for this model, number of steps and timesteps. On another schedule, and where an output that is read
    is not the planned one, reuses take the line; the plan's notes report it. One or two prompts do: all elements of an
    output share a weight. The error of single outputs is minimised, not that of the result, so compare both before you
    rely on it.

    Args:
        model_or_pipe: a diffusers pipeline on which PAB is not enabled, or a bare DiT with `call`.
        prompts: texts, `Wish`es (`analysis/pipeline_call.py`) or whatever `call` takes. Clip i has the seed `seed + i`.
        config: the rules, some of them with `reuse="linear"`.
        num_steps: sampling steps.
        call: `call(model_or_pipe, prompt, seed)` samples once, with `num_steps` steps. Default for a pipeline: its
            usual arguments.
        seed: of the first clip.
        kinds: as in `pab.enable`.
        progress: called at every step with the number of steps begun and of all steps.

    Returns:
        `config` with the weights in its field `fitted`; earlier ones are replaced.

    Raises:
        ValueError: PAB is enabled, the rules reuse nothing linearly on this schedule or keep outputs after the gate,
            the runs have different schedules, other numbers of steps or outputs that are not finite or do not call the
            model, or a value is out of bounds.
        TypeError: `model_or_pipe` is neither a pipeline nor a module with `call`, no sublayers are found in it, or an
            argument has another type.

    >>> import torch
    >>> from pab_kernels import Broadcast
    >>> from pab_kernels.nn import BroadcastModule
    >>> model = torch.nn.Sequential(BroadcastModule(torch.nn.Tanh(), "mlp"))
    >>> def call(model, prompt, seed):
    ...     for i in range(10):
    ...         model(prompt * i)
    >>> rules = PABConfig(mlp=Broadcast(2, reuse="linear"))
    >>> print(fit(model, [torch.full((1, 4), 0.1)], rules, num_steps=10, call=call).fitted)
    fitted weights of 1 sublayer(s), steps 3 to 7
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts is a list of at least one prompt, got {shown(prompts)}")
    bare = isinstance(model_or_pipe, nn.Module)
    if not bare and not denoisers(model_or_pipe):
        raise TypeError(
            f"got {type(model_or_pipe).__name__}; supported are a pipeline with a `transformer` or a `unet`, and a "
            "torch.nn.Module with call="
        )
    if bare and call is None:
        raise TypeError(
            f"got a bare {type(model_or_pipe).__name__} without call; pass call(model, prompt, seed), which samples "
            "once"
        )
    Schedule.of(num_steps)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is a whole number, got {shown(seed)}")
    check_seed(seed, len(prompts))
    if not isinstance(config, PABConfig):
        raise TypeError(
            f"config must be a PABConfig, got {type(config).__name__}; PABConfig.preset(name) gives a named one"
        )
    if config.cache_point == "post_gate":
        raise ValueError("outputs are fitted before the gate, got cache_point 'post_gate'; use 'pre_gate'")
    if not any(rule.reuse == "linear" for _, rule in config.broadcasts()):
        raise ValueError("no rule of the config reuses linearly; weights are fitted for rules with reuse='linear'")

    def run(prompt: Any, clip_seed: int) -> None:
        if call is not None:
            call(model_or_pipe, prompt, clip_seed)
        else:
            wish = prompt if isinstance(prompt, Wish) else Wish(prompt)
            call_of(model_or_pipe, replace(wish, steps=num_steps, seed=clip_seed))

    sums = [
        sums_of(
            model_or_pipe,
            config,
            functools.partial(run, prompt, seed + i),
            num_steps=num_steps if bare else None,
            kinds=kinds,
            progress=progress,
        )
        for i, prompt in enumerate(prompts)
    ]
    total = together(sums)
    made = None if bare else getattr(model_or_pipe.scheduler, "num_inference_steps", None)
    if made is not None and num_steps not in (made, total.schedule.num_steps):
        raise ValueError(
            f"call made a schedule of {made} steps where num_steps={num_steps} was asked; give fit the number of steps "
            "that call takes"
        )
    found = total.fitted(config)
    if found.fitted is None:
        raise ValueError(
            f"no reuse of the rules reads two outputs in {total.schedule.num_steps} steps; use reuse='linear' in a "
            "window that the schedule enters"
        )
    return found
