"""The demo: the same clips from the same noise without PAB, with it, with diffusers' PAB, and with fewer steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .adapters.latte import LatteAdapter
from .analysis import video
from .analysis.ctrl_c import CtrlC, ctrl_c
from .analysis.diffusers_pab import diffusers_pab
from .analysis.forecasts.measure import measure
from .analysis.forecasts.model_calls import MODEL_CALLS, Size
from .analysis.pipelines import usable_device
from .analysis.quality.comparison import Comparison, compare
from .analysis.sampling import Sampled, check_seed, in_words, sample
from .broadcast.costs import on_meta
from .compat import execution_device
from .files import path_of, write_text
from .models.demo.check import shows
from .models.demo.pipeline import GUIDANCE, SCHEDULERS, STEPS, DemoPipeline, calibrated, load
from .models.demo.shapes import FRAMES, SIZE, VOCABULARY, Caption, parse
from .progress import RunProgress
from .rules.config import PABConfig
from .rules.costs import Cost
from .rules.plan import Counts, Plan
from .rules.schedule import check_steps
from .strict_json import to_json

PROMPTS = (
    "a red circle moves right at night",
    "a purple column moves up at day",
    "a white bar moves left at dawn",
)
"""Captions that training never saw: one of each shape and background."""
PAPER = (2, 4, 6)
COUNTED_KINDS = ("model", "spatial", "temporal", "cross", "mlp")
"""The kinds whose calls the demo counts."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs.

    Args:
        prompts: one for each clip, of the demo model's vocabulary.
        seed: of the first clip's noise; clip i has seed + i.
        steps: sampling steps.
        ranges: spatial, temporal, cross and optionally MLP range of an additional run.
        scheduler: one of the demo model's schedulers.
        guidance: scale of classifier-free guidance.
        device: default CUDA where there is one, else the CPU.

    Raises:
        ValueError: a value is not supported.
    """

    prompts: tuple[str, ...] = PROMPTS
    seed: int = 0
    steps: int = STEPS
    ranges: tuple[int, ...] | None = None
    scheduler: str = "ddim"
    guidance: float = GUIDANCE
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("the demo needs at least one prompt")
        for prompt in self.prompts:
            parse(prompt)
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}")
        check_steps(self.steps)
        check_seed(self.seed, len(self.prompts))
        if self.ranges is not None and (len(self.ranges) not in (3, 4) or min(self.ranges) < 1):
            got = ",".join(map(str, self.ranges))
            expected = "three or four whole numbers of at least 1: spatial,temporal,cross[,mlp]"
            raise ValueError(f"ranges must be {expected}; got {got}")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"the demo model has no scheduler {self.scheduler!r}; it has {', '.join(SCHEDULERS)}")
        variants(self)  # refuses ranges that no rule has
        usable_device(self.device)

    @property
    def captions(self) -> list[Caption]:
        """The parsed prompts."""
        return [parse(prompt) for prompt in self.prompts]

    @property
    def seeds(self) -> range:
        """The seeds of the clips."""
        return range(self.seed, self.seed + len(self.prompts))


@dataclass(frozen=True)
class Variant:
    """One way to sample the clips.

    Args:
        key: its name in files.
        title: its name in tables.
        config: PAB's, or None.
        diffusers: ranges of diffusers' own PAB, or None.
        like: key of the run whose FLOPs this run spends on fewer steps, all computed; or None.
    """

    key: str
    title: str
    config: PABConfig | None = None
    diffusers: tuple[int, int, int] | None = None
    like: str | None = None


@dataclass(frozen=True)
class DemoRun:
    """The run of one variant.

    Args:
        variant: of the run.
        steps: sampling steps.
        calls: calls of the transformer: more than `steps` for second-order schedulers.
        sampled: clips `[clips, frames, 3, height, width]` in [0, 1], seconds, memory, PAB's summary.
        flops: of the transformer.
        counts: computed and reused calls by kind; if a rule is for some layers, those of one of them.
        cache_bytes: the peak size of the kept outputs.
        shown: number of clips that show their caption.
        quality: of each clip against the run without PAB; empty for that run itself.
    """

    variant: Variant
    steps: int
    calls: int
    sampled: Sampled[torch.Tensor]
    flops: int
    counts: Mapping[str, Counts]
    cache_bytes: int
    shown: int
    quality: tuple[Comparison, ...] = ()

    @property
    def plan(self) -> Plan | None:
        """PAB's plan."""
        return None if self.sampled.summary is None else self.sampled.summary.plan

    @property
    def frames_per_second(self) -> float:
        """Frames of all clips by seconds."""
        return self.sampled.output.shape[0] * self.sampled.output.shape[1] / self.sampled.seconds

    @property
    def title(self) -> str:
        """The variant's title, with the number of steps if the variant is fewer steps."""
        return f"{self.steps} {self.variant.title}" if self.variant.like else self.variant.title

    def each(self, measure: str) -> list[float]:
        """The clips' "psnr" (in dB, infinite for equal clips) or "ssim"."""
        return [getattr(comparison.total, measure) for comparison in self.quality]

    def spread(self, measure: str) -> tuple[float, float]:
        """Mean and standard deviation of the clips' "psnr" or "ssim"."""
        values = self.each(measure)
        if not values or not all(map(math.isfinite, values)):
            return (math.inf if values else math.nan), 0.0
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class DemoResult:
    """All finished runs, the one without PAB first.

    Args:
        settings: of the demo.
        runs: the finished ones.
        interrupted: whether Ctrl-C stopped the demo.
        weights: training and sha256 of the weights file.
        device: its name.
    """

    settings: DemoSettings
    runs: tuple[DemoRun, ...]
    interrupted: bool
    weights: dict[str, str]
    device: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        s = self.settings
        return {
            "prompts": list(s.prompts),
            "seeds": list(s.seeds),
            "scheduler": s.scheduler,
            "guidance": s.guidance,
            "device": self.device,
            "torch": torch.__version__,
            "weights": self.weights,
            "interrupted": self.interrupted,
            "runs": [_record(run, self.runs[0]) for run in self.runs],
        }


