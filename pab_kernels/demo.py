"""The demo: the same clips from the same noise without PAB, with it, with diffusers' own, and with fewer sampling steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
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
from .analysis.pipelines import usable_device
from .analysis.quality.comparison import Comparison, compare
from .analysis.sampling import check_seed, in_words, sample
from .broadcast.config import PABConfig
from .broadcast.costs import on_meta
from .broadcast.plan import Cost, Counts, Plan
from .broadcast.schedule import check_steps
from .compat import execution_device
from .files import path_of, write_text
from .models.demo.check import shows
from .models.demo.pipeline import GUIDANCE, SCHEDULERS, STEPS, DemoPipeline, load
from .models.demo.shapes import FRAMES, SIZE, VOCABULARY, Caption, parse
from .progress import RunProgress
from .strict_json import to_json

PROMPTS = (
    "a red circle moves right at night",
    "a purple column moves up at day",
    "a white bar moves left at dawn",
)
"""Held out: training never saw these captions. One of each shape and background."""
PAPER = (2, 4, 6)
KINDS = ("spatial", "temporal", "cross", "mlp")
"""The kinds that the demo counts."""


@dataclass(frozen=True)
class Settings:
    """What the demo runs.

    Args:
        prompts: one a clip, of the demo model's vocabulary.
        seed: of the first clip's noise; clip i has seed + i.
        steps: sampling steps.
        ranges: spatial, temporal and cross range of one more run, and if there are four, the MLP's.
        scheduler: one of the demo model's schedulers.
        guidance: scale of classifier-free guidance.
        device: default CUDA where there is one, else the CPU.

    Raises:
        ValueError: a value is not supported; the message says what is.
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
            raise ValueError(f"ranges must be three or four whole numbers of at least 1: spatial,temporal,cross[,mlp]; got {got}")
        if self.scheduler not in SCHEDULERS:
            raise ValueError(f"the demo model has no scheduler {self.scheduler!r}; it has {', '.join(SCHEDULERS)}")
        variants(self)  # refuses ranges that no rule has
        usable_device(self.device)

    @property
    def captions(self) -> list[Caption]:
        """The prompts, read."""
        return [parse(prompt) for prompt in self.prompts]

    @property
    def seeds(self) -> range:
        """One a clip."""
        return range(self.seed, self.seed + len(self.prompts))


@dataclass(frozen=True)
class Variant:
    """One way to sample the clips.

    Args:
        key: its name in files.
        title: its name in tables.
        config: PAB's, or None.
        diffusers: ranges of diffusers' own PAB, or None.
        like: key of the run whose FLOPs this one spends on fewer steps, all computed, or None.
    """

    key: str
    title: str
    config: PABConfig | None = None
    diffusers: tuple[int, int, int] | None = None
    like: str | None = None


@dataclass(frozen=True)
class Run:
    """What one variant did.

    Args:
        variant: what was run.
        steps: sampling steps.
        calls: calls of the transformer: more than `steps` for second-order schedulers.
        seconds: wall time of the pipeline's call.
        flops: of the transformer.
        counts: calls by kind, computed and reused; where a rule holds for some layers only, of one of those.
        cache_bytes: the most bytes that kept outputs held.
        clips: `[clips, frames, 3, height, width]` in [0, 1].
        shown: clips that show their caption.
        quality: against the run without PAB, one a clip; empty for that run itself.
        plan: of PAB.
    """

    variant: Variant
    steps: int
    calls: int
    seconds: float
    flops: int
    counts: dict[str, Counts]
    cache_bytes: int
    clips: torch.Tensor
    shown: int
    quality: tuple[Comparison, ...] = ()
    plan: Plan | None = None

    @property
    def title(self) -> str:
        """The variant's, with the number of steps where that is the variant."""
        return f"{self.steps} {self.variant.title}" if self.variant.like else self.variant.title

    @property
    def psnr(self) -> tuple[float, float]:
        """Mean and standard deviation over the clips, in dB; infinite where a clip is the reference's."""
        return _spread([q.total.psnr for q in self.quality])

    @property
    def ssim(self) -> tuple[float, float]:
        """Mean and standard deviation over the clips."""
        return _spread([q.total.ssim for q in self.quality])


