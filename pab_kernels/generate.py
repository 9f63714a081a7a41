"""Generating with any pipeline under PAB, and for comparison without it: `pab generate`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import api
from .analysis import video
from .analysis.ctrl_c import CtrlC, ctrl_c
from .analysis.pipeline_call import Wish, arguments, call
from .analysis.pipelines import DTYPES, load_pipeline
from .analysis.quality.comparison import Comparison, compare
from .analysis.sampling import Sampled, in_words, sample
from .broadcast.summary import Summary
from .compat import execution_device
from .extras import require
from .files import path_of, write_text
from .messages import shown
from .models.published_pipelines import PUBLISHED, is_published
from .parallel.launch import NONE, chosen, is_first, joined, shape_of
from .parallel.parallelize import parallelize, unparallelize
from .progress import RunProgress
from .rules.config import PABConfig
from .rules.formats import named_config
from .rules.presets import default_preset
from .strict_json import to_json

WARM_UP = 4
"""Steps of a run before a comparison, whose first run would otherwise pay for loading; PNDM takes no fewer."""


@dataclass(frozen=True)
class Settings:
    """What to generate, and how.

    Args:
        model: hub id or folder of a pipeline, as for `load_pipeline`.
        wish: prompt, steps, size and other arguments of the pipeline.
        pab: "auto" (the preset "balanced"), "published" (the preset of a published model by name), "off", a preset or a
            config file.
        compare: whether to sample the same noise without PAB first.
        dtype: of the weights, one of `DTYPES`; default as for `load_pipeline`.
        device, offload: as for `load_pipeline`.
        fps: frames a second of the video.
        timed: whether to measure seconds by kind.
        local_files_only: fetch nothing.
        cuda_graphs: whether to replay the transformer's calls under PAB as CUDA graphs, captured in a previous run.
        weights: folder of the parts of a published model, as for `load_pipeline`.
        parallel: how the processes that torchrun started share the work: "none", "auto", or branches of guidance x
            parts of the sequence such as "2x4".
        budget, cache_device: the most bytes that a run under PAB keeps, and where, as in `pab.enable`.

    Raises:
        FileNotFoundError: there is no such config file.
        ValueError: a value is not supported.
    """

    model: str
    wish: Wish
    pab: str = "auto"
    compare: bool = False
    dtype: str | None = None
    device: str | None = None
    offload: str = "none"
    fps: float = 8
    timed: bool = False
    local_files_only: bool = False
    cuda_graphs: bool = False
    weights: str | Path | None = None
    parallel: str = NONE
    budget: str | None = None
    cache_device: Any = None

    def __post_init__(self) -> None:
        shape_of(self.parallel)
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype {self.dtype!r} is not supported; supported are {', '.join(DTYPES)}")
        if not 0.001 <= self.fps <= 1000:
            raise ValueError(f"fps must be from 0.001 to 1000, got {self.fps}")
        if self.pab == "off":
            if self.compare or self.timed or self.cuda_graphs or self.budget or self.cache_device:
                raise ValueError(
                    "compare, timed, cuda_graphs, budget and cache_device need PAB; choose auto, a preset or a file"
                )
        elif self.timed and self.cuda_graphs:
            raise ValueError("seconds by kind cannot be measured inside a CUDA graph; leave out timed or cuda_graphs")
        elif self.pab == "published" and not is_published(self.model):
            known = ", ".join(PUBLISHED)
            raise ValueError(f"published rules are for models by name ({known}), got model {shown(self.model)}")
        elif self.pab not in ("auto", "published"):
            named_config(self.pab)

    def config(self, transformer: Any) -> PABConfig | None:
        """The rules for a transformer, or None if PAB is off."""
        if self.pab == "auto":
            return default_preset(follows_scheduler=True)
        if self.pab == "published":
            return PABConfig.preset(self.model.partition("/")[0])
        return None if self.pab == "off" else named_config(self.pab)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        names = ("pab", "offload", "fps", "cuda_graphs", "parallel", "budget", "cache_device")
        how = {name: getattr(self, name) for name in names}
        where = {} if self.weights is None else {"weights": str(self.weights)}
        return {"model": self.model} | where | vars(self.wish) | how


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        key: "off" or "pab", its name in files.
        config: PAB's rules, or None.
        sampled: output, seconds, memory, PAB's summary.
        quality: against the run without PAB, if there was one.
        file: the video or image; None until it is written.
    """

    key: str
    config: PABConfig | None
    sampled: Sampled[torch.Tensor]
    quality: Comparison | None = None
    file: Path | None = None

    @property
    def title(self) -> str:
        """Its name in tables."""
        return "PAB" if self.config else "no PAB"

    @property
    def summary(self) -> Summary | None:
        """PAB's summary, or None without PAB."""
        return self.sampled.summary

    def to_dict(self, reference: Run) -> dict[str, Any]:
        """JSON-ready."""
        s, memory = self.summary, self.sampled.memory
        return {
            "key": self.key,
            "file": self.file.name if self.file else None,
            "config": self.config.to_dict() if self.config else None,
            "seconds": round(self.sampled.seconds, 4),
            "speedup": round(self.sampled.speedup(reference.sampled), 4) if reference.key == "off" else None,
            "peak_memory_bytes": memory.nbytes,
            "memory": memory.what,
            "summary": s.to_dict() if s else None,
            "quality": self.quality.to_dict() if self.quality else None,
        }


