"""Comparison of two clips, frame by frame and in total: `pab compare`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...extras import require
from ...figures import new_figure, saved, whole_numbers
from ...progress import Progress
from .clips import Clip, check_values, read_clip
from .perceptual import Distance, load_lpips
from .psnr_ssim import psnr, ssim

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEADINGS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "consistency_a": "consistency A",
    "consistency_b": "consistency B",
    "lpips": "LPIPS",
}
_COLOURS = {"consistency_b": "#e69f00"}


@dataclass(frozen=True)
class Closeness:
    """How close two frames or two clips are.

    Args:
        psnr: in dB; infinite for equal frames.
        ssim: 1 for equal frames.
        consistency_a, consistency_b: 1 - the mean absolute change from the frame before, in either clip; None for a
            first frame.
        lpips: 0 for equal frames; None if not measured.
    """

    psnr: float
    ssim: float
    consistency_a: float | None
    consistency_b: float | None
    lpips: float | None

    def to_dict(self) -> dict[str, float | None]:
        """JSON-ready; an infinite PSNR is None."""
        return {k: v if v is not None and math.isfinite(v) else None for k, v in vars(self).items()}


@dataclass(frozen=True)
class Comparison:
    """Clip `a` against clip `b`.

    Args:
        a, b: their names.
        height, width: of the frames, in pixels.
        total: PSNR of the mean squared error over all frames; the other measures are means over the frames.
        frames: the measures of each frame.
        notes: which measures are missing, and how the clips were made comparable.

    `str(comparison)` is a table; `comparison.plot(path)` draws a picture.
    """

    a: str
    b: str
    height: int
    width: int
    total: Closeness
    frames: tuple[Closeness, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a PSNR of None means equal frames."""
        frames = [{"frame": i} | frame.to_dict() for i, frame in enumerate(self.frames)]
        return {
            "a": self.a,
            "b": self.b,
            "height": self.height,
            "width": self.width,
            "equal": math.isinf(self.total.psnr),
            "total": self.total.to_dict(),
            "frames": frames,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        measured = [name for name in _HEADINGS if any(getattr(frame, name) is not None for frame in self.frames)]
        rows = [["frame", *(_HEADINGS[name] for name in measured)]]
        for label, line in (*((str(i), frame) for i, frame in enumerate(self.frames)), ("total", self.total)):
            rows.append([label, *(_cell(name, getattr(line, name)) for name in measured)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        head = [f"A  {self.a}", f"B  {self.b}", f"{len(self.frames)} frame(s) of {self.height} x {self.width}", ""]
        return "\n".join([*head, *table, *(f"note: {note}" for note in self.notes)])

    def plot(self, path: str | Path | None = None) -> Figure:
        """Plot every measure over the frames with matplotlib, and save it to `path` if given."""
        figure = new_figure("plotting a comparison", (8, 6.4), dpi=150)
        panels = [(_HEADINGS[name], [name]) for name in ("psnr", "ssim")]
        if len(self.frames) > 1:
            panels.append(("consistency", ["consistency_a", "consistency_b"]))
        if self.total.lpips is not None:
            panels.append((_HEADINGS["lpips"], ["lpips"]))
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (heading, names) in zip(axes, panels, strict=True):
            for name in names:
                values = [getattr(frame, name) for frame in self.frames]
                drawn = [v if v is not None and math.isfinite(v) else math.nan for v in values]
                label = {"consistency_a": "A", "consistency_b": "B"}.get(name)
                colour = _COLOURS.get(name, "#0072b2")
                ax.plot(range(len(drawn)), drawn, marker="o", markersize=3, color=colour, label=label)
            if len(names) > 1:
                ax.legend(loc="best", frameon=False)
            ax.set_ylabel(heading)
            ax.grid(alpha=0.3)
        if equal := sum(math.isinf(frame.psnr) for frame in self.frames):
            axes[0].set_title(f"{equal} equal frame(s), of infinite PSNR, are not drawn", fontsize=9, loc="left")
        axes[-1].set_xlabel("frame")
        whole_numbers(axes[-1])
        figure.suptitle(f"A: {self.a}   B: {self.b}", fontsize=10)
        return saved(figure, path)


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if math.isinf(value):
        return "same"
    return f"{value:.2f}" if name == "psnr" else f"{value:.4f}"


def compare(
    a: Any,
    b: Any,
    *,
    values: tuple[float, float] = (0.0, 1.0),
    lpips: bool | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare clip `a` with clip `b`, usually the clip made without PAB.

    1. PSNR = 10 log10(1 / mean((a - b)^2)) of every frame, and of the error over all frames.
    2. SSIM (Wang et al. 2004) of every frame with a uniform 7 x 7 window, mean over channels.
    3. Temporal consistency of either clip, as VBench's temporal flickering (Huang et al. 2024): frame i has
       `1 - mean(|frame_i - frame_(i-1)|)`, with black 0 and white 1. It is lower for a clip that flickers more.
    4. LPIPS of every frame, if a package for it is installed.

    Args:
        a, b: paths of videos, images, folders of images or files of tensors, or tensors or arrays: see
            `clips.read_clip`.
        values: of black and white in floating-point tensors.
        lpips: whether to measure LPIPS; None: if a package for it is installed, else add a note.
        progress: called after every frame.

    Returns:
        The measures. `print` shows a table.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a clip is not supported, their sizes or numbers of frames differ, or the network of LPIPS cannot be
            loaded with `lpips=True`.
        ModuleNotFoundError: a package that the clips or `lpips=True` need is not installed.

    >>> import numpy as np
    >>> round(compare(np.full((2, 3, 8, 8), 0.6), np.full((2, 3, 8, 8), 0.5), lpips=False).total.psnr, 6)
    20.0
    """
    check_values(values)
    require("skimage.metrics", "measuring PSNR and SSIM")
    clips = read_clip(a, "A", values), read_clip(b, "B", values)
    _check_alike(*clips)
    notes = [note for clip in clips for note in clip.notes]
    distance, missing = _chosen_lpips(lpips)
    measured = [c.frames.shape[1] for c in clips]
    if measured[0] != measured[1]:
        notes.append(f"{clips[measured.index(1)].name} is grey and is compared as three equal channels")
    errors, frames = _measure(clips, distance, progress)
    total = Closeness(
        psnr=psnr(float(np.mean(errors))),
        ssim=float(np.mean([frame.ssim for frame in frames])),
        consistency_a=_mean([frame.consistency_a for frame in frames]),
        consistency_b=_mean([frame.consistency_b for frame in frames]),
        lpips=_mean([frame.lpips for frame in frames]),
    )
    height, width = clips[0].frames.shape[2:]
    return Comparison(clips[0].name, clips[1].name, height, width, total, tuple(frames), (*notes, *missing))


def _check_alike(a: Clip, b: Clip) -> None:
    if len(a.frames) != len(b.frames):
        got = f"{a.name} has {len(a.frames)} frame(s) and {b.name} has {len(b.frames)}"
        raise ValueError(f"{got}; the numbers must agree: cut the longer one")
    if a.frames.shape[2:] != b.frames.shape[2:]:
        (h, w), (h2, w2) = a.frames.shape[2:], b.frames.shape[2:]
        got = f"{a.name} has frames of {h} x {w} and {b.name} of {h2} x {w2} (height x width)"
        raise ValueError(f"{got}; they must agree: resize one clip")


def _chosen_lpips(wanted: bool | None) -> tuple[Distance | None, list[str]]:
    """The function that measures LPIPS, or a note with the reason why there is none."""
    if wanted is False:
        return None, []
    try:
        return load_lpips(), []
    except (ModuleNotFoundError, RuntimeError) as error:
        if wanted:
            refused = ModuleNotFoundError if isinstance(error, ModuleNotFoundError) else ValueError
            raise refused(f"LPIPS cannot be measured: {error}") from None
        return None, [f"LPIPS was not measured: {error}"]


def _measure(
    clips: tuple[Clip, Clip], distance: Distance | None, progress: Progress | None
) -> tuple[list[float], list[Closeness]]:
    """The mean squared error and the closeness of every frame."""
    errors, frames = [], []
    before: list[np.ndarray] = []
    count = len(clips[0].frames)
    for i in range(count):
        pair = [clip.frame(i) for clip in clips]  # [channels, height, width]
        channels = max(frame.shape[0] for frame in pair)
        pair = [np.broadcast_to(frame, (channels, *frame.shape[1:])) for frame in pair]
        steady_a, steady_b = (_consistency(now, then) for now, then in zip(pair, before or (None, None), strict=True))
        lpips = distance(*(np.broadcast_to(frame, (3, *frame.shape[1:])) for frame in pair)) if distance else None
        errors.append(float(((pair[0] - pair[1]) ** 2).mean()))
        frames.append(Closeness(psnr(errors[-1]), ssim(*pair), steady_a, steady_b, lpips))
        before = pair
        if progress:
            progress(i + 1, count)
    return errors, frames


def _consistency(now: np.ndarray, then: np.ndarray | None) -> float | None:
    return None if then is None else 1 - float(np.abs(now - then).mean())


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else None
