"""Pictures of a calibration: PSNR over FLOPs, and the worst clips side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...figures import new_figure, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .calibration import Calibration, Pair

_COLOURS = ("#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_INK, _FAINT, _PLAN = "#1c1e22", "#6e727a", "#0072b2"
_AMPLIFIED = 8
"""By which differences are drawn larger."""


def plot_curve(found: Calibration, path: str | Path | None = None) -> Figure:
    """Draw PSNR over the share of the FLOPs: what the search expects, the chosen plan, and what it is compared with.

    Args:
        found: the calibration.
        path: where to save the picture, in the format of its ending.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure("drawing a calibration", (7.2, 4.6), dpi=150)
    ax = figure.add_subplot()
    shares, values = zip(*found.curve, strict=True) if found.curve else ((), ())
    ax.plot([100 * s for s in shares], values, color=_PLAN, alpha=0.45, label="best schedules, as the search expects")
    rows = [(found.verified, _PLAN), *zip(found.others, _COLOURS, strict=False)]
    for row, colour in rows:
        x = 100 * row.share
        ax.plot([x, x], [row.worst, row.mean], color=colour, linewidth=1)
        size = 9 if row is found.verified else 6
        ax.plot(x, row.mean, "o", color=colour, markersize=size, label=row.title)
        ax.plot(x, row.worst, "v", color=colour, markersize=size - 2)
    target = found.made_by.get("target", {})
    if "floor" in target:
        ax.axhline(target["floor"], color=_FAINT, linestyle="--", linewidth=1)
        ax.annotate("floor", (0.005, target["floor"]), xycoords=("axes fraction", "data"), color=_FAINT, va="bottom")
    ax.set_xlabel("FLOPs of the model, % of the full run")
    ax.set_ylabel("PSNR against the full run, dB")
    ax.set_title("circles: mean over unseen clips, triangles: the worst", fontsize=9, loc="left", color=_FAINT)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8.5, loc="best")
    return saved(figure, path)


def plot_worst(pairs: Sequence[Pair], path: str | Path) -> Figure | None:
    """Draw the worst clips: the full run, the plan's, and their difference, at the frame that differs most.

    Args:
        pairs: the clips; those that are no frames of three channels or one are left out.
        path: where to save the picture.

    Returns:
        The figure, or None if there is nothing to draw.
    """
    drawn = [pair for pair in pairs if pair.full.ndim == 4 and pair.full.shape[1] in (1, 3)]
    if not drawn:
        return None
    figure = new_figure("drawing a calibration", (7.2, 2.6 * len(drawn)), dpi=150)
    axes = figure.subplots(len(drawn), 3, squeeze=False)
    for row, pair in zip(axes, drawn, strict=True):
        frame = int((pair.full - pair.plan).square().mean((1, 2, 3)).argmax())
        full, plan = pair.full[frame], pair.plan[frame]
        pictures = (full, plan, 0.5 + _AMPLIFIED * (plan - full))
        for ax, picture, title in zip(row, pictures, ("full run", "plan", f"difference x {_AMPLIFIED}"), strict=True):
            ax.imshow(_shown(picture))
            ax.set_title(title, fontsize=9, color=_INK)
            ax.set_xticks([])
            ax.set_yticks([])
        row[0].set_ylabel(f"frame {frame}", fontsize=8.5, color=_FAINT)
        row[1].set_xlabel(pair.title, fontsize=8.5, color=_INK)
    return saved(figure, path)


def _shown(picture: torch.Tensor) -> np.ndarray:
    return picture.clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).float().numpy()
