"""Pictures of plans."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require
from ..figures import new_figure, saved, whole_numbers
from .costs import HeldBytes
from .plan import Action, Decision, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {Action.COMPUTE: "#a7b0ba", Action.STORE: "#0072b2", Action.REUSE: "#f5c242", Action.SKIP: "#ffffff"}
"""Fill of a cell by action; the fills differ in lightness too, for colour-blind readers."""
NAMES = {
    Action.COMPUTE: "computed",
    Action.STORE: "computed and stored",
    Action.REUSE: "reused",
    Action.SKIP: "inside a reused block or model",
}
_WINDOW, _INK, _FAINT = "#d5e6f2", "#1c1e22", "#6e727a"
KIND_COLOURS = {
    "model": "#1c1e22",
    "block": "#56606b",
    "spatial": "#0072b2",
    "temporal": "#56b4e9",
    "cross": "#e69f00",
    "mlp": "#009e73",
    "text": "#cc79a7",
    "predictions": "#a7b0ba",
}
"""Fill of the bytes kept, by kind."""
_NOTE: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8.5, "color": _INK}
_HEAD = "-|>,head_width=0.16,head_length=0.28"
_ARROW = {"arrowstyle": _HEAD, "color": "#6b4100", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
_ORDER = ("model", "cross", "temporal", "spatial", "mlp", "block")
_ROW, _CELL = 1.0, 0.62  # height of a row and of its cells
_MOST_ARROWS = 120  # columns above which a cell is too narrow for an arrow


def _window(plan: Plan, label: str, row: tuple[Decision, ...]) -> tuple[int, int] | None:
    """First and last step of a row's window, or None if its rule has none."""
    kind = label.split()[0]
    layer = next(s.layer for s in plan.sublayers if s.kind == kind and plan.rows[s.name] == row)
    rule = plan.config.rule(kind, layer)
    inside = () if rule is None or rule.range == 1 else rule.inside(plan.schedule)
    return (inside[0], inside[-1]) if inside else None


def _draw_row(ax: Axes, y: float, label: str, row: tuple[Decision, ...], begin: int, arrows: bool) -> None:
    patches = require("matplotlib.patches", "drawing a plan")
    ends = {cell.reads[0]: step for step, cell in enumerate(row, begin) if cell.reads}
    for step, cell in enumerate(row, begin):
        edge = "#c4c8ce" if cell.action is Action.SKIP else "white"
        fill = COLOURS[cell.action]
        style = {"facecolor": fill, "edgecolor": edge, "linewidth": 0.8, "gid": f"{label} at {step}"}
        ax.add_patch(patches.Rectangle((step - 0.5, y - _CELL / 2), 1, _CELL, **style))
    for source, end in ends.items() if arrows else ():
        ax.annotate("", (end + 0.36, y), (source + 0.5, y), arrowprops=_ARROW)


def _draw_bytes(ax: Axes, plan: Plan, cost: HeldBytes) -> None:
    """The bytes held after each step, by kind and place, and the budget of the device."""
    scale = 2**30 if cost.peak_cache_bytes + cost.peak_host_bytes >= 2**29 else 2**20
    below = [0.0] * len(plan.steps)
    hatched: dict[str, Any] = {"hatch": "////", "edgecolor": "white", "linewidth": 0}
    for where, by_kind in (("", cost.cache_bytes_by_kind), (" in host memory", cost.host_bytes_by_kind)):
        for kind, held in by_kind.items():
            values = [n / scale for n in held]
            style = (hatched if where else {}) | {
                "color": KIND_COLOURS[kind],
                "label": kind + where,
                "gid": f"bytes of {kind}{where}",
            }
            if any(values):
                ax.bar(list(plan.steps), values, 1.0, below, **style)
            below = [a + b for a, b in zip(below, values, strict=True)]
    if plan.given_up is not None:
        ax.axhline(plan.given_up.budget / scale, color=_INK, linewidth=1, linestyle="--", gid="budget")
        ax.annotate("budget", (plan.steps.start - 0.5, plan.given_up.budget / scale), (4, 4), **_NOTE)
    ax.set_ylabel(f"kept, {'GiB' if scale == 2**30 else 'MiB'}", fontsize=9, color=_FAINT)
    ax.tick_params(length=0, labelsize=8.5, labelcolor=_FAINT)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[:].set_color("#c4c8ce")
    if ax.containers:
        ax.legend(frameon=False, fontsize=8.5, loc="upper left", bbox_to_anchor=(1.0, 0.9), handlelength=1.1)


