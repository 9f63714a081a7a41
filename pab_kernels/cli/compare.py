"""`pab compare`: its options and its progress."""

# No `from __future__ import annotations` here: typer reads the command's annotations at run time.

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..extras import require_all
from ..figures import check_plot_path
from ..strict_json import to_json
from .arguments import AsJson, numbers
from .display import progress_bar


def command(
    a: Annotated[Path, typer.Argument(help="A video, an image, a folder of images, or a tensor.", metavar="A")],
    b: Annotated[Path, typer.Argument(help="The reference: the clip made without PAB.", metavar="B")],
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plot every measure over the frames: .png, .pdf or .svg.")
    ] = None,
    values: Annotated[str, typer.Option(metavar="LO,HI", help="Black and white in floating-point tensors.")] = "0,1",
    lpips: Annotated[
        bool | None, typer.Option(help="Whether to measure LPIPS. Default: if a package for it is installed.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two clips: PSNR, SSIM, temporal consistency and LPIPS, frame by frame and in total.

    The clips must have the same size and number of frames. Consistency is 1 - the mean absolute change from frame to
    frame: it is lower for a clip that flickers more.
    """
    require_all("pab compare", "rich", "skimage")
    from ..analysis.quality import comparison

    if plot is not None:
        check_plot_path(plot)
    takes = "--values takes two numbers, black and white, such as 0,1 or -1,1"
    black_and_white = numbers(values, takes, ",", float, counts=(2,))
    with progress_bar("reading", "frames") as show:
        result = comparison.compare(a, b, values=black_and_white, lpips=lpips, progress=partial(show, "comparing"))
    try:
        if plot is not None:
            result.plot(plot)
    finally:  # print the result even if the picture cannot be written
        print(to_json(result.to_dict()) if as_json else result)
