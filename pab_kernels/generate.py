"""Generating with any pipeline, with PAB and, to compare, without it: what `pab generate` runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from .analysis.pipelines import load_pipeline
from .analysis.quality.comparison import Comparison, compare
from .analysis.sampling import Sampled, in_words, sample
from .broadcast.summary import Summary
from .compat import execution_device
from .extras import require
from .files import path_of, write_text
from .progress import RunProgress
from .rules.config import PABConfig
from .rules.formats import named_config
from .rules.presets import preset_for
from .strict_json import to_json

DTYPES = ("float32", "bfloat16", "float16")
WARM_UP = 2
"""Steps that are run before the runs that are compared, so that the first of them does not pay for loading."""

MOST_FPS, MOST_SECONDS_A_FRAME = 1000, 1000
"""What players show."""


@dataclass(frozen=True)
class Settings:
    """What is generated and how.

    Args:
        model: hub id or folder of a pipeline, as `load_pipeline` takes it.
        wish: prompt, steps, size and the rest that the pipeline is asked for.
        pab: "auto" (the published preset of the model's class, else the ranges 2/4/6), "off", a preset or a config
            file.
        compare: whether the same noise is sampled without PAB first.
        dtype: of the weights, one of `DTYPES`; default as `load_pipeline` has it.
        device, offload: as `load_pipeline` takes them.
        fps: frames a second of the video.
        timed: whether seconds are measured by kind.
        local_files_only: fetch nothing.
        cuda_graphs: whether the transformer's calls under PAB are replayed as CUDA graphs, which a run before captures.

    Raises:
        FileNotFoundError: there is no such config file.
        ValueError: a value is not supported; the message says what is.
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

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype {self.dtype!r} is not supported; there are {', '.join(DTYPES)}")
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if not MOST_SECONDS_A_FRAME >= 1 / self.fps >= 1 / MOST_FPS:
            raise ValueError(f"fps must be from {1 / MOST_SECONDS_A_FRAME:g} to {MOST_FPS}, got {self.fps}")
        if self.pab == "off":
            if self.compare or self.timed or self.cuda_graphs:
                raise ValueError(
                    "with PAB off there is nothing to compare, to time and to capture; choose auto, a preset or a "
                    "config file"
                )
        elif self.timed and self.cuda_graphs:
            raise ValueError(
                "seconds by kind are measured inside of what is a CUDA graph; leave timed or cuda_graphs out"
            )
        elif self.pab != "auto":
            named_config(self.pab)

    def config(self, transformer: Any) -> PABConfig | None:
        """The rules for a transformer; None where PAB is off."""
        if self.pab == "auto":
            return preset_for(transformer, timesteps_known=True)
        return None if self.pab == "off" else named_config(self.pab)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        wish = {
            **vars(self.wish),
            "size": list(self.wish.size) if self.wish.size else None,
            "further": dict(self.wish.further),
        }
        return {
            "model": self.model,
            **wish,
            "pab": self.pab,
            "offload": self.offload,
            "fps": self.fps,
            "cuda_graphs": self.cuda_graphs,
        }


@dataclass(frozen=True)
class Run:
    """One finished run.

    Args:
        key: "off" or "pab", its name in files.
        config: PAB's rules, or None.
        sampled: output, seconds, memory, PAB's summary.
        quality: against the run without PAB, where there was one.
        file: the video or the image; None until it is written.
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
        """What PAB did."""
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
        settings: what was asked for.
        pipeline, transformer: their classes.
        device: in words.
        dtype: of the transformer.
        runs: the one without PAB first.
        planned: how many were to be run.
        files: all that were written.
        interrupted: whether the user stopped it.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **self.settings.to_dict(),
            "pipeline": self.pipeline,
            "transformer": self.transformer,
            "device": self.device,
            "dtype": self.dtype,
            "torch": torch.__version__,
            "diffusers": require("diffusers", "generating").__version__,
            "interrupted": self.interrupted,
            "runs": [run.to_dict(self.runs[0]) for run in self.runs],
        }


class NotWritten(OSError):
    """A file could not be written.

    Args:
        error: why.
        result: all finished runs, with the files that were written.
    """

    def __init__(self, error: OSError, result: Result) -> None:
        super().__init__(error.errno, error.strerror, error.filename)
        self.result = result


def generate(settings: Settings, out: str | Path, progress: RunProgress | None = None) -> Result:
    """Generate, write what comes out and how long it took, and compare.

    The pipeline is loaded once. Every run begins with the same noise. After each, `results.json` and its video or image
    are written to `out`, so that an interruption (Ctrl-C) or an error later on keeps what is finished. A file is
    written whole or not at all.

    Args:
        settings: what to generate.
        out: folder, made if missing.
        progress: called after every step.

    Returns:
        The finished runs; where it was interrupted, those until then.

    Raises:
        FileNotFoundError: there is no such model.
        NotWritten: a file cannot be written; it has the runs that were measured.
        OSError: the folder cannot be written to, before anything is run.
        ValueError: the model or the pipeline does not support what was asked for, or a run fails.
        ModuleNotFoundError: a package is not installed.
    """
    out = path_of(out)
    with ctrl_c() as stop:
        with stop.interruptible():
            pipe, config = _loaded(settings)
        return _generate(settings, pipe, config, out, stop, progress)


def _loaded(settings: Settings) -> tuple[Any, PABConfig | None]:
    """The pipeline and PAB's rules for it; what does not suit it is refused before anything is run or written."""
    wanted = getattr(torch, settings.dtype) if settings.dtype else None
    pipe = load_pipeline(
        settings.model,
        dtype=wanted,
        device=settings.device,
        offload=settings.offload,
        local_files_only=settings.local_files_only,
    )
    pipe.set_progress_bar_config(disable=True)
    config = settings.config(pipe.transformer)
    if settings.cuda_graphs and execution_device(pipe).type != "cuda":
        raise ValueError(
            f"CUDA graphs need a CUDA device, and the pipeline is on {execution_device(pipe)}; leave cuda_graphs out"
        )
    arguments(pipe, settings.wish)
    if config is not None:
        try:
            api.enable(pipe, config)
        except TypeError as error:
            raise ValueError(str(error)) from error
        api.disable(pipe)
    return pipe, config


def _generate(
    settings: Settings, pipe: Any, config: PABConfig | None, out: Path, stop: CtrlC, progress: RunProgress | None
) -> Result:
    ways: list[PABConfig | None] = [None] if settings.compare or config is None else []
    ways += [config] if config is not None else []
    out.mkdir(parents=True, exist_ok=True)
    runs: list[Run] = []
    drawn: list[Path] = []
    pipeline, transformer = type(pipe).__name__, type(pipe.transformer).__name__
    device, dtype = in_words(execution_device(pipe)), str(pipe.transformer.dtype).removeprefix("torch.")

    def result(interrupted: bool = False, *further: Path) -> Result:
        files = (*(run.file for run in runs if run.file), *drawn, *further)
        return Result(settings, pipeline, transformer, device, dtype, tuple(runs), len(ways), files, interrupted)

    def save(interrupted: bool = False) -> Result:
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
            sampled = sample(pipe, sample_once, rules, timed=settings.timed, cuda_graphs=settings.cuda_graphs)
            quality = compare(sampled.output, runs[0].sampled.output, lpips=False) if runs else None
            runs.append(Run(key, rules, sampled, quality))
            save()
            runs[-1] = replace(runs[-1], file=_write(out / key, sampled.output, settings.fps))
            save()
            for path in _draw(runs, out, settings):
                drawn.append(path)
            stop.check()

    save()
    interrupted = False
    try:
        try:
            run_all()
        except KeyboardInterrupt:
            interrupted = True
        except ValueError as error:
            kept = f"; kept in {out}: {', '.join(run.file.name for run in runs if run.file)}" if runs else ""
            raise ValueError(f"{error}{kept}") from error
        return save(interrupted)
    except OSError as error:
        try:
            made = save(interrupted)
        except OSError:
            made = result(interrupted)
        raise NotWritten(error, made) from error


def _write(stem: Path, film: torch.Tensor | np.ndarray, fps: float) -> Path:
    """Frames as MP4, one frame as PNG."""
    pixels = video.pixels(film) if isinstance(film, torch.Tensor) else film
    if len(pixels) == 1:
        return video.write_png(stem.with_suffix(".png"), pixels[0])
    return video.write_mp4(stem.with_suffix(".mp4"), pixels, fps, repeats=1)


def _draw(runs: Sequence[Run], out: Path, settings: Settings) -> Iterator[Path]:
    """Draw what stands beside the run that was finished last: its plan, and where there are two, both side by side."""
    run = runs[-1]
    if run.summary is not None and run.summary.plan is not None:
        run.summary.plan.plot(str(out / "schedule.png"))
        yield out / "schedule.png"
    if run.quality is not None:
        psnr = [r.quality.total.psnr if r.quality else None for r in runs]
        columns = video.columns(
            [(r.title, r.sampled.seconds, p, r.sampled.output[None]) for r, p in zip(runs, psnr, strict=True)]
        )
        yield _write(out / "side-by-side", video.side_by_side(columns, [settings.wish.prompt], scale=1), settings.fps)
