"""The demo on several ranks: the clips of one process, and the bytes that broadcast attention does not send."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn

from . import api
from .demo import DemoSettings, Variant, variants
from .files import path_of, write_text
from .messages import shown
from .models.demo.pipeline import load
from .models.demo.shapes import FRAMES
from .parallel.parallelize import parallel_of, parallelize, unparallelize
from .progress import RunProgress
from .rules.traffic import Traffic
from .strict_json import to_json

MOST_RANKS = FRAMES // 2
"""A rank has at least two frames."""
_POLL = 0.1
"""Seconds between looks at the progress of the ranks."""


@dataclass(frozen=True)
class RanksRun:
    """The run of one variant.

    Args:
        variant: of the run.
        difference: the largest one of a value between the clips of any rank and those of one process.
        traffic: what a rank sent.
    """

    variant: Variant
    difference: float
    traffic: Traffic


@dataclass(frozen=True)
class RanksResult:
    """All runs, the one without PAB first.

    Args:
        settings: of the demo.
        ranks: processes.
        runs: of the variants.
    """

    settings: DemoSettings
    ranks: int
    runs: tuple[RanksRun, ...]

    @property
    def equal(self) -> bool:
        """Whether all ranks have the clips of one process."""
        return all(run.difference == 0 for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        s, full = self.settings, self.runs[0].traffic.total.bytes
        return {
            "prompts": list(s.prompts),
            "seeds": list(s.seeds),
            "steps": s.steps,
            "scheduler": s.scheduler,
            "guidance": s.guidance,
            "ranks": self.ranks,
            "torch": torch.__version__,
            "runs": [
                {
                    "key": run.variant.key,
                    "title": run.variant.title,
                    "config": run.variant.config.to_dict() if run.variant.config else None,
                    "difference": run.difference,
                    "bytes_share": round(run.traffic.total.bytes / full, 4),
                    "traffic": run.traffic.to_dict(),
                }
                for run in self.runs
            ],
        }


def check(settings: DemoSettings, ranks: int) -> None:
    """Raise a ValueError if the demo cannot run on a number of ranks."""
    if not 2 <= ranks <= MOST_RANKS:
        raise ValueError(
            f"ranks must be from 2 to {MOST_RANKS}, as each has at least 2 of the {FRAMES} frames of a clip; got "
            f"{shown(ranks)}"
        )
    if sys.platform == "win32":
        raise ValueError("several ranks need torch.distributed with gloo, which is tested on Linux and macOS alone")
    if settings.device not in (None, "cpu"):
        raise ValueError(f"ranks of the demo run on the CPU, got device {shown(settings.device)}; leave it out")


def on_ranks(settings: DemoSettings) -> list[Variant]:
    """The variants that several ranks run: without PAB, with the plan, with 2/4/6, and with the ranges of the user."""
    return [v for v in variants(settings) if v.diffusers is None and v.like is None and v.key != "balanced"]


def run_demo_on_ranks(settings: DemoSettings, ranks: int, progress: RunProgress | None = None) -> RanksResult:
    """Run variants of the demo on one process, then on several, which share the frames; compare and count bytes.

    Args:
        settings: of the demo.
        ranks: gloo processes on the CPU of this machine.
        progress: called after every step.

    Returns:
        The runs.

    Raises:
        ValueError: see `check`.
    """
    check(settings, ranks)
    with tempfile.TemporaryDirectory() as folder:
        reports, reporter = get_context("spawn").Pipe(duplex=False)
        running: Any = spawn(_rank, (ranks, folder, settings, reporter), nprocs=ranks, join=False)
        try:
            ended = False
            while not ended:
                ended = running.join(timeout=_POLL)
                while reports.poll():
                    report = reports.recv()
                    if progress is not None:
                        progress(*report)
        finally:
            for process in running.processes:
                process.terminate()
                process.join()
        runs = torch.load(Path(folder, "runs.pt"), weights_only=False)  # written by the first rank
    return RanksResult(settings, ranks, tuple(runs))


def _rank(rank: int, ranks: int, folder: str, settings: DemoSettings, reporter: Any) -> None:
    """One of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the one that started them, and it ends them
    torch.set_num_threads(max((os.cpu_count() or 1) // ranks, 1))
    at, patient = Path(folder, "store").as_uri(), timedelta(days=1)
    dist.init_process_group("gloo", init_method=at, rank=rank, world_size=ranks, timeout=patient)
    runs = _runs(settings, reporter if rank == 0 else None)
    if rank == 0:
        torch.save(runs, f"{folder}/runs.pt")
    dist.destroy_process_group()


def _runs(settings: DemoSettings, reporter: Any) -> list[RanksRun]:
    """The runs on this rank; the first one samples alone before, and reports."""
    demo = load(settings.scheduler, "cpu")
    todo = on_ranks(settings)
    calls = 2 * len(todo) * demo.schedule(settings.steps).num_steps
    done = 0

    def clips(title: str) -> torch.Tensor:
        def step(*_: Any) -> dict[str, Any]:
            nonlocal done
            done += 1
            if reporter is not None:
                reporter.send((title, done, calls))
            return {}

        return demo.generate(settings.captions, settings.seeds, settings.steps, settings.guidance, step)

    def sampled(variant: Variant, place: str) -> torch.Tensor:
        if variant.config is None:
            return clips(f"{variant.title}, {place}")
        api.enable(demo.pipe, variant.config)
        return clips(f"{variant.title}, {place}")

    alone: Sequence[torch.Tensor | None] = [None] * len(todo)
    if reporter is not None:
        alone = [sampled(variant, "one process") for variant in todo]
    api.disable(demo.pipe)
    dist.barrier()
    runs = []
    for variant, expected in zip(todo, alone, strict=True):
        parallelize(demo.pipe)
        found = sampled(variant, f"{dist.get_world_size()} ranks")
        expected = torch.empty_like(found) if expected is None else expected
        dist.broadcast(expected, 0)
        difference = (found - expected).abs().max()
        dist.all_reduce(difference, dist.ReduceOp.MAX)
        parallel = parallel_of(demo.pipe.transformer)
        traffic = None if parallel is None else parallel.traffic()
        assert traffic is not None, "the model was parallel, and this is its latest generation"
        runs.append(RanksRun(variant, difference.item(), traffic))
        api.disable(demo.pipe)
        unparallelize(demo.pipe)
    return runs


def write(result: RanksResult, folder: str | Path) -> Path:
    """Write the figures as JSON, and return the file.

    Args:
        result: of the ranks.
        folder: created if missing.

    Raises:
        OSError: the file cannot be written.
    """
    folder = path_of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return write_text(folder / "results.json", to_json(result.to_dict()) + "\n")
