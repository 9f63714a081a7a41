"""The runs that a calibration needs, on a pipeline."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ... import api
from ...broadcast.broadcaster import broadcaster_of
from ...broadcast.coordinates import solver
from ...broadcast.pipeline import denoisers, other_schedulers
from ...broadcast.summary import Summary
from ...broadcast.whole import shared
from ...messages import shown
from ...rules.config import PABConfig
from ..pipeline_call import Wish, call
from .fitting import Sums, sums_of
from .recording import Recording, Step, record, run_on, stepping


@dataclass(frozen=True)
class Clip:
    """One sampling.

    Args:
        prompt: what the call takes.
        seed: of its noise.
    """

    prompt: Any
    seed: int


def in_words(prompt: Any) -> str:
    """What a clip shows: its text, or the prompt as Python writes it."""
    text = prompt.prompt if isinstance(prompt, Wish) else prompt
    return text if isinstance(text, str) else shown(prompt)


@dataclass(frozen=True)
class Sample:
    """The result of a run.

    Args:
        result: a tensor on the host.
        share: FLOPs of the models as a share of those of the full run.
        seconds: of the call.
    """

    result: torch.Tensor
    share: float
    seconds: float


class Sampler(Protocol):
    """The runs of one pipeline or model."""

    reuse: str
    """How the whole model is reused."""
    num_steps: int
    """That a sampling is called with."""
    kinds: frozenset[str]
    """Of the sublayers that are found in every model."""
    takes_steps: bool
    """Whether it samples with other numbers of steps."""

    def describe(self) -> dict[str, Any]:
        """What all runs have in common, JSON-ready."""

    def record(self, clip: Clip, tick: Callable[[], None]) -> Recording:
        """A full run with its outputs."""

    def run_on(
        self, clip: Clip, recording: Recording, step: int, change: torch.Tensor, tick: Callable[[], None]
    ) -> float:
        """A run from a recorded step on, whose output is changed; see `recording.run_on`."""

    def sample(self, clip: Clip, config: PABConfig | None, steps: int, tick: Callable[[], None]) -> Sample:
        """A run of a number of steps under `config`, or without PAB."""

    def sums(self, clip: Clip, config: PABConfig, tick: Callable[[], None]) -> Sums:
        """A full run, with the sums that fit the weights of `config`; see `fitting.sums_of`."""


Call = Callable[..., torch.Tensor]


class PipelineSampler:
    """Runs a pipeline of diffusers.

    Args:
        pipe: the pipeline.
        num_steps: that it is called with.
        given: `call(pipe, prompt, seed)`, or None for the usual arguments.

    Raises:
        TypeError: the pipeline has no model or no scheduler.
        ValueError: PAB is enabled on it, or its outputs cannot be predicted.
    """

    reuse = "forecast"

    def __init__(self, pipe: Any, num_steps: int, given: Call | None) -> None:
        scheduler = getattr(pipe, "scheduler", None)
        models = denoisers(pipe)
        if not models or not hasattr(scheduler, "set_timesteps") or not hasattr(scheduler, "step"):
            raise TypeError(
                f"got {type(pipe).__name__}; supported are a pipeline with a `transformer` or a `unet` and a "
                "`scheduler`, and a torch.nn.Module with call="
            )
        for model in models.values():
            check_plain(model)
        if others := other_schedulers(pipe):
            raise ValueError(
                f"{type(pipe).__name__} also has {', '.join(others)}, and outputs are predicted for one scheduler; "
                "calibrate the bare model with call="
            )
        try:
            solver(scheduler)
        except ValueError as error:
            raise ValueError(
                f"{type(scheduler).__name__} begins from new noise at every step, and nothing of one step stands for "
                "the next; use fewer steps, or calibrate with another scheduler"
            ) from error
        self.pipe, self.num_steps, self._given = pipe, num_steps, given
        self.kinds = frozenset.intersection(*map(kinds_of, models.values()))
        self.takes_steps = given is None or "num_steps" in inspect.signature(given).parameters

    def _run(self, clip: Clip, steps: int) -> torch.Tensor:
        if self._given is None:
            wish = clip.prompt if isinstance(clip.prompt, Wish) else Wish(clip.prompt)
            return call(self.pipe, replace(wish, steps=steps, seed=clip.seed))
        extra = {"num_steps": steps} if self.takes_steps else {}
        return checked(self._given(self.pipe, clip.prompt, clip.seed, **extra))

    def describe(self) -> dict[str, Any]:
        """What all runs have in common, JSON-ready."""
        scheduler = self.pipe.scheduler
        return {
            "pipeline": type(self.pipe).__name__,
            "models": {k: fingerprint(m) for k, m in vars(self.pipe).items() if isinstance(m, torch.nn.Module)},
            "scheduler": type(scheduler).__name__,
            "scheduler_config": {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")},
            "steps": self.num_steps,
            "call": call_name(self._given),
        }

    def record(self, clip: Clip, tick: Callable[[], None]) -> Recording:
        """A full run with its outputs.

        Raises:
            ValueError: `call` samples with another number of steps.
        """
        found = record(self.pipe, lambda: self._run(clip, self.num_steps), tick)
        self._check_steps(self.num_steps, found.num_steps)
        return found

    def run_on(
        self, clip: Clip, recording: Recording, step: int, change: torch.Tensor, tick: Callable[[], None]
    ) -> float:
        """A run from a recorded step on, whose output is changed; see `recording.run_on`."""
        return run_on(self.pipe, lambda: self._run(clip, self.num_steps), recording, step, change, tick)

    def sample(self, clip: Clip, config: PABConfig | None, steps: int, tick: Callable[[], None]) -> Sample:
        """A run of a number of steps under `config`, or without PAB.

        Raises:
            ValueError: `call` samples with another number of steps.
        """
        with stepping(self.pipe.scheduler, ticking(tick)) as calls:
            if config is not None:
                api.enable(self.pipe, config)
            try:
                result, seconds = timed(lambda: self._run(clip, steps))
                if config is None or steps != self.num_steps:  # steps that are taken again count as well
                    self._check_steps(steps, calls.taken)
                share = 1.0 if config is None else share_of(api.summary(self.pipe), config)
                return Sample(result, share * steps / self.num_steps, seconds)
            finally:
                if config is not None:
                    api.disable(self.pipe)

    def sums(self, clip: Clip, config: PABConfig, tick: Callable[[], None]) -> Sums:
        """A full run, with the sums that fit the weights of `config`; see `fitting.sums_of`."""
        return sums_of(self.pipe, config, lambda: self._run(clip, self.num_steps), progress=lambda *_: tick())

    def _check_steps(self, wanted: int, taken: int) -> None:
        """Image-to-image takes fewer steps than the schedule has, and schedulers of second order take more."""
        made = getattr(self.pipe.scheduler, "num_inference_steps", None)
        if made is not None and wanted not in (made, taken):
            raise ValueError(
                f"call made a schedule of {made} steps and took {taken} where num_steps={wanted} was asked; pass "
                "num_steps on to the pipeline, or give calibrate the number of steps that call takes"
            )


def share_of(summary: Summary, config: PABConfig) -> float:
    """FLOPs of a run as a share of those of the full one; of the calls, where FLOPs are not known."""
    tallies = [kinds["model"] for kinds in summary.contexts.values() if "model" in kinds]
    calls = sum(t.computed + t.reused for t in tallies)
    whole = all(kind == "model" for kind, _ in config.broadcasts())
    if calls and (whole or not summary.flops_without):
        return sum(t.computed for t in tallies) / calls
    return summary.share


def check_plain(model: torch.nn.Module) -> None:
    """Raise a ValueError if PAB is enabled on a model, or ranks share it."""
    if broadcaster_of(model) is not None:
        raise ValueError(f"PAB is enabled on this {type(model).__name__}; call pab.disable before calibrating it")
    if shared(model) is not None:
        raise ValueError(
            f"this {type(model).__name__} is parallel; call pab.unparallelize first, as a config is for any number of "
            "ranks"
        )


def kinds_of(model: torch.nn.Module) -> frozenset[str]:
    """The kinds of a model's sublayers; none where none are found."""
    try:
        return frozenset(sublayer.kind for sublayer in api.sublayers(model))
    except TypeError:
        return frozenset()


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    """What tells a model from another: its class, and a hash of the sums of its parameters and buffers."""
    parameters = list(model.parameters())
    held = [t for t in (*parameters, *model.buffers()) if not t.is_meta]
    sums = [(str(t.dtype), tuple(t.shape), t.detach().double().sum().item()) for t in held]
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else None,
        "weights": hashlib.sha256(repr(sums).encode()).hexdigest()[:16],
    }


def call_name(given: Call | None) -> str | None:
    """The name of a user's function."""
    return None if given is None else getattr(given, "__qualname__", type(given).__qualname__)


def timed(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What `run` returns, and its seconds until CUDA devices are done."""
    begin = time.perf_counter()
    result = run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result, time.perf_counter() - begin


def checked(result: Any) -> torch.Tensor:
    """The result of a user's function, on the host.

    Raises:
        TypeError: it is no tensor of floating-point numbers.
        ValueError: it is not finite.
    """
    if not isinstance(result, torch.Tensor):
        raise TypeError(
            f"call must return a tensor, got {type(result).__name__}; return the frames or the final sample"
        )
    if not result.is_floating_point():
        raise TypeError(
            f"call must return floating-point numbers, got {result.dtype}; divide by the white of its frames"
        )
    if not result.isfinite().all():
        raise ValueError("call returned numbers that are not finite; try dtype bfloat16 or float32")
    return result.detach().float().cpu()


def ticking(tick: Callable[[], None]) -> Step:
    """A step that steps as it is given."""

    def step(index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        tick()
        return output

    return step