@dataclass(frozen=True)
class Result:
    """The finished runs.

    Args:
        settings: of the runs.
        pipeline, transformer: names of their classes.
        device: its name.
        dtype: of the transformer.
        runs: the finished runs, without PAB first; none on other ranks than the first.
        planned: number of runs planned.
        files: the files written.
        interrupted: whether Ctrl-C stopped it.
        ranks: over the branches of guidance, and over the sequence; None for one process.
    """

    settings: Settings
    pipeline: str
    transformer: str
    device: str
    dtype: str
    runs: tuple[Run, ...]
    planned: int
    files: tuple[Path, ...]
    interrupted: bool = False
    ranks: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.settings.to_dict(),
            "pipeline": self.pipeline,
            "transformer": self.transformer,
            "device": self.device,
            "dtype": self.dtype,
            "ranks": None if self.ranks is None else dict(zip(("cfg", "sequence"), self.ranks, strict=True)),
            "torch": torch.__version__,
            "diffusers": require("diffusers", "generating").__version__,
            "interrupted": self.interrupted,
            "runs": [run.to_dict(self.runs[0]) for run in self.runs],
        }


class NotWritten(OSError):
    """A file could not be written.

    Args:
        error: the reason.
        result: all finished runs, with the files that were written.
    """

    def __init__(self, error: OSError, result: Result) -> None:
        super().__init__(error.errno, error.strerror, error.filename)
        self.result = result


def generate(settings: Settings, out: str | Path, progress: RunProgress | None = None) -> Result:
    """Generate with PAB, and with `settings.compare` first without it; write outputs, times and the comparison.

    The pipeline is loaded once, and every run begins with the same noise. After each run `results.json` and its video
    or image are written to `out`, so Ctrl-C or a later error keeps the finished runs. A file is written whole or not at
    all.

    With `settings.parallel`, all ranks call it alike, and the first alone writes.

    Args:
        settings: what to generate.
        out: folder, created if missing.
        progress: called after every step.

    Returns:
        The finished runs; after Ctrl-C, those until then.

    Raises:
        FileNotFoundError: there is no such model.
        NotWritten: a file cannot be written; the error has the finished runs.
        OSError: the folder cannot be created, before anything is run.
        ValueError: the model or the pipeline does not support the settings, or a run fails.
        ModuleNotFoundError: a package is not installed.
    """
    out = path_of(out)
    with ctrl_c() as stop, joined(settings.parallel, settings.device) as device:
        with stop.interruptible():
            pipe, config = _loaded(replace(settings, device=device))
        ranks = None
        if settings.parallel != NONE:
            ranks = chosen(settings.parallel, pipe, arguments(pipe, settings.wish))
            parallelize(pipe, cfg=ranks[0], sequence=ranks[1])
        try:
            return _generate(settings, pipe, config, ranks, out, stop, progress)
        finally:
            unparallelize(pipe)


