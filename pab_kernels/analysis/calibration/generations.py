"""The generations of a calibration: counted, kept and repeated from what was kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...progress import RunProgress
from ...rules.config import PABConfig
from ..ctrl_c import CtrlC
from ..quality.psnr_ssim import psnr
from .fitting import Sums
from .influence import Influence
from .recording import Recording
from .sampler import Clip, Sampler
from .store import Store


@dataclass(frozen=True)
class Full:
    """A full run.

    Args:
        result: what the call returned.
        seconds: of the call.
    """

    result: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class Way:
    """A way to sample.

    Args:
        title: for progress and reports.
        config: PAB's rules; None without PAB.
        num_steps: that the call gets.
        share: of the FLOPs of the full run, as expected.
    """

    title: str
    config: PABConfig | None
    num_steps: int
    share: float


@dataclass
class Generations:
    """Runs generations, or returns what was kept of them.

    Args:
        sampler: runs them.
        store: keeps them.
        values: of black and white in the results, for PSNR.
        total: generations that will be run, for progress.
        stop: counts Ctrl-C.
        progress: called at every step.
    """

    sampler: Sampler
    store: Store
    values: tuple[float, float]
    total: float
    stop: CtrlC
    progress: RunProgress | None = None
    spent: float = 0.0
    """Generations counted so far, by their FLOPs as shares of a full one; also those that were kept from before."""
    num_steps: int = 0
    """Steps of a full run, once one was recorded."""
    _ticks: int = field(default=0, repr=False)
    _counted: set[str] = field(default_factory=set, repr=False)

    def record(self, clip: Clip) -> Recording:
        """A full run with its outputs."""
        name = self._name(clip, what="record")
        kept = self.store.get(name)
        if kept is None:
            found = self._run("recording", 1.0, lambda tick: self.sampler.record(clip, tick))
            kept = {
                "outputs": found.outputs,
                "samples": found.samples,
                "result": found.result,
                "start": found.start,
                "influence": found.influence.to_dict(),
                "begin": found.begin,
            }
            self.store.put(name, kept)
        self.spent += 1.0
        influence = Influence.from_dict(kept["influence"])
        self.num_steps = influence.num_steps
        self._check_values(kept["result"])
        return Recording(kept["outputs"], kept["samples"], kept["result"], kept["start"], influence, kept["begin"])

    def full(self, clip: Clip) -> Full:
        """A full run."""
        name = self._name(clip, what="full")
        kept = self.store.get(name)
        if kept is None:
            steps = self.sampler.num_steps
            sample = self._run("full run", 1.0, lambda tick: self.sampler.sample(clip, None, steps, tick))
            kept = {"result": sample.result, "seconds": sample.seconds}
            self.store.put(name, kept)
        self.spent += 1.0
        self._check_values(kept["result"])
        return Full(kept["result"], kept["seconds"])

    def run_on(self, clip: Clip, recording: Recording, step: int, change: torch.Tensor) -> float:
        """A run from a recorded step on; see `recording.run_on`."""
        share = run_on_share(step, recording.num_steps)
        name = self._name(clip, what="run on", step=step)
        kept = self.store.get(name)
        if kept is None:
            title = f"gain at step {step}"
            found = self._run(title, share, lambda tick: self.sampler.run_on(clip, recording, step, change, tick))
            kept = {"final": found}
            self.store.put(name, kept)
        self.spent += share
        return float(kept["final"])

    def fitted(self, clip: Clip, config: PABConfig) -> PABConfig:
        """A config with weights fitted to a full run."""
        name = self._name(clip, what="sums", config=config.to_dict())
        kept = self.store.get(name)
        if kept is None:
            kept = self._run("fitting", 1.0, lambda tick: self.sampler.sums(clip, config, tick)).to_dict()
            self.store.put(name, kept)
        self.spent += 1.0
        return Sums.from_dict(kept).fitted(config)

    def measure(self, clip: Clip, way: Way, full: torch.Tensor) -> Measured:
        """A run against the full run's result."""
        rules = None if way.config is None else way.config.to_dict()
        name = self._name(clip, what="way", config=rules, num_steps=way.num_steps)
        kept = self.store.get(name)
        if kept is None:
            title = f"measuring {way.title}"
            sample = self._run(
                title, way.share, lambda tick: self.sampler.sample(clip, way.config, way.num_steps, tick)
            )
            kept = {"result": sample.result, "share": sample.share, "seconds": sample.seconds}
            self.store.put(name, kept)
        if name not in self._counted:
            self._counted.add(name)
            self.spent += kept["share"]
        return Measured(self.psnr(kept["result"], full), kept["share"], kept["seconds"], kept["result"])

    def psnr(self, result: torch.Tensor, full: torch.Tensor) -> float:
        """PSNR in dB of a result; `EQUAL` where nothing differs."""
        black, white = self.values
        found = psnr(float(((result.double() - full.double()) / (white - black)).square().mean()))
        return min(found, EQUAL)

    def _check_values(self, result: torch.Tensor) -> None:
        black, white = self.values
        lo, hi = float(result.min()), float(result.max())
        if min(lo - black, white - hi) < -_OVERSHOOT * (white - black):
            raise ValueError(
                f"results are numbers from {lo:.4g} to {hi:.4g}, and values=({black:g}, {white:g}); give black and "
                "white of the results"
            )

    def _name(self, clip: Clip, **made_by: Any) -> str:
        return self.store.name(prompt=clip.prompt, seed=clip.seed, **made_by)

    def _run(self, title: str, share: float, run: Callable[[Callable[[], None]], Any]) -> Any:
        self._ticks = 0

        def tick() -> None:
            self._ticks += 1
            if self.progress:
                steps = self.num_steps or max(self._ticks, 1)
                here = min(self._ticks / steps, 1.0) * share
                self.progress(title, round(100 * (self.spent + here)), round(100 * max(self.total, self.spent + here)))

        with self.stop.interruptible():
            return run(tick)


_OVERSHOOT = 0.1
"""Part of the values by which a result may lie outside of them, as that of a decoder without a clamp does."""
EQUAL = 120.0
"""The PSNR, in dB, at which results count as equal."""


@dataclass(frozen=True)
class Measured:
    """A run against the full run.

    Args:
        psnr: in dB, at most `EQUAL`.
        share: of the full run's FLOPs.
        seconds: of the call.
        result: what the call returned.
    """

    psnr: float
    share: float
    seconds: float
    result: torch.Tensor = field(repr=False)


def run_on_share(step: int, num_steps: int) -> float:
    """The share of a generation that a run from a recorded step on costs: its first step, and those after `step`."""
    return (num_steps - step) / num_steps


def decibels(squared_error: float) -> float:
    """A mean square in dB."""
    return -10 * math.log10(max(squared_error, 1e-12))
