"""Pictures drawn with matplotlib, apart from pyplot's global state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from .extras import require
from .files import check_regular, path_of, replacing
from .messages import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(purpose: str, size: tuple[float, float], dpi: int) -> Figure:
    """An empty figure that lays itself out.

    Args:
        purpose: for the message where matplotlib is not installed.
        size: in inches.
        dpi: pixels an inch, also where it is saved.
    """
    figure: Figure = require("matplotlib.figure", purpose).Figure(
        figsize=size, dpi=dpi, facecolor="white", layout="constrained"
    )
    require("matplotlib.backends.backend_agg", purpose).FigureCanvasAgg(figure)
    return figure


def whole_numbers(axes: Axes) -> None:
    """Let the marks below `axes` be whole numbers: steps or frames."""
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "drawing").MaxNLocator(integer=True))


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, written whole or not at all to `path` if given, in the format of its ending."""
    if path is not None:
        with replacing(path) as made:
            figure.savefig(made)
    return figure


def check_plot_path(path: str | Path) -> None:
    """Refuse a picture that could not be written, before anything is measured.

    Raises:
        ValueError: its ending or its name is not supported.
        FileNotFoundError: its folder does not exist.
    """
    path = path_of(path)
    supported = sorted(
        require("matplotlib.backend_bases", "plotting a comparison").FigureCanvasBase.get_supported_filetypes()
    )
    if path.suffix[1:].lower() not in supported:
        raise ValueError(
            f"{shortened(str(path))} cannot be drawn; supported endings are "
            f"{' '.join('.' + ending for ending in supported)}"
        )
    if not os.path.isdir(path.parent):
        folder, name = shortened(str(path.parent)), shortened(path.name)
        raise FileNotFoundError(f"there is no folder {folder} for {name}; make it first")
    if path.exists():
        check_regular(path)