def _record(run: DemoRun, reference: DemoRun) -> dict[str, Any]:
    def measured(measure: str) -> dict[str, Any] | None:
        if not run.quality:
            return None
        values = (*run.spread(measure), *run.each(measure))
        finite = [round(v, 5) if math.isfinite(v) else None for v in values]  # null: equal to the reference
        return {"mean": finite[0], "std": finite[1], "clips": finite[2:]}

    return {
        "key": run.variant.key,
        "title": run.title,
        "config": run.variant.config.to_dict() if run.variant.config else None,
        "steps": run.steps,
        "calls": run.calls,
        "computed": {kind: c.computed for kind, c in run.counts.items()},
        "reused": {kind: c.reused for kind, c in run.counts.items()},
        "seconds": round(run.sampled.seconds, 3),
        "frames_per_second": round(run.frames_per_second, 3),
        "speedup": round(run.sampled.speedup(reference.sampled), 3),
        "flops": run.flops,
        "flops_share": round(run.flops / reference.flops, 4),
        "psnr": measured("psnr"),
        "ssim": measured("ssim"),
        "captions_shown": run.shown,
        "cache_bytes": run.cache_bytes,
    }


def variants(settings: DemoSettings) -> list[Variant]:
    """The runs that the demo compares, in order."""
    name = "/".join(map(str, PAPER))
    plan = calibrated(settings.scheduler, settings.steps, settings.guidance)
    best = Variant("fast", "PAB fast", PABConfig.preset("fast"))
    if plan is not None:
        best = Variant("calibrated", "PAB calibrated", plan)
    listed = [
        Variant("full", "no PAB"),
        best,
        Variant("balanced", "PAB balanced", PABConfig.preset("balanced")),
        Variant("pab246", f"PAB {name}", PABConfig.preset("pab246")),
        Variant("diffusers246", f"diffusers {name}", diffusers=PAPER),
    ]
    if settings.ranges:
        spatial, temporal, cross, *mlp = settings.ranges
        config = PABConfig(spatial=spatial, temporal=temporal, cross=cross, mlp=mlp[0] if mlp else None)
        listed.append(Variant("ranges", f"PAB {'/'.join(map(str, settings.ranges))}", config))
    return [
        *listed,
        Variant(f"fewer-{best.key}", f"steps, as {best.key}", like=best.key),
        Variant("fewer-balanced", "steps, as balanced", like="balanced"),
    ]


def _costs(transformer: Any, batch: int) -> tuple[dict[str, Cost], int]:
    """Costs of a call of the transformer without PAB: of each sublayer, and the FLOPs of the rest."""
    latents, text = Size(FRAMES, SIZE, SIZE), len(VOCABULARY)
    inputs = MODEL_CALLS[type(transformer).__name__].tensors(
        transformer.config, batch, latents, text, transformer.dtype
    )
    return measure(on_meta(transformer), inputs, LatteAdapter(transformer).sublayers).costs()