def _spread(values: list[float]) -> tuple[float, float]:
    if not values or not all(map(math.isfinite, values)):
        return (math.inf if values else math.nan), 0.0
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


@dataclass(frozen=True)
class Result:
    """All finished runs, the one without PAB first.

    Args:
        settings: what was asked for.
        runs: those that finished.
        interrupted: whether the user stopped it.
        weights: the file's training and sha256.
        device: the device in words.
    """

    settings: Settings
    runs: tuple[Run, ...]
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


def _record(run: Run, reference: Run) -> dict[str, Any]:
    def measured(values: list[float], spread: tuple[float, float]) -> dict[str, Any] | None:
        if not values:
            return None
        finite = [round(v, 5) if math.isfinite(v) else None for v in (*spread, *values)]  # null: equal to the reference
        return {"mean": finite[0], "std": finite[1], "clips": finite[2:]}

    return {
        "key": run.variant.key,
        "title": run.title,
        "config": run.variant.config.to_dict() if run.variant.config else None,
        "steps": run.steps,
        "calls": run.calls,
        "computed": {kind: c.computed for kind, c in run.counts.items()},
        "reused": {kind: c.reused for kind, c in run.counts.items()},
        "seconds": round(run.seconds, 3),
        "speedup": round(reference.seconds / run.seconds, 3),
        "flops": run.flops,
        "flops_share": round(run.flops / reference.flops, 4),
        "psnr": measured([q.total.psnr for q in run.quality], run.psnr),
        "ssim": measured([q.total.ssim for q in run.quality], run.ssim),
        "captions_shown": run.shown,
        "cache_bytes": run.cache_bytes,
    }


def variants(settings: Settings) -> list[Variant]:
    """What the demo compares, in order."""
    name = "/".join(map(str, PAPER))
    listed = [
        Variant("full", "no PAB"),
        Variant("demo", "PAB demo preset", PABConfig.preset("demo")),
        Variant("pab246", f"PAB {name}", PABConfig.preset("pab246")),
        Variant("diffusers246", f"diffusers' PAB {name}", diffusers=PAPER),
    ]
    if settings.ranges:
        spatial, temporal, cross, *mlp = settings.ranges
        config = PABConfig(spatial=spatial, temporal=temporal, cross=cross, mlp=mlp[0] if mlp else None)
        listed.append(Variant("ranges", f"PAB {'/'.join(map(str, settings.ranges))}", config))
    return [
        *listed,
        Variant("fewer-demo", "steps (as demo)", like="demo"),
        Variant("fewer-pab246", f"steps (as {name})", like="pab246"),
    ]


def _kind(attention: str) -> str:
    """The kind of an attention module of Latte, by its name."""
    if attention.endswith("attn2"):
        return "cross"
    return "temporal" if attention.startswith("temporal_transformer_blocks") else "spatial"


def _costs(transformer: Any, batch: int) -> tuple[dict[str, Cost], int]:
    """What a call of the transformer with `batch` clips costs without PAB."""
    with torch.device("meta"):
        channels, text_channels = transformer.config.in_channels, transformer.config.caption_channels
        inputs = {
            "hidden_states": torch.empty(batch, channels, FRAMES, SIZE, SIZE, dtype=transformer.dtype),
            "timestep": torch.empty(batch),
            "encoder_hidden_states": torch.empty(batch, len(VOCABULARY), text_channels, dtype=transformer.dtype),
        }
    return measure(on_meta(transformer), inputs, LatteAdapter(transformer).sublayers).costs()


def _run(demo: DemoPipeline, settings: Settings, variant: Variant, steps: int, on_step: Callable[[], None], stop: CtrlC) -> Run:
    """Sample all clips one way."""
    pipe, transformer = demo.pipe, demo.pipe.transformer
    schedule = demo.schedule(steps)
    calls = schedule.num_steps
    costs, rest = _costs(transformer, 2 * len(settings.prompts))
    flops = calls * (rest + sum(cost.flops for cost in costs.values()))
    counts = {kind: Counts(computed=calls) for kind in KINDS}
    cache_bytes, plan = 0, None

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
            counts[_kind(name)] = Counts(computed=computed, reused=calls - computed)
    if sampled.summary is not None:
        flops, cache_bytes, plan = sampled.summary.flops, sampled.summary.peak_cache_bytes, sampled.summary.plan
        planned = plan.step_counts() if plan else {}
        counts |= {kind: planned[kind] for kind in KINDS if kind in planned}
    clips = sampled.output
    shown = sum(shows(caption, clip) for caption, clip in zip(settings.captions, clips, strict=True))
    return Run(variant, steps, calls, sampled.seconds, flops, counts, cache_bytes, clips, shown, plan=plan)


