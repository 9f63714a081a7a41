"""What a calibration found: the config, how close it stays, and what it was compared with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...extras import require
from ...files import path_of, write_text
from ...rules.config import PABConfig
from ...rules.formats import save_config
from ...rules.plan import Plan, plan
from ...strict_json import to_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

USUAL_DEVIATION = 15.0
"""The deviation of the PSNR of clips, in dB, that is taken before any is measured, for each part of the FLOPs that is
skipped: clips differ more, the earlier the first skipped step."""
USUAL_CLIPS = 10
"""Clips as many as which that deviation counts."""
_NORMAL = 1.645
"""The 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Row:
    """One way to sample, against the full run on the same clips.

    Args:
        title: of the way.
        share: of the full run's FLOPs.
        psnr: of each clip, in dB.
        seconds: of a call, the median.
    """

    title: str
    share: float
    psnr: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """The mean PSNR, in dB."""
        return statistics.fmean(self.psnr)

    @property
    def worst(self) -> float:
        """The least PSNR, in dB."""
        return min(self.psnr)

    @property
    def deviation(self) -> float:
        """The standard deviation, in dB; 0 of one clip."""
        return statistics.stdev(self.psnr) if len(self.psnr) > 1 else 0.0

    @property
    def expected(self) -> float:
        """The PSNR, in dB, that 95 % of unseen clips keep, with a confidence of 95 %, if clips are normal in dB.

        It is the one-sided bound of tolerance. With n clips of mean m and deviation s, and a usual deviation s0 that
        counts as n0 clips:

            m - k s',    s'^2 = (n0 s0^2 + (n - 1) s^2) / f,    f = n0 + n - 1,    s0 = 15 dB * (1 - share)

            k = z (1 + sqrt(1 - a (1 - 1 / n))) / a,    a = 1 - z^2 / (2 f),    z = 1.645

        k is that of Natrella 1963, Experimental Statistics, 2-5.2. Few clips may all be easy: their own deviation alone
        would promise too much.
        """
        return self.expected_of(len(self.psnr))

    def expected_of(self, n: int) -> float:
        """What `expected` would be if n clips had this mean and deviation, in dB."""
        usual, freedom = USUAL_DEVIATION * max(1 - self.share, 0.0), USUAL_CLIPS + n - 1
        deviation = math.sqrt((USUAL_CLIPS * usual**2 + (n - 1) * self.deviation**2) / freedom)
        a = 1 - _NORMAL**2 / (2 * freedom)
        return self.mean - _NORMAL * (1 + math.sqrt(1 - a * (1 - 1 / n))) / a * deviation

    def keeps(self, floor: float) -> bool:
        """Whether every clip is at or above a floor, and 95 % of unseen ones are, with a confidence of 95 %."""
        return self.worst >= floor and self.expected >= floor

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rounded = [round(value, 2) for value in self.psnr]
        return {
            "title": self.title,
            "flops_share": round(self.share, 4),
            "psnr": round(self.mean, 2),
            "psnr_worst": round(self.worst, 2),
            "psnr_by_clip": rounded,
            "seconds": round(self.seconds, 3),
        }


