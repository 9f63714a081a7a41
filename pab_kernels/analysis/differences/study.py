"""`analyze`: the study behind broadcasting, repeated on any pipeline or bare module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...adapters import adapter_for
from ...broadcast.adapter import Adapter
from ...broadcast.attach import take_off
from ...broadcast.broadcaster import ATTRIBUTE, Broadcaster, broadcaster_of
from ...compat import uncompiled
from ...files import write_text
from ...progress import Progress
from ...rules.config import KINDS, PABConfig
from ...strict_json import to_json
from ..ctrl_c import CtrlC, ctrl_c
from .plots import plot_curves, plot_layers
from .probe import Differences, Probe
from .starting_config import Start, middle, starting_config


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a measurement.

    Args:
        analysis: of the steps that were run, possibly none.
    """

    def __init__(self, analysis: Analysis) -> None:
        super().__init__("interrupted")
        self.analysis = analysis


@dataclass(frozen=True)
class Analysis:
    """Differences between the outputs of neighbouring steps.

    Args:
        model: name of the model's class.
        num_steps: of the schedule.
        timesteps: of the schedule, if known.
        complete: whether the sampling was finished.
        differences: of every sublayer in every context.
    """

    model: str
    num_steps: int
    timesteps: tuple[float, ...] | None
    complete: bool
    differences: tuple[Differences, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that were measured."""
        present = {d.kind for d in self.differences}
        return tuple(kind for kind in KINDS if kind in present)

    def curve(self, kind: str, what: str = "relative") -> tuple[float | None, ...]:
        """The mean over layers and contexts at every step; `what` is "relative" or "mse"."""
        rows = [getattr(d, what) for d in self.differences if d.kind == kind]
        return tuple(_mean([row[i] for row in rows]) for i in range(self.num_steps))

    def layers(self, kind: str, what: str = "relative") -> dict[int, tuple[float | None, ...]]:
        """The curve of each layer, by its index."""
        rows = [(d.layer, getattr(d, what)) for d in self.differences if d.kind == kind]
        return {
            layer: tuple(_mean([row[i] for at, row in rows if at == layer]) for i in range(self.num_steps))
            for layer in sorted({at for at, _ in rows})
        }

    @property
    def start(self) -> Start | None:
        """A config to start from, or None if the sampling was not finished; see `starting_config`."""
        relative, mse = ({kind: self.curve(kind, what) for kind in self.kinds} for what in ("relative", "mse"))
        return starting_config(relative, mse, self.num_steps) if self.complete else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        start = self.start
        return {
            "model": self.model,
            "num_steps": self.num_steps,
            "timesteps": self.timesteps,
            "complete": self.complete,
            "curves": {kind: {what: self.curve(kind, what) for what in ("relative", "mse")} for kind in self.kinds},
            "start": None if start is None else start.to_dict(),
            "sublayers": [vars(d) for d in self.differences],
        }

    def save(self, path: str | Path) -> Path:
        """Write the analysis as JSON, with null for a difference that is not finite, and return the path."""
        return write_text(path, to_json(self.to_dict()) + "\n")

    plot = plot_curves
    plot_layers = plot_layers

    def parts(self, kind: str, what: str = "relative") -> tuple[float | None, float | None, float | None]:
        """Means of the curve over the first 15 %, the middle and the last 15 % of the steps."""
        curve, steps = self.curve(kind, what), middle(self.num_steps)
        return _mean(curve[: steps.start]), _mean(curve[steps.start : steps.stop]), _mean(curve[steps.stop :])

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.num_steps} steps: differences of outputs between neighbouring steps, mean over layers"
            + ("" if self.complete else "; interrupted, so only of the steps that were run"),
            f"{'':<9}{'relative: first 15 %':>21}{'middle':>9}{'last 15 %':>11}{'squared: middle':>18}",
        ]
        for kind in self.kinds:
            texts = ["-" if c is None else f"{c:.3f}" for c in self.parts(kind)]
            squared = self.parts(kind, "mse")[1]
            texts.append("-" if squared is None else f"{squared:.2e}")
            lines.append(f"{kind:<9}{texts[0]:>21}{texts[1]:>9}{texts[2]:>11}{texts[3]:>18}")
        start = self.start
        if start is None:
            return "\n".join(lines)
        ranges = ", ".join(f"{kind} {rule.range}" for kind, rule in start.config.broadcasts())
        steps = f"steps {start.window[0]} to {start.window[1] - 1}"
        lines.append(f"differences stay small in {steps}; ranges to start from: {ranges}")
        if not start.follows_order:
            lines.append("note: spatial, temporal and cross do not differ in the published order; the ranges follow it")
        return "\n".join(lines)


def _mean(values: Sequence[float | None]) -> float | None:
    present = [v for v in values if v is not None]
    return sum(present) / len(present) if present else None


def analyze(
    model_or_pipe: Any,
    run: Callable[[], Any],
    *,
    num_steps: int | None = None,
    kinds: Mapping[str, str | None] | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Measure how much the outputs of all sublayers differ from step to step, without broadcasting.

    Args:
        model_or_pipe: a diffusers pipeline, or the DiT itself.
        run: samples once with it. In your own loop, `pab.context(model, name)` names the branches as usual; without
            names, their order within a step identifies them.
        num_steps: of `run`, for a bare module; a pipeline's scheduler has it.
        kinds: as in `pab.enable`.
        progress: called at every step with the number of steps begun and of all steps.

    Returns:
        The differences. `print` shows a table; `plot`, `plot_layers` and `save` write files.

    The first Ctrl-C stops the run before the model's next sublayer, or at its end if none follows; the second stops it
    at once. Both keep the measured steps and restore the model.

    Raises:
        Interrupted: Ctrl-C, or a KeyboardInterrupt of `run`; its `analysis` has the steps that were run.
        ValueError: PAB is enabled on the model, the number of steps is missing, or the model was not called.
        TypeError: no sublayers are found in the model.
    """
    pipe = None if isinstance(model_or_pipe, nn.Module) else model_or_pipe
    given: Any = model_or_pipe if pipe is None else getattr(pipe, "transformer", None)
    if not isinstance(given, nn.Module):
        raise TypeError(
            f"got {type(model_or_pipe).__name__}; supported are a torch.nn.Module and a pipeline with a `transformer`"
        )
    model: nn.Module = uncompiled(given)
    if broadcaster_of(model) is not None:
        raise ValueError(f"PAB is enabled on this {type(model).__name__}; call pab.disable before measuring it")
    if (pipe is None) != (num_steps is not None):
        raise ValueError(
            "num_steps is required for a bare module and not allowed for a pipeline, whose scheduler has it"
        )
    study = _Study(model)
    try:
        with ctrl_c() as stop:
            study.measure(pipe, adapter_for(model, kinds), run, num_steps, progress, stop)
            found = study.analysis()
            if stop.noted:
                raise Interrupted(found)
            return found
    except Interrupted:
        raise
    except BaseException as error:
        if not (study.stop.noted or _is_interrupt(error)):
            raise
        study.detach()
        raise Interrupted(study.analysis()) from error


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error: libraries convert a KeyboardInterrupt in their callbacks to other errors."""
    return error is not None and (
        isinstance(error, KeyboardInterrupt) or _is_interrupt(error.__cause__ or error.__context__)
    )


class _Study:
    """The state of a measurement, which may end at any instruction."""

    def __init__(self, model: nn.Module) -> None:
        self.stop = CtrlC()
        self._model = model
        self._probe: Probe | None = None
        self._broadcaster: Broadcaster | None = None
        self._complete = False

    def measure(
        self,
        pipe: Any,
        adapter: Adapter,
        run: Callable[[], Any],
        num_steps: int | None,
        progress: Progress | None,
        stop: CtrlC,
    ) -> None:
        """Call `run` with a probe in the model."""
        self.stop = stop
        self._probe = Probe(self._model, adapter, progress, stop.check)
        try:
            self._broadcaster = Broadcaster(self._model, self._probe, PABConfig())
            setattr(self._model, ATTRIBUTE, self._broadcaster)
            self._broadcaster.attach()
            if pipe is None:
                self._broadcaster.prepare(num_steps=num_steps)
            else:
                self._broadcaster.watch(pipe)
            with stop.interruptible(patience=1), torch.no_grad():
                run()
            self._complete = True
        finally:
            self.detach()
        if not self._probe.num_steps:
            raise ValueError(f"run() did not call the {type(self._model).__name__}: there is nothing to compare")

    def detach(self) -> None:
        """Remove the probe from the model."""
        if self._broadcaster is not None:
            self._broadcaster.detach()
            take_off(self._model, ATTRIBUTE)
            self._broadcaster = None

    def analysis(self) -> Analysis:
        """The differences measured so far."""
        name, probe = type(self._model).__name__, self._probe
        if probe is None:
            return Analysis(name, 0, None, False, ())
        return Analysis(name, probe.num_steps, probe.timesteps, self._complete, tuple(probe.differences()))
