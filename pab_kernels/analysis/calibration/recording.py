"""Recording full runs of a pipeline, and running on from a recorded step whose output is changed."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ... import api
from ...broadcast.attach import Attached
from ...broadcast.forecaster import arguments_of, is_unchanged, latents_of, version_of
from ...broadcast.pipeline import denoisers, left_at
from ...rules.config import Broadcast, PABConfig
from .influence import Influence, Steps


@dataclass(frozen=True)
class Recording:
    """A full run.

    Args:
        outputs: V, `[K, ...]`: the guided outputs that the scheduler's `step` got, on the host.
        samples: X, `[K + 1, ...]`: its samples; the last one is the final sample.
        result: what the call returned.
        start: the noise that it began from.
        influence: of the outputs on the samples.
        begin: the step of the schedule at which the run entered it.
    """

    outputs: torch.Tensor
    samples: torch.Tensor
    result: torch.Tensor
    start: torch.Tensor
    influence: Influence
    begin: int

    @property
    def num_steps(self) -> int:
        """K, the steps that were taken."""
        return len(self.outputs)

    def gram(self) -> torch.Tensor:
        """Mean products of V_0 .. V_(K-1), X_0 .. X_(K-1), `[2K, 2K]`, float64; without samples `[K, K]`."""
        tensors = [t.flatten() for t in (*self.outputs, *self.samples[:-1])]
        size = len(tensors[0])
        total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64)
        for start in range(0, size, _PART):
            part = torch.stack([t[start : start + _PART].double() for t in tensors])
            total += part @ part.T
        return total / size


_PART = 2**16
"""Elements of each tensor that are widened at once."""

Step = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Gets the number of a step, its output and sample; returns the output to step with."""


@contextlib.contextmanager
def stepping(scheduler: Any, step: Step) -> Iterator[_Calls]:
    """Call `step` in every step of the scheduler while the block runs.

    Yields:
        What is known of the calls.
    """
    calls = _Calls(scheduler, step)
    attached = Attached(scheduler, "step", calls.called)
    try:
        attached.attach()
        yield calls
    finally:
        attached.detach()