def _generate(
    settings: Settings,
    pipe: Any,
    config: PABConfig | None,
    ranks: tuple[int, int] | None,
    out: Path,
    stop: CtrlC,
    progress: RunProgress | None,
) -> Result:
    ways: list[PABConfig | None] = [
        *([None] if settings.compare or config is None else []),
        *([config] if config else []),
    ]
    writes = is_first(settings.parallel)
    if writes:
        out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    pictures: list[Path] = []
    pipeline, transformer = type(pipe).__name__, type(pipe.transformer).__name__
    device, dtype = in_words(execution_device(pipe)), str(pipe.transformer.dtype).removeprefix("torch.")

    def result(interrupted: bool, *further: Path) -> Result:
        files = (*(run.file for run in runs if run.file), *pictures, *further)
        return Result(settings, pipeline, transformer, device, dtype, tuple(runs), len(ways), files, interrupted, ranks)

    def save(interrupted: bool = False) -> Result:
        if not writes:
            return result(interrupted)
        made = result(interrupted, out / "results.json")
        write_text(made.files[-1], to_json(made.to_dict()) + "\n")
        return made

    def run(title: str, wish: Wish) -> torch.Tensor:
        with stop.interruptible():
            return call(pipe, wish, partial(progress, title) if progress else None)

    def run_all() -> None:
        if settings.compare:
            run("warming up", replace(settings.wish, steps=min(WARM_UP, settings.wish.steps or WARM_UP)))
        for rules in ways:
            key, title = ("pab", "PAB") if rules else ("off", "no PAB")
            sample_once = partial(run, title, settings.wish)
            sampled = sample(
                pipe,
                sample_once,
                rules,
                timed=settings.timed,
                cuda_graphs=settings.cuda_graphs,
                budget=settings.budget,
                cache_device=settings.cache_device,
            )
            if not writes:
                continue
            quality = compare(sampled.output, runs[0].sampled.output, lpips=False) if runs else None
            runs.append(Run(key, rules, sampled, quality))
            save()
            runs[-1] = replace(runs[-1], file=_write(out / key, video.pixels(sampled.output), settings.fps))
            save()
            if runs[-1].summary and runs[-1].summary.plan:
                runs[-1].summary.plan.plot(str(out / "schedule.png"))
                pictures.append(out / "schedule.png")
        if len(runs) > 1:
            columns = [
                (r.title, r.sampled.seconds, r.quality.total.psnr if r.quality else None, r.sampled.output[None])
                for r in runs
            ]
            film = video.side_by_side(video.columns(columns), [settings.wish.prompt or ""], scale=1)
            pictures.append(_write(out / "side-by-side", film, settings.fps))
        stop.check()

    save()
    interrupted = False
    try:
        try:
            run_all()
        except KeyboardInterrupt:
            interrupted = True
        except ValueError as error:
            names = ", ".join(run.file.name for run in runs if run.file)
            raise ValueError(f"{error}; kept in {out}: {names}" if names else str(error)) from error
        return save(interrupted)
    except OSError as error:
        try:
            made = save(interrupted)
        except OSError:
            made = result(interrupted)
        raise NotWritten(error, made) from error


def _loaded(settings: Settings) -> tuple[Any, PABConfig | None]:
    """The pipeline and its PAB rules; unsupported settings are refused before anything is run or written."""
    pipe = load_pipeline(
        settings.model,
        dtype=DTYPES[settings.dtype] if settings.dtype else None,
        device=settings.device,
        offload=settings.offload,
        local_files_only=settings.local_files_only,
        weights=settings.weights,
    )
    pipe.set_progress_bar_config(disable=True)
    config = settings.config(pipe.transformer)
    device = execution_device(pipe)
    if settings.cuda_graphs and device.type != "cuda":
        raise ValueError(f"CUDA graphs need a CUDA device, and the pipeline is on {device}; leave cuda_graphs out")
    arguments(pipe, settings.wish)
    if config is not None:
        try:
            options = {"budget": settings.budget, "cache_device": settings.cache_device}
            api.enable(pipe, config, cuda_graphs=settings.cuda_graphs, **options)
        except TypeError as error:
            raise ValueError(str(error)) from error
        api.disable(pipe)
    return pipe, config


def _write(stem: Path, film: np.ndarray, fps: float) -> Path:
    """Write one frame as PNG, several as MP4."""
    if len(film) == 1:
        return video.write_png(stem.with_suffix(".png"), film[0])
    return video.write_mp4(stem.with_suffix(".mp4"), film, fps, repeats=1)
