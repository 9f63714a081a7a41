"""Reading clips: videos, images, folders of images, files of tensors."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...extras import require
from ...files import check_regular, path_of
from ...messages import first_line, shortened, shown

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
TENSORS = (".pt", ".pth", ".npy", ".safetensors")
_OVERSHOOT = 2**-8
"""Tolerance of floating-point pixels outside of black and white, as a share of their distance: bfloat16's rounding."""


@dataclass(frozen=True)
class Clip:
    """The frames of a clip as they were stored.

    Args:
        frames: `[frames, 1 or 3 channels, height, width]`, uint8, uint16, bool or floating point.
        name: the file, for messages.
        black, white: their values in `frames`.
        notes: how the frames were changed.
    """

    frames: np.ndarray
    name: str
    black: float
    white: float
    notes: tuple[str, ...] = ()

    def frame(self, index: int) -> np.ndarray:
        """A frame as `[channels, height, width]`, float64, black 0 and white 1."""
        pixels = (self.frames[index].astype(np.float64) - self.black) / (self.white - self.black)
        return pixels.clip(0, 1)


def read_clip(source: Any, name: str = "clip", values: tuple[float, float] = (0.0, 1.0)) -> Clip:
    """Read a clip.

    The images of a folder are its frames, in the order of their names with numbers by value (`2.png` before `10.png`).
    A file of tensors holds one tensor: `[frames, channels, height, width]`, `[frames, height, width, channels]` or
    `[channels, frames, height, width]`, optionally with a batch of 1 in front; or an image, without frames; or a grey
    clip, without channels. The last, second or first dimension of 1, 3 or 4 is the channels. Transparent pixels are
    shown on black.

    Args:
        source: a path, or a tensor or array.
        name: of a tensor or array, for messages.
        values: of black and white in floating-point tensors; bytes are 0 to 255, 16-bit integers 0 to 65535.

    Returns:
        The clip.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: the ending, the shape or the values are not supported, or the file is damaged.
        ModuleNotFoundError: the package that reads it is not installed.
    """
    if isinstance(source, (str, Path)):
        source = path_of(source)
        name = shortened(str(source))
        if not os.path.lexists(source):
            raise FileNotFoundError(f"there is no file or folder {name}")
        return _checked(_channels_first(_read(source), name), name, values)
    return _checked(_channels_first(_array(source), name), name, values)


def _read(path: Path) -> np.ndarray:
    if path.is_dir():
        return _read_folder(path)
    ending = path.suffix.lower()
    reader = next((read for endings, read in _READERS if ending in endings), None)
    if reader is None:
        supported = " ".join(VIDEOS + IMAGES + TENSORS)
        got = f"{shortened(str(path))} ends in {ending or 'nothing'}"
        raise ValueError(f"{got}; supported are folders of images and {supported}: convert it")
    return _decoded(reader, path)


def _decoded(reader: Callable[[Path], np.ndarray], path: Path) -> np.ndarray:
    """Read a file; an error of the reader's library about a damaged file becomes one line."""
    try:
        check_regular(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return reader(path)
    except (ModuleNotFoundError, PermissionError):
        raise
    except MemoryError:  # the file is too large, or its header gives a wrong size
        raise ValueError(f"{path} does not fit into memory") from None
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:]}: {first_line(error)}") from error


def _read_folder(path: Path) -> np.ndarray:
    files = sorted(
        (p for p in path.iterdir() if p.suffix.lower() in IMAGES and not p.name.startswith(".")), key=_natural
    )
    if not files:
        raise ValueError(f"the folder {path} holds no images; supported are {' '.join(IMAGES)}")
    frames: list[np.ndarray] = []
    for file in files:
        frame = _decoded(_read_image, file)  # [1, height, width, channels]
        if len(frame) > 1:
            raise ValueError(
                f"{file} holds {len(frame)} frames; a folder has one in each image: compare that file alone"
            )
        if frames and frame.shape[1:3] != frames[0].shape[1:3]:
            (h0, w0), (h, w) = frames[0].shape[1:3], frame.shape[1:3]
            raise ValueError(f"the frames of a clip have one size: {files[0]} is {h0} x {w0}, {file} is {h} x {w}")
        frames.append(frame)
    return _joined(frames)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", path.name)]


def _joined(frames: list[np.ndarray]) -> np.ndarray:
    """Frames `[1, height, width, channels]` as one array; those with fewer channels or 16 bits are converted."""
    if len({(frame.shape, frame.dtype) for frame in frames}) > 1:
        scale = 255 / 65535
        frames = [np.round(f * scale).astype(np.uint8) if f.dtype == np.uint16 else f for f in frames]
        channels = max(frame.shape[3] for frame in frames)
        frames = [_widened(frame, channels) for frame in frames]
    return np.concatenate(frames)


def _widened(frame: np.ndarray, channels: int) -> np.ndarray:
    if frame.shape[3] == 1 and channels > 1:
        frame = frame.repeat(3, axis=3)
    if frame.shape[3] == 3 and channels == 4:
        frame = np.concatenate([frame, np.full_like(frame[..., :1], 255)], axis=3)
    return frame