class _Calls:
    """Calls of a scheduler's `step`."""

    def __init__(self, scheduler: Any, step: Step) -> None:
        self._scheduler, self._step = scheduler, step
        self._before: Any = None
        self._given: list[inspect.BoundArguments] = []
        self._handed: list[dict[str, int]] = []
        self._returned: tuple[torch.Tensor, int] | None = None
        self._parts: tuple[Any, ...] = ()
        self._as_returned = True
        self.final: torch.Tensor | None = None
        self.shape: tuple[int, ...] = ()
        self.device = torch.device("cpu")

    @property
    def taken(self) -> int:
        """Steps until now."""
        return len(self._given)

    def called(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In place of `step`."""
        given = arguments_of(self._scheduler, original, args, kwargs)
        output, sample = given.arguments["model_output"], given.arguments["sample"]
        if self._before is None:
            self._before, self.shape, self.device = copy.deepcopy(self._scheduler), tuple(sample.shape), sample.device
        elif self._returned is not None and not is_unchanged(sample, self._returned):
            self._as_returned = False
        given.arguments |= {"model_output": self._step(len(self._given), output, sample)}
        result = original(*given.args, **given.kwargs)
        given.arguments |= {"model_output": None, "sample": None}
        tensors = {n: v for n, v in given.arguments.items() if isinstance(v, torch.Tensor) and v.ndim}
        self._handed.append({n: i for n, v in tensors.items() for i, part in enumerate(self._parts) if v is part})
        self._given.append(given)
        self.final = latents_of(result)
        self._returned = self.final, version_of(self.final)
        self._parts = result if isinstance(result, tuple) else ()
        return result

    def steps(self) -> Steps:
        """The calls, to be repeated.

        Raises:
            ValueError: there were none.
        """
        if self._before is None:
            raise ValueError(
                f"the pipeline did not step its {type(self._scheduler).__name__}, and its outputs cannot be recorded; "
                "calibrate needs a pipeline that calls pipe.scheduler.step"
            )
        begin = len(self._scheduler.timesteps) - len(self._given)
        return Steps(
            self._before,
            tuple(self._given),
            tuple(self._handed),
            self.shape,
            self.device,
            self._as_returned,
            max(begin, 0),
        )


def record(pipe: Any, run: Callable[[], torch.Tensor], tick: Callable[[], None]) -> Recording:
    """Record a full run.

    Args:
        pipe: a pipeline on which PAB is not enabled.
        run: samples once with it.
        tick: called in every step.

    Raises:
        ValueError: the pipeline does not step its scheduler, or the scheduler cannot be predicted.
    """
    outputs: list[torch.Tensor] = []
    samples: list[torch.Tensor] = []

    def keep(index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        tick()
        outputs.append(_on_host(output))
        samples.append(_on_host(sample))
        return output

    with stepping(pipe.scheduler, keep) as calls:
        result = run()
    steps = calls.steps()
    assert calls.final is not None
    samples.append(_on_host(calls.final))
    left = min(left_at(pipe, model) for model in denoisers(pipe).values()) - steps.begin
    handover = left if 0 < left < len(outputs) else None
    influence = replace(steps.influence(), handover=handover)
    return Recording(torch.stack(outputs), torch.stack(samples), result, samples[0], influence, steps.begin)


def run_on(
    pipe: Any,
    run: Callable[[], torch.Tensor],
    recording: Recording,
    step: int,
    change: torch.Tensor,
    tick: Callable[[], None],
) -> float:
    """Run from a recorded step on, whose output is changed; nothing of the model runs between steps 0 and `step`.

    Args:
        pipe, run, tick: as in `record`.
        recording: of the same run.
        step: that of the recording, from 1.
        change: of its output, as on the host.

    Returns:
        The root mean square of the change of the final sample.

    Raises:
        ValueError: the samples until `step` are not those of the recording.
    """

    def replaced(index: int, output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        tick()
        if index > step:
            return output
        check_repeated(_on_host(sample), recording.samples[index])
        v = recording.outputs[index]
        v = (v.double() + change.double()).to(v.dtype) if index == step else v
        return v.to(output.device, output.dtype)

    begin, stop = recording.begin, recording.begin + recording.num_steps
    at = (begin, *range(begin + step + 1, stop))
    with stepping(pipe.scheduler, replaced) as calls:
        api.enable(pipe, PABConfig(model=Broadcast(at=at, unit="step")))
        try:
            run()
        finally:
            api.disable(pipe)
    assert calls.final is not None
    moved = _on_host(calls.final).double() - recording.samples[-1].double()
    return rms(moved)


def check_repeated(again: torch.Tensor, recorded: torch.Tensor) -> None:
    """Raise a ValueError if a run did not come to the numbers of a recording of the same prompt and seed."""
    if again.shape != recorded.shape or rms(again.double() - recorded.double()) > _SAME * rms(recorded.double()):
        raise ValueError(
            "two runs with the same prompt and seed differ before anything is changed; draw all noise of call from "
            "torch.Generator().manual_seed(seed), that of a scheduler's step too"
        )


_SAME = 0.02
"""The relative difference up to which runs count as repeated: kernels that add in any order differ by less."""


def check_seeds(recordings: Sequence[Recording]) -> None:
    """Raise a ValueError if runs with different seeds began from the same noise."""
    first = recordings[0].start
    if first.numel() and any(torch.equal(first, other.start) for other in recordings[1:]):
        raise ValueError(
            "runs with different seeds begin from the same noise; draw it in call from "
            "torch.Generator().manual_seed(seed)"
        )


def rms(t: torch.Tensor) -> float:
    """The root mean square."""
    return float(t.square().mean().sqrt())


def _on_host(t: torch.Tensor) -> torch.Tensor:
    return t.detach().to("cpu", copy=True)
