"""Figures of matplotlib without pyplot's global state."""

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
    """An empty figure with constrained layout.

    Args:
        purpose: what needs matplotlib, for the error if it is not installed.
        size: width and height in inches.
        dpi: pixels per inch, also when saved.
    """
    figure: Figure = require("matplotlib.figure", purpose).Figure(
        figsize=size, dpi=dpi, facecolor="white", layout="constrained"
    )
    require("matplotlib.backends.backend_agg", purpose).FigureCanvasAgg(figure)
    return figure


def whole_numbers(axes: Axes) -> None:
    """Put the ticks of the x axis at whole numbers: steps or frames."""
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "drawing").MaxNLocator(integer=True))


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """`figure`, saved to `path` if one is given, in the format of its ending."""
    if path is not None:
        with replacing(path) as made:
            figure.savefig(made)
    return figure


def check_plot_path(path: str | Path) -> None:
    """Refuse a picture that could not be saved, before anything is measured.

    Raises:
        ValueError: the ending or the name is not supported, or the path is not a regular file.
        FileNotFoundError: the folder does not exist.
    """
    path = path_of(path)
    formats = require("matplotlib.backend_bases", "drawing").FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        endings = " ".join(f".{ending}" for ending in sorted(formats))
        raise ValueError(f"{shortened(str(path))} cannot be drawn; supported endings are {endings}")
    if not os.path.isdir(path.parent):
        folder, name = shortened(str(path.parent)), shortened(path.name)
        raise FileNotFoundError(f"there is no folder {folder} for {name}; make it first")
    if path.exists():
        check_regular(path)