def _run(
    demo: DemoPipeline,
    settings: DemoSettings,
    variant: Variant,
    steps: int,
    costs_of_a_call: tuple[dict[str, Cost], int],
    on_step: Callable[[], None],
    stop: CtrlC,
) -> DemoRun:
    """Sample all clips with one variant."""
    pipe, schedule = demo.pipe, demo.schedule(steps)
    calls = schedule.num_steps
    costs, rest = costs_of_a_call
    flops, cache_bytes = calls * (rest + sum(cost.flops for cost in costs.values())), 0
    counts = {kind: Counts(computed=calls) for kind in COUNTED_KINDS}
    kinds = {sublayer.name: sublayer.kind for sublayer in LatteAdapter(pipe.transformer).sublayers}

    def callback(*_: Any) -> dict[str, Any]:
        on_step()
        return {}

    def generate() -> torch.Tensor:
        with stop.interruptible():
            return demo.generate(settings.captions, settings.seeds, steps, settings.guidance, callback)

    if variant.diffusers is None:
        sampled = sample(pipe, generate, variant.config)
    else:
        with diffusers_pab(pipe, variant.diffusers, schedule) as observed:
            sampled = sample(pipe, generate)
        cache_bytes = observed.cache_bytes
        for name, computed in observed.computed.items():
            flops -= (calls - computed) * costs[name].flops
            counts[kinds[name]] = Counts(computed=computed, reused=calls - computed)
    if (summary := sampled.summary) is not None:
        flops, cache_bytes = summary.flops, summary.peak_cache_bytes
        planned = summary.plan.step_counts() if summary.plan else {}
        counts |= {kind: planned[kind] for kind in COUNTED_KINDS if kind in planned}
    shown = sum(shows(caption, clip) for caption, clip in zip(settings.captions, sampled.output, strict=True))
    return DemoRun(variant, steps, calls, sampled, flops, counts, cache_bytes, shown)


def _fewer(demo: DemoPipeline, full: DemoRun, flops: int) -> int:
    """The fewest steps that reach `flops` if all are computed: rounded up, in favour of fewer steps."""
    return next(n for n in range(1, full.steps + 1) if demo.schedule(n).num_steps * full.flops >= flops * full.calls)


def run_demo(settings: DemoSettings, progress: RunProgress | None = None) -> DemoResult:
    """Run every variant on the same noise; Ctrl-C keeps the finished runs.

    A run with fewer steps is left out if its number of steps was run already, or if PAB saves less than a step.

    Args:
        settings: of the demo.
        progress: called after every step, and for a run that is left out, with the steps of all runs.

    Returns:
        The finished runs.
    """
    with ctrl_c() as stop:
        with stop.interruptible():
            demo = load(settings.scheduler, settings.device)
        runs, interrupted = _finished(demo, settings, stop, progress)
        weights, device = {**demo.training, "sha256": demo.sha256}, in_words(execution_device(demo.pipe))
        return DemoResult(settings, tuple(runs), interrupted, weights, device)


def _finished(
    demo: DemoPipeline, settings: DemoSettings, stop: CtrlC, progress: RunProgress | None
) -> tuple[list[DemoRun], bool]:
    """The finished runs, and whether Ctrl-C stopped the demo."""
    calls, costs = demo.schedule(settings.steps).num_steps, _costs(demo.pipe.transformer, 2 * len(settings.prompts))
    todo = {variant.key: calls for variant in variants(settings)}
    runs: dict[str, DemoRun] = {}
    steps_done = 0

    def report(title: str, steps: int) -> None:
        nonlocal steps_done
        steps_done += steps
        if progress:
            progress(title, steps_done, sum(todo.values()))

    try:
        with stop.interruptible():
            demo.generate(settings.captions, settings.seeds, steps=2, guidance=settings.guidance)  # warm up
        for variant in variants(settings):
            steps, title = settings.steps, variant.title
            if variant.like:
                steps = _fewer(demo, runs["full"], runs[variant.like].flops)
                if steps == settings.steps or any(run.variant.like and run.steps == steps for run in runs.values()):
                    todo[variant.key] = 0
                    report(title, 0)
                    continue
                todo[variant.key] = demo.schedule(steps).num_steps
            run = _run(demo, settings, variant, steps, costs, partial(report, title, 1), stop)
            pairs = zip(run.sampled.output, runs["full"].sampled.output if runs else (), strict=False)
            quality = tuple(compare(clip, other, lpips=False) for clip, other in pairs)
            runs[variant.key] = replace(run, quality=quality)
    except KeyboardInterrupt:
        return list(runs.values()), True
    return list(runs.values()), False


def write(result: DemoResult, folder: str | Path, scale: int = 5) -> list[Path]:
    """Write the figures (JSON), then the clips side by side (GIF, MP4) and each plan as a pyramid (PNG).

    Args:
        result: at least one finished run.
        folder: created if missing.
        scale: factor by which pixels are enlarged.

    Returns:
        The files written.

    Raises:
        OSError: a file cannot be written; the files before it are complete.
    """
    folder = path_of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = write_text(folder / "results.json", to_json(result.to_dict()) + "\n")
    columns = [
        (run.title, run.sampled.seconds, run.spread("psnr")[0] if run.quality else None, run.sampled.output)
        for run in result.runs
    ]
    film = video.side_by_side(video.columns(columns), [str(caption) for caption in result.settings.captions], scale)
    written = [video.write_gif(folder / "clips.gif", film), video.write_mp4(folder / "clips.mp4", film)]
    for run in result.runs:
        if run.plan is not None:
            written.append(folder / f"schedule-{run.variant.key}.png")
            run.plan.plot(str(written[-1]))
    return [*written, figures]
