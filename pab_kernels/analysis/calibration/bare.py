"""The runs that a calibration needs, on a bare module that a user's function samples with."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from ... import api
from ...broadcast.attach import attach_forward
from ...broadcast.inputs import Signature
from ...compat import uncompiled
from ...messages import first_line
from ...rules.config import PABConfig
from .fitting import Sums, sums_of
from .influence import Influence
from .recording import Recording, check_repeated, rms
from .sampler import Call, Clip, Sample, call_name, check_plain, checked, fingerprint, kinds_of, share_of, timed


class ModuleSampler:
    """Runs a module; its outputs stand in for those of a scheduler's step, and have no samples or coordinates.

    Args:
        model: the DiT.
        num_steps: of a sampling.
        given: `call(model, prompt, seed)`, which samples once.
        reuse: "linear" or "hold".

    Raises:
        ValueError: PAB is enabled on the model.
    """

    def __init__(self, model: nn.Module, num_steps: int, given: Call, reuse: str = "linear") -> None:
        self.model: nn.Module = uncompiled(model)
        check_plain(self.model)
        self.num_steps, self._given, self.reuse = num_steps, given, reuse
        self.kinds = kinds_of(self.model)
        self.takes_steps = "num_steps" in inspect.signature(given).parameters

    def _run(self, clip: Clip, steps: int) -> torch.Tensor:
        extra = {"num_steps": steps} if self.takes_steps else {}
        return checked(self._given(self.model, clip.prompt, clip.seed, **extra))

    def describe(self) -> dict[str, Any]:
        """What all runs have in common, JSON-ready."""
        called = call_name(self._given)
        return {"models": {"": fingerprint(self.model)}, "steps": self.num_steps, "call": called}

    @contextlib.contextmanager
    def _enabled(self, config: PABConfig, steps: int, calls: Callable[..., Any]) -> Iterator[None]:
        """PAB with `calls` in place of the model's forward: also without rules, so that `pab.context` works."""
        api.enable(self.model, config, num_steps=steps)
        attached = attach_forward(self.model, calls)
        try:
            attached.attach()
            yield
        finally:
            attached.detach()
            api.disable(self.model)

    def record(self, clip: Clip, tick: Callable[[], None]) -> Recording:
        """A full run with its outputs: those of all calls of a step one after the other.

        Raises:
            ValueError: the number of calls is no multiple of the number of steps.
        """
        made: list[torch.Tensor] = []
        started: list[torch.Tensor] = []
        signature = Signature(self.model)

        def calls(forward: Any, *args: Any, **kwargs: Any) -> Any:
            if not started:
                latents = _numbers(signature.latents(args, kwargs))
                started.append(torch.cat([torch.zeros(0), *(t.detach().flatten().float().cpu() for t in latents)]))
            out = forward(*args, **kwargs)
            made.append(torch.cat([t.detach().flatten().cpu() for t in _numbers(out)]))
            tick()
            return out

        with self._enabled(PABConfig(), self.num_steps, calls):
            result = self._run(clip, self.num_steps)
        if not made or len(made) % self.num_steps:
            raise ValueError(
                f"call made {len(made)} calls of the {type(self.model).__name__}, with num_steps={self.num_steps}; "
                "supported is the same number of calls in every step"
            )
        each = len(made) // self.num_steps
        outputs = torch.stack([torch.cat(made[i : i + each]) for i in range(0, len(made), each)])
        final = result.flatten()
        return Recording(outputs, final[None], result, started[0], self._influence(), 0)

    def _influence(self) -> Influence:
        """Nothing is known of it: what an output does to the result is measured as its gain."""
        count = self.num_steps
        return Influence(np.zeros((count + 1, count)), (None,) * count, tuple(range(count)), corrects=False)

    def run_on(
        self, clip: Clip, recording: Recording, step: int, change: torch.Tensor, tick: Callable[[], None]
    ) -> float:
        """A run from a recorded step on, whose output is changed; the model runs at the first step and after `step`."""
        row = (recording.outputs[step].double() + change.double()).to(recording.outputs.dtype)
        replayed = [*recording.outputs[:step], row]
        templates: list[Any] = []
        seen = 0

        def calls(forward: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            numbers = [t.numel() for t in templates for t in _numbers(t)]
            if seen == 0 and sum(numbers) < recording.outputs.shape[1]:
                templates.append(forward(*args, **kwargs))
                if sum(t.numel() for made in templates for t in _numbers(made)) == recording.outputs.shape[1]:
                    seen = len(templates)
                    numbers_of = [t.detach().flatten().cpu() for made in templates for t in _numbers(made)]
                    check_repeated(torch.cat(numbers_of), recording.outputs[0])
                    tick()
                return templates[-1]
            place, index = divmod(seen, len(templates))
            seen += 1
            if place > step:
                tick()
                return forward(*args, **kwargs)
            before = sum(t.numel() for made in templates[:index] for t in _numbers(made))
            return _filled(templates[index], replayed[place], before)

        with self._enabled(PABConfig(), self.num_steps, calls):
            result = self._run(clip, self.num_steps)
        return rms(result.double() - recording.result.double())

    def sample(self, clip: Clip, config: PABConfig | None, steps: int, tick: Callable[[], None]) -> Sample:
        """A run of a number of steps under `config`, or without PAB.

        Raises:
            ValueError: `call` samples with another number of steps.
        """

        def calls(forward: Any, *args: Any, **kwargs: Any) -> Any:
            tick()
            return forward(*args, **kwargs)

        with self._enabled(config or PABConfig(), steps, calls):
            try:
                result, seconds = timed(lambda: self._run(clip, steps))
            except RuntimeError as error:
                if steps == self.num_steps:
                    raise
                raise ValueError(
                    f"call failed with num_steps={steps}: {first_line(error)}; pass num_steps on to its loop"
                ) from error
            share = 1.0 if config is None else share_of(api.summary(self.model), config)
        return Sample(result, share * steps / self.num_steps, seconds)

    def sums(self, clip: Clip, config: PABConfig, tick: Callable[[], None]) -> Sums:
        """A full run, with the sums that fit the weights of `config`; see `fitting.sums_of`."""
        count = self.num_steps
        return sums_of(self.model, config, lambda: self._run(clip, count), num_steps=count, progress=lambda *_: tick())


def _numbers(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors of an output."""
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _filled(output: Any, row: torch.Tensor, start: int) -> Any:
    """An output with its numbers from a row, from `start` on."""

    def filled(leaf: Any) -> Any:
        nonlocal start
        if not (isinstance(leaf, torch.Tensor) and leaf.is_floating_point()):
            return leaf
        part = row[start : start + leaf.numel()]
        start += leaf.numel()
        return part.view(leaf.shape).to(leaf.device, leaf.dtype)

    return pytree.tree_map(filled, output)
