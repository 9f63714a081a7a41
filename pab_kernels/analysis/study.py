"""`analyze`: the study that broadcasting rests on, on any pipeline or bare module."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..adapters import adapter_for
from ..broadcast.broadcaster import ATTRIBUTE, Broadcaster, broadcaster_of
from ..broadcast.config import KINDS, PABConfig
from .differences import Differences, Probe, Progress
from .starting_config import MIDDLE, Start, starting_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a measurement.

    Args:
        analysis: of the steps that were run.
    """

    def __init__(self, analysis: Analysis) -> None:
        super().__init__("interrupted")
        self.analysis = analysis


@dataclass(frozen=True)
class Analysis:
    """What was measured.

    Args:
        model: name of the model's class.
        num_steps: of the schedule.
        timesteps: of the schedule, where they are known.
        complete: whether the sampling came to its end.
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
        """Step by step the mean over layers and contexts; `what` is "relative" or "mse"."""
        rows = [getattr(d, what) for d in self.differences if d.kind == kind]
        return tuple(_mean([row[i] for row in rows]) for i in range(self.num_steps))

    def layers(self, kind: str, what: str = "relative") -> dict[int, tuple[float | None, ...]]:
        """`curve` for each layer by itself."""
        rows = [(d.layer, getattr(d, what)) for d in self.differences if d.kind == kind]
        return {
            layer: tuple(_mean([row[i] for at, row in rows if at == layer]) for i in range(self.num_steps))
            for layer in sorted({at for at, _ in rows})
        }

    @property
    def start(self) -> Start | None:
        """A config to start from; None where too few steps were run. See `starting_config`."""
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
        """Write all of it as JSON."""
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw a curve for each kind, steps from left to right. Needs matplotlib."""
        from .difference_plots import plot_curves

        return plot_curves(self, path)

    def plot_layers(self, path: str | Path | None = None) -> Figure:
        """Draw a heat map for each kind, layer by step. Needs matplotlib."""
        from .difference_plots import plot_layers

        return plot_layers(self, path)

    def parts(self, kind: str, what: str = "relative") -> tuple[float | None, float | None, float | None]:
        """Mean of the curve over the first 15 %, the middle and the last 15 % of the steps."""
        curve, (lo, hi) = self.curve(kind, what), (round(share * self.num_steps) for share in MIDDLE)
        return _mean(curve[:lo]), _mean(curve[lo:hi]), _mean(curve[hi:])

    def __str__(self) -> str:
        lines = [
            f"{self.model}, {self.num_steps} steps: differences of outputs between neighbouring steps, mean over layers"
            + ("" if self.complete else "; interrupted: only of the steps that were run"),
            f"{'':<9}{'relative: first 15 %':>21}{'middle':>9}{'last 15 %':>11}{'squared: middle':>18}",
        ]
        for kind in self.kinds:
            cells = [*self.parts(kind), self.parts(kind, "mse")[1]]
            texts = ["-" if c is None else f"{c:.{digits}}" for c, digits in zip(cells, ("3f", "3f", "3f", "2e"), strict=True)]
            lines.append(f"{kind:<9}" + "".join(f"{text:>{width}}" for text, width in zip(texts, (21, 9, 11, 18), strict=True)))
        start = self.start
        if start is None:
            return "\n".join(lines)
        ranges = ", ".join(f"{kind} {rule.range}" for kind, rule in start.config.broadcasts())
        lines.append(f"differences stay small in steps {start.window[0]} to {start.window[1] - 1}; ranges to start from: {ranges}")
        if not start.follows_order:
            lines.append(
                "note: here spatial, temporal and cross do not differ in the published order; the ranges follow that order all the same"
            )
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
    """Measure how much the outputs of all sublayers differ from step to step while `run()` samples, without broadcasting.

    Args:
        model_or_pipe: a diffusers pipeline, or the DiT itself.
        run: samples once with it. In a loop of your own, `pab.context(model, name)` names the branches as usual; without names they are
            told apart by their order within a step.
        num_steps: of `run`, for a bare module; a pipeline's scheduler tells it.
        kinds: as in `pab.enable`.
        progress: called at every step with the number of steps begun and of all.

    Raises:
        Interrupted: Ctrl-C; its `analysis` has what was measured until then.
        ValueError: PAB is enabled on the model, the number of steps is missing, or the model was not called.
        TypeError: no sublayers are found in the model.
    """
    pipe = None if isinstance(model_or_pipe, nn.Module) else model_or_pipe
    given: Any = model_or_pipe if pipe is None else getattr(pipe, "transformer", None)
    if not isinstance(given, nn.Module):
        raise TypeError(f"got {type(model_or_pipe).__name__}; supported are a torch.nn.Module and a pipeline with a `transformer`")
    model: nn.Module = getattr(given, "_orig_mod", given)
    if broadcaster_of(model) is not None:
        raise ValueError(f"PAB is enabled on this {type(model).__name__}: what is reused does not differ; pab.disable it first")
    if (pipe is None) != (num_steps is not None):
        raise ValueError("num_steps is needed for a bare module, and only there: a pipeline's scheduler tells it")
    probe = Probe(model, adapter_for(model, kinds), progress)
    broadcaster = Broadcaster(model, probe, PABConfig())
    setattr(model, ATTRIBUTE, broadcaster)
    complete = False
    try:
        broadcaster.attach()
        if pipe is None:
            broadcaster.prepare(num_steps=num_steps)
        else:
            broadcaster.watch(pipe)
        with torch.no_grad():
            run()
        complete = True
    except KeyboardInterrupt:
        raise Interrupted(_analysis(model, probe, complete)) from None
    finally:
        broadcaster.detach()
        delattr(model, ATTRIBUTE)
    if not probe.num_steps:
        raise ValueError(f"run() did not call the {type(model).__name__}: there is nothing to compare")
    return _analysis(model, probe, complete)


def _analysis(model: nn.Module, probe: Probe, complete: bool) -> Analysis:
    return Analysis(type(model).__name__, probe.num_steps, probe.timesteps, complete, tuple(probe.differences()))
