"""Pictures of measured differences: a curve for each kind, and a heat map of layers by steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from ...extras import require
from ...figures import new_figure, saved, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .study import Analysis

COLOURS = {"spatial": "#0072b2", "temporal": "#009e73", "cross": "#d55e00", "mlp": "#8a8f98", "block": "#1c1e22"}
"""By kind; distinguishable for colour-blind readers."""
_STYLES = {"mlp": "--", "block": ":"}
_TITLES = {"relative": "relative difference", "mse": "mean squared difference"}
_WINDOW = "#d5e6f2"
_PURPOSE = "drawing differences"


def _drawn(value: float | None) -> TypeGuard[float]:
    """Whether a difference has a place on a logarithmic scale."""
    return value is not None and 0 < value < math.inf


def plot_curves(analysis: Analysis, path: str | Path | None = None) -> Figure:
    """Draw the relative and the mean squared difference of each kind over the steps, on logarithmic scales.

    Args:
        analysis: the differences; means over layers are drawn.
        path: where to save the picture, in the format of its ending.

    Returns:
        The figure, which pyplot does not know. The window to start from is shaded.
    """
    figure = new_figure(_PURPOSE, (11, 3.6), dpi=140)
    figure.subplots(1, 2)
    start = analysis.start
    for ax, what in zip(figure.axes, _TITLES, strict=True):
        for kind in analysis.kinds:
            points = [(i, v) for i, v in enumerate(analysis.curve(kind, what)) if _drawn(v)]
            steps, values = [i for i, _ in points], [v for _, v in points]
            ax.plot(steps, values, _STYLES.get(kind, "-"), color=COLOURS[kind], label=kind, linewidth=1.6)
        if start is not None:
            lo, hi = start.window
            ax.axvspan(lo - 0.5, hi - 0.5, color=_WINDOW, zorder=0, label="window to start from")
        ax.set_yscale("log")
        ax.set_title(f"{_TITLES[what]} to the step before", fontsize=10)
        ax.set_xlabel("sampling step", fontsize=9)
        ax.set_xlim(0, analysis.num_steps - 0.5)
        whole_numbers(ax)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return saved(figure, path)


def plot_layers(analysis: Analysis, path: str | Path | None = None) -> Figure:
    """Draw the relative difference as a heat map for each kind, with a row for each layer and a column for each step.

    Args:
        analysis: the differences.
        path: where to save the picture, in the format of its ending.

    Returns:
        The figure, which pyplot does not know.
    """
    maps = {kind: analysis.layers(kind) for kind in analysis.kinds}
    height = sum(0.6 + 0.12 * max(len(rows), 3) for rows in maps.values())
    figure = new_figure(_PURPOSE, (8, 0.4 + height), dpi=140)
    figure.subplots(max(len(maps), 1), 1)
    log_norm = require("matplotlib.colors", _PURPOSE).LogNorm
    values = [v for rows in maps.values() for row in rows.values() for v in row if _drawn(v)]
    norm = log_norm(min(values), max(values)) if values else None
    for ax, (kind, rows) in zip(figure.axes, maps.items(), strict=False):
        grid = [[v if _drawn(v) else math.nan for v in row] for row in rows.values()]
        image = ax.imshow(grid, aspect="auto", norm=norm, cmap="viridis", interpolation="nearest")
        ax.set_ylabel(f"{kind}\nlayer", fontsize=9)
        whole_numbers(ax)
        ax.set_yticks(range(len(rows)), [str(layer) for layer in rows], fontsize=7)
    if maps:
        figure.axes[len(maps) - 1].set_xlabel("sampling step", fontsize=9)
        figure.colorbar(image, ax=figure.axes[: len(maps)], label="relative difference to the step before")
    return saved(figure, path)
