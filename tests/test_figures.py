"""Pictures with matplotlib: made, refused before anything is measured, and written whole."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib import pyplot

from pab_kernels.figures import check_plot_path, new_figure, saved, whole_numbers


def _refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=f"^[^\\n]*{re.escape(message)}[^\\n]*$")


def test_a_figure_is_apart_from_pyplot_and_saved_at_its_size(tmp_path: Path) -> None:
    from matplotlib.image import imread

    figure = new_figure("a test", (2, 1), dpi=50)
    axes = figure.add_subplot()
    axes.plot([0, 1, 2], [0, 1, 0])
    whole_numbers(axes)
    assert pyplot.get_fignums() == [] and saved(figure, None) is figure
    saved(figure, tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[:2] == (50, 100)
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_a_picture_that_cannot_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    check_plot_path(tmp_path / "curve.png")
    with _refused(ValueError, "cannot be drawn; supported endings are "):
        check_plot_path(tmp_path / "curve.txt")
    with _refused(FileNotFoundError, "there is no folder"):
        check_plot_path(tmp_path / "none" / "curve.png")