def plot_plan(plan: Plan, path: str | Path | None = None, cost: HeldBytes | None = None) -> Figure:
    """Draw a plan as a pyramid with a row for each kind and a column for each step.

    Args:
        plan: the plan.
        path: where to save the picture, in the format of its ending.
        cost: its forecast, or the summary of a run, for a second panel with the bytes held after each step.

    Returns:
        The figure, which pyplot does not know. Each cell is a rectangle with the fill `COLOURS[action]`, and an arrow
        leads from each stored output over its reuses.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    patches = require("matplotlib.patches", "drawing a plan")
    groups = sorted(plan.grouped(), key=lambda g: _ORDER.index(g[0].split()[0]))
    steps = plan.steps
    width = min(18.0, max(6.5, 2.6 + 0.2 * len(steps)))
    rows_high = 1.35 + 0.42 * len(groups)
    if cost is None:
        figure = new_figure("drawing a plan", (width, rows_high), dpi=160)
        ax = lowest = figure.add_subplot()
    else:
        figure = new_figure("drawing a plan", (width, rows_high + 1.9), dpi=160)
        ax, lowest = figure.subplots(2, 1, sharex=True, height_ratios=(rows_high, 1.9))
        _draw_bytes(lowest, plan, cost)
    for index, (label, row) in enumerate(groups):
        y = (len(groups) - 1 - index) * _ROW
        window = _window(plan, label, row)
        if window:
            corner, length = (window[0] - 0.5, y - _ROW / 2), window[1] - window[0] + 1
            style = {"facecolor": _WINDOW, "edgecolor": "none", "zorder": 0, "gid": f"window of {label}"}
            ax.add_patch(patches.Rectangle(corner, length, _ROW, **style))
        _draw_row(ax, y, label, row, steps.start, arrows=len(steps) <= _MOST_ARROWS)
        computed = sum(d.action in (Action.COMPUTE, Action.STORE) for d in row)
        reused = sum(d.action is Action.REUSE for d in row)
        counts, right = f"{computed} computed, {reused} reused", (steps.stop - 0.5, y)
        ax.annotate(counts, right, (8, 0), va="center", **_NOTE)
    rows = [(len(groups) - 1 - i) * _ROW for i in range(len(groups))]
    ax.set_yticks(rows, [label for label, _ in groups], fontsize=10, color=_INK)
    ax.set_xlim(steps.start - 0.7, steps.stop - 0.5)
    ax.set_ylim(-0.55, len(groups) - 0.45)
    lowest.set_xlabel("sampling step", fontsize=9, color=_FAINT)
    ax.tick_params(length=0, labelcolor=_INK)
    ax.tick_params(axis="x", labelsize=8.5, labelcolor=_FAINT)
    whole_numbers(ax)
    ax.spines[:].set_visible(False)
    present = {d.action for _, row in groups for d in row}
    edge = {"edgecolor": "#c4c8ce", "linewidth": 0.5}
    handles = [patches.Patch(facecolor=COLOURS[a], label=NAMES[a], **edge) for a in Action if a in present]
    if any(_window(plan, *group) for group in groups):
        handles.append(patches.Patch(facecolor=_WINDOW, label="window"))
    legend = {"frameon": False, "fontsize": 9, "handlelength": 1.1, "columnspacing": 1.4}
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), **legend)
    return saved(figure, path)