def _fewer(demo: DemoPipeline, full: Run, flops: int) -> int:
    """The fewest steps that, all computed, reach `flops`: rounded up, in favour of sampling with fewer steps."""
    return next(n for n in range(1, full.steps + 1) if demo.schedule(n).num_steps * full.flops >= flops * full.calls)


def run_demo(settings: Settings, progress: RunProgress | None = None) -> Result:
    """Run every variant on the same noise; an interruption keeps what is finished.

    Fewer steps are run once where two PAB runs come out at the same number, and not at all where PAB saves less than a step.

    Args:
        settings: what to run.
        progress: called after every step, and where a run is left out, with the steps of all runs.
    """
    with ctrl_c() as stop:
        with stop.interruptible():
            demo = load(settings.scheduler, settings.device)
        return _run_all(demo, settings, stop, progress)


def _run_all(demo: DemoPipeline, settings: Settings, stop: CtrlC, progress: RunProgress | None) -> Result:
    device = in_words(execution_device(demo.pipe))
    listed = variants(settings)
    calls = demo.schedule(settings.steps).num_steps
    todo = {variant.key: calls for variant in listed}
    runs: dict[str, Run] = {}
    interrupted, steps_done = False, 0

    def report(title: str, steps: int) -> None:
        nonlocal steps_done
        steps_done += steps
        if progress:
            progress(title, steps_done, sum(todo.values()))

    try:
        with stop.interruptible():
            demo.generate(settings.captions, settings.seeds, steps=2, guidance=settings.guidance)  # warm up
        for variant in listed:
            steps = settings.steps
            if variant.like:
                steps = _fewer(demo, runs["full"], runs[variant.like].flops)
                if steps == settings.steps or any(run.variant.like and run.steps == steps for run in runs.values()):
                    todo[variant.key] = 0
                    report(variant.title, 0)
                    continue
                todo[variant.key] = demo.schedule(steps).num_steps
            runs[variant.key] = _run(demo, settings, variant, steps, partial(report, variant.title, 1), stop)
    except KeyboardInterrupt:
        interrupted = True
    return Result(settings, tuple(_compared(list(runs.values()))), interrupted, {**demo.training, "sha256": demo.sha256}, device)


def _compared(runs: list[Run]) -> list[Run]:
    """The runs with their quality against the first."""
    return [
        run
        if run is runs[0]
        else replace(run, quality=tuple(compare(a, b, lpips=False) for a, b in zip(run.clips, runs[0].clips, strict=True)))
        for run in runs
    ]


def write(result: Result, folder: str | Path, scale: int = 5) -> list[Path]:
    """Write the clips side by side (GIF, MP4), each plan as a pyramid (PNG), and before all of them the figures (JSON).

    Every file is written whole or not at all.

    Args:
        result: at least one finished run.
        folder: made if missing.
        scale: by which pixels are enlarged.

    Returns:
        The files written.

    Raises:
        OSError: a file cannot be written; those before it are.
    """
    folder = path_of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = write_text(folder / "results.json", to_json(result.to_dict()) + "\n")
    columns = [
        (run.title, video.below(run.seconds, result.runs[0].seconds, run.psnr[0] if run.quality else None), run.clips)
        for run in result.runs
    ]
    film = video.side_by_side(columns, [str(caption) for caption in result.settings.captions], scale)
    written = [video.write_gif(folder / "clips.gif", film), video.write_mp4(folder / "clips.mp4", film)]
    for run in result.runs:
        if run.plan is not None:
            written.append(folder / f"schedule-{run.variant.key}.png")
            run.plan.plot(str(written[-1]))
    return [*written, figures]
