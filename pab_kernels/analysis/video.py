"""Clips side by side with labels, written as GIF, MP4 and PNG."""

from __future__ import annotations

import errno
import math
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..extras import require
from ..files import replacing

if TYPE_CHECKING:
    import torch
    from PIL.ImageFont import FreeTypeFont

_PAPER, _INK, _FAINT = (250, 250, 248), (28, 30, 34), (110, 114, 122)
_GAP = 8

FPS = 6
"""Default frames a second."""


def _font(size: int) -> FreeTypeFont:
    return require("PIL.ImageFont", "labelling clips").load_default(size=size)


def _wrap(text: str, font: FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def pixels(clips: torch.Tensor) -> np.ndarray:
    """`[..., 3, height, width]` in [0, 1] as uint8 `[..., height, width, 3]`."""
    return (clips.detach().float().cpu().clamp(0, 1) * 255).round().byte().movedim(-3, -1).numpy()


def columns(runs: Sequence[tuple[str, float, float | None, torch.Tensor]]) -> list[tuple[str, str, torch.Tensor]]:
    """Columns of `side_by_side` for runs of (title, seconds, PSNR or None, clips).

    The line below a title is the run's seconds or, with a PSNR, its speed-up over the first run and its PSNR.
    """
    listed = []
    for title, seconds, psnr, clips in runs:
        line = f"{seconds:.1f} s"
        if psnr is not None:
            line = f"{runs[0][1] / seconds:.2f}x, " + ("identical" if math.isinf(psnr) else f"{psnr:.1f} dB")
        listed.append((title, line, clips))
    return listed


def side_by_side(
    columns: Sequence[tuple[str, str, torch.Tensor]], captions: Sequence[str], scale: int = 4
) -> np.ndarray:
    """Arrange clips in a table with a column for each run and a row for each caption.

    Args:
        columns: title, a line below it, and the run's clips `[clips, frames, 3, height, width]` in [0, 1].
        captions: one for each clip, written above its row.
        scale: whole factor by which pixels are enlarged, without smoothing.

    Returns:
        `[frames, height, width, 3]`, uint8; height and width are multiples of 16, which suits video codecs.

    Raises:
        ValueError: there are no columns, or their shapes or the captions do not fit together.
    """
    shapes = {tuple(clips.shape) for _, _, clips in columns}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 5 or shape[2] != 3:
        raise ValueError(f"columns must all be [clips, frames, 3, height, width], got {sorted(shapes) or 'none'}")
    count, frames, _, height, width = shape
    if len(captions) != count or scale < 1:
        got = f"{len(captions)} captions and scale {scale}"
        raise ValueError(f"{count} clips need {count} captions and a scale of at least 1, got {got}")
    image, draw_on = require("PIL.Image", "labelling clips"), require("PIL.ImageDraw", "labelling clips")
    title_font, font = _font(15), _font(12)
    cell_h, cell_w = height * scale, width * scale
    titles = [_wrap(title, title_font, cell_w) for title, _, _ in columns]
    below = [_wrap(text, font, cell_w) for _, text, _ in columns]
    title_height = 18 * max(map(len, titles))
    top = _GAP + title_height + 15 * max(map(len, below)) + 2
    row_height = 20 + cell_h + _GAP
    full_h = -(-(top + count * row_height + _GAP) // 16) * 16
    full_w = -(-(_GAP + len(columns) * (cell_w + _GAP)) // 16) * 16

    page = image.new("RGB", (full_w, full_h), _PAPER)
    draw = draw_on.Draw(page)
    for c in range(len(columns)):
        x = _GAP + c * (cell_w + _GAP)
        for i, line in enumerate(titles[c]):
            draw.text((x, _GAP + 18 * (i + max(map(len, titles)) - len(titles[c]))), line, _INK, title_font)
        for i, line in enumerate(below[c]):
            draw.text((x, _GAP + title_height + 15 * i), line, _FAINT, font)
    for row, caption in enumerate(captions):
        draw.text((_GAP, top + row * row_height + 3), caption, _INK, font)

    film = np.repeat(np.asarray(page)[None], frames, axis=0)
    for c, (_, _, clips) in enumerate(columns):
        large = pixels(clips).repeat(scale, axis=2).repeat(scale, axis=3)  # [clips, frames, cell_h, cell_w, 3]
        x = _GAP + c * (cell_w + _GAP)
        for row in range(count):
            y = top + row * row_height + 20
            film[:, y : y + cell_h, x : x + cell_w] = large[row]
    return film


def write_gif(path: str | Path, film: np.ndarray) -> Path:
    """Write `film` `[frames, height, width, 3]` uint8 as a GIF that loops, and return the path."""
    imageio: Any = require("imageio.v3", "writing clips")
    encoded: bytes = imageio.imwrite("<bytes>", film, extension=".gif", duration=1000 / FPS, loop=0)
    with replacing(path) as made:
        made.write_bytes(encoded)
    return Path(path)


def write_png(path: str | Path, image: np.ndarray) -> Path:
    """Write `image` `[height, width, 3]` uint8, and return the path."""
    with replacing(path) as made:
        require("PIL.Image", "writing images").fromarray(image).save(made)
    return Path(path)


def write_mp4(path: str | Path, film: np.ndarray, fps: float = FPS, repeats: int = 4) -> Path:
    """Write `film` `[frames, height, width, 3]` uint8 as H.264 in a format that any player supports.

    The format needs an even height and width: an odd one repeats the last line.

    Args:
        path: the file.
        film: the frames.
        fps: frames a second.
        repeats: how often the film is repeated.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written, or ffmpeg fails; the error has the system's reason or ffmpeg's last line.
    """
    ffmpeg = require("imageio_ffmpeg", "writing MP4 files").get_ffmpeg_exe()
    film = np.pad(film, ((0, 0), (0, film.shape[1] % 2), (0, film.shape[2] % 2), (0, 0)), mode="edge")
    frames = np.ascontiguousarray(np.tile(film, (repeats, 1, 1, 1)))
    given = f"-f rawvideo -pix_fmt rgb24 -s {film.shape[2]}x{film.shape[1]} -r {fps:.6g} -i -".split()
    wanted = ["-an", "-c:v", "libx264", "-crf", "10", "-pix_fmt", "yuv420p", "-f", "mp4"]
    with replacing(path) as made:
        # not imageio's writer, which ignores ffmpeg's exit status: on a full disk it leaves half a film
        command = (ffmpeg, "-v", "error", "-y", *given, *wanted, os.fspath(made))
        done = subprocess.run(command, input=frames.reshape(-1).data, capture_output=True)
        if done.returncode != 0:
            raise _ffmpeg_error(done.stderr.decode(errors="replace"))
    return Path(path)


def _ffmpeg_error(printed: str) -> OSError:
    """The error that ffmpeg printed: the system's reason, or else its last line."""
    number = next((n for n in errno.errorcode if os.strerror(n) in printed), None)
    if number is not None:
        return OSError(number, os.strerror(number))
    last = (printed.strip().splitlines() or ["it gave no reason"])[-1]
    return OSError(None, "ffmpeg failed: " + re.sub(r"^(\[[^]]*\] )+", "", last))  # without addresses in brackets