class NoPlan(ValueError):
    """No plan reaches what was asked for.

    Args:
        message: what was asked for, and what to do.
        best: the closest that was measured; None if nothing was.
    """

    def __init__(self, message: str, best: Row | None) -> None:
        super().__init__(message)
        self.best = best


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a calibration.

    Args:
        generations: that were run until then, as full ones.
        total: that were planned.
        rows: what was measured until then.
    """

    def __init__(self, generations: float, total: float, rows: Sequence[Row]) -> None:
        super().__init__(f"interrupted after {generations:.1f} of {total:.1f} generations")
        self.generations, self.total, self.rows = generations, total, tuple(rows)


@dataclass(frozen=True)
class Pair:
    """A clip of the full run and of the plan's.

    Args:
        title: prompt, seed and PSNR.
        full, plan: `[frames, 3, height, width]` or of any other shape.
    """

    title: str
    full: torch.Tensor = field(repr=False)
    plan: torch.Tensor = field(repr=False)


@dataclass(frozen=True)
class Calibration:
    """A config found by measurement.

    Args:
        config: the rules.
        num_steps: steps of the schedule; schedulers of second order take more than a call asks for.
        sampling_steps: that a call asks for: `num_steps` of the calibration, or fewer where that stays closer.
        begin: the step at which runs enter it.
        verified: the config on clips that no search has seen; for a floor, the config of the last number of steps that
            kept it on them.
        everywhere: on these and on the clips of the search; for a floor on the former alone.
        searched: what was measured on the clips of the search.
        others: what the config is compared with, on the first of the verified clips.
        curve: the share of the FLOPs, and the PSNR in dB that the search expects of the best schedule with it.
        generations: that were run, as full ones.
        made_by: everything that reproduces it, JSON-ready.
        notes: what the reader should know.
        worst: the worst clips.

    `str(calibration)` is a table; `save` writes the config, a report and pictures.
    """

    config: PABConfig
    num_steps: int
    sampling_steps: int
    begin: int
    verified: Row
    everywhere: Row
    searched: tuple[Row, ...]
    others: tuple[Row, ...]
    curve: tuple[tuple[float, float], ...]
    generations: float
    made_by: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    worst: tuple[Pair, ...] = field(default=(), repr=False)

    @property
    def plan(self) -> Plan:
        """The plan of the config."""
        return plan(self.config, num_steps=self.num_steps)

    @property
    def full_seconds(self) -> float:
        """Median seconds of a full run."""
        return float(self.made_by["full_seconds"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "config": self.config.to_dict(),
            "num_steps": self.num_steps,
            "sampling_steps": self.sampling_steps,
            "verified": self.verified.to_dict(),
            "psnr_expected": round(self.everywhere.expected, 2),
            "others": [row.to_dict() for row in self.others],
            "searched": [row.to_dict() for row in self.searched],
            "curve": [[round(share, 4), round(value, 2)] for share, value in self.curve],
            "generations": round(self.generations, 2),
            "notes": list(self.notes),
            "calibration": dict(self.made_by),
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write `config.yaml`, `report.json`, `curve.png`, `schedule.png` and, of images and videos, `worst.png`.

        Args:
            folder: made if missing.

        Returns:
            The files.

        Raises:
            OSError: a file cannot be written; those before it are complete.
            ModuleNotFoundError: PyYAML or matplotlib is not installed.
        """
        from .report import plot_curve, plot_worst

        require("matplotlib", "writing a calibration's pictures")
        folder = path_of(folder)
        folder.mkdir(parents=True, exist_ok=True)
        measured = {
            "sampling_steps": self.sampling_steps,
            "verified": self.verified.to_dict(),
            "psnr_expected": round(self.everywhere.expected, 2),
            "generations": round(self.generations, 2),
        }
        files = [
            save_config(self.config, folder / "config.yaml", calibration=dict(self.made_by) | measured),
            write_text(folder / "report.json", to_json(self.to_dict()) + "\n"),
        ]
        plot_curve(self, folder / "curve.png")
        self.plan.plot(str(folder / "schedule.png"))
        files += [folder / "curve.png", folder / "schedule.png"]
        if plot_worst(self.worst, folder / "worst.png") is not None:
            files.append(folder / "worst.png")
        return files

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw PSNR over the share of the FLOPs, and save it to `path` if given."""
        from .report import plot_curve

        return plot_curve(self, path)

    def __str__(self) -> str:
        rows = [["", "FLOPs", "PSNR, dB", "worst", "clips", "speed-up"]]
        for row in (self.verified, *self.others):
            speedup = self.full_seconds / row.seconds if row.seconds else math.nan
            cells = [f"{row.share:.1%}", f"{row.mean:.1f}", f"{row.worst:.1f}", f"{len(row.psnr)}", f"{speedup:.2f}x"]
            rows.append([row.title, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        said = f"19 of 20 unseen clips are expected above {self.everywhere.expected:.1f} dB, with a confidence of 95 %"
        cost = f"{self.generations:.1f} generations; {said}"
        return "\n".join([str(self.plan), "", *table, cost, *(f"note: {note}" for note in self.notes)])