def _read_image(path: Path) -> np.ndarray:
    """`[frames, height, width, 1, 3 or 4]`, uint8, or uint16 for grey images of 16 bits."""
    image, operations, sequence = (
        require(f"PIL.{part}", "reading images") for part in ("Image", "ImageOps", "ImageSequence")
    )
    frames = []
    with image.open(path) as opened:
        for frame in sequence.Iterator(opened):
            upright = operations.exif_transpose(frame)
            if upright.mode.startswith("I;16"):
                frames.append(np.asarray(upright).astype(np.uint16)[None, ..., None])
                continue
            transparent = "A" in upright.getbands() or "transparency" in upright.info
            mode = "RGBA" if transparent else "L" if upright.mode in ("1", "L") else "RGB"
            pixels = np.asarray(upright.convert(mode))
            frames.append(pixels.reshape(1, *pixels.shape[:2], -1))
    return _joined(frames)


def _read_video(path: Path) -> np.ndarray:
    """`[frames, height, width, 3]`, uint8."""
    require("imageio_ffmpeg", "reading videos")
    imageio: Any = require("imageio.v3", "reading videos")
    with imageio.imopen(path, "r", plugin="FFMPEG") as file:
        return np.stack(list(file.iter()))


def _read_tensor(path: Path) -> np.ndarray:
    import torch

    if path.suffix.lower() == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix.lower() == ".safetensors":
        held = require("safetensors.torch", "reading .safetensors").load_file(path)
    else:
        held = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(held, dict):
        if len(held) != 1:
            raise ValueError(
                f"it holds {len(held)} entries ({', '.join(map(str, list(held)[:5]))}); save the clip alone"
            )
        held = next(iter(held.values()))
    if not isinstance(held, torch.Tensor):
        raise ValueError(f"it holds a {type(held).__name__}; save the clip as one tensor")
    return _array(held)


_READERS = ((VIDEOS, _read_video), (IMAGES, _read_image), (TENSORS, _read_tensor))


def _array(source: Any) -> np.ndarray:
    """A tensor or array on the host; dtypes that numpy lacks become float32."""
    if hasattr(source, "detach"):
        source = source.detach().cpu()
        source = source.float() if source.is_floating_point() and source.element_size() < 4 else source
    return np.asarray(source)


def _channels_first(array: np.ndarray, name: str) -> np.ndarray:
    """`[frames, channels, height, width]` of any supported layout."""
    shape = list(array.shape)
    if array.ndim == 5 and shape[0] == 1:
        array = array[0]
    if array.ndim == 3:
        array = array[None]
    if array.ndim == 4 and array.size:
        for axis in (3, 1, 0):  # [frames, height, width, channels], [frames, channels, ...], [channels, frames, ...]
            if array.shape[axis] in (1, 3, 4):
                return np.moveaxis(array, axis, 1)
    layouts = "[frames, channels, height, width], [frames, height, width, channels] and [channels, frames, ...]"
    channels = "1, 3 or 4 channels and at least one frame"
    raise ValueError(f"{name} has the shape {shape}; supported are {layouts} with {channels}: permute or cut it")


def _checked(frames: np.ndarray, name: str, values: tuple[float, float]) -> Clip:
    black, white = values
    if frames.dtype in (np.uint8, np.uint16, np.bool_):
        black, white = 0.0, 1.0 if frames.dtype == np.bool_ else float(np.iinfo(frames.dtype).max)
    elif not np.issubdtype(frames.dtype, np.floating):
        supported = "uint8, uint16, bool and floating point"
        raise ValueError(f"{name} has the dtype {frames.dtype}; supported are {supported}: convert it")
    else:
        low, high = float(frames.min()), float(frames.max())
        if not np.isfinite([low, high]).all():
            raise ValueError(f"{name} holds values that are not finite")
        room = _OVERSHOOT * (white - black)
        if low < black - room or high > white + room:
            got = f"{name} has values from {low:g} to {high:g}, outside of black {black:g} and white {white:g}"
            raise ValueError(f"{got}; pass values (on the command line --values LO,HI), or clamp them")
    notes: tuple[str, ...] = ()
    if frames.shape[1] == 4:
        frames, opaque = _without_alpha(frames, black, white)
        notes = () if opaque else (f"{name}: transparent pixels are shown on black",)
    return Clip(frames, name, black, white, notes)


def _without_alpha(frames: np.ndarray, black: float, white: float) -> tuple[np.ndarray, bool]:
    """The colours of RGBA frames on black, and whether all pixels are opaque."""
    colours, alpha = frames[:, :3], frames[:, 3:]
    if (alpha >= white).all():
        return colours, True
    share = ((alpha.astype(np.float64) - black) / (white - black)).clip(0, 1)
    shown = black + (colours.astype(np.float64) - black) * share
    return (shown if np.issubdtype(frames.dtype, np.floating) else np.round(shown)).astype(frames.dtype), False


def check_values(values: Any) -> None:
    """Raise a ValueError unless `values` are two finite numbers, of black and of white."""
    pair = isinstance(values, (tuple, list)) and len(values) == 2 and all(isinstance(v, (int, float)) for v in values)
    if not pair or not values[0] < values[1] or not all(map(math.isfinite, values)):
        raise ValueError(
            f"values must be two numbers, black below white, got {shown(values)}; usual are (0, 1) and (-1, 1)"
        )
