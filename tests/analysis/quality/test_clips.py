"""Reading clips: every kind of file, layout and pixel, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from pab_kernels.analysis.quality.clips import read_clip


def _pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


_leaves_a_pipe = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # imageio's reader, to the collector


def _refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=f"^[^\\n]*{re.escape(message)}[^\\n]*$")


# Tensors


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 3, 8, 9), (0, 1, 2, 3)),
        ((5, 8, 9, 3), (0, 3, 1, 2)),
        ((1, 5, 3, 8, 9), (1, 2, 3, 4)),
        ((1, 5, 8, 9, 3), (1, 4, 2, 3)),
        ((1, 3, 5, 8, 9), (2, 1, 3, 4)),
        ((3, 5, 8, 9), (1, 0, 2, 3)),
        ((5, 1, 8, 9), (0, 1, 2, 3)),
        ((3, 3, 8, 9), (0, 1, 2, 3)),
    ],
)
def test_layouts_are_told_apart_by_their_channels(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    array = _pixels(*shape)
    expected = (array[0] if array.ndim == 5 else array).transpose([a - (array.ndim == 5) for a in axes])
    assert np.array_equal(read_clip(array).frames, expected)


@pytest.mark.parametrize("shape", [(3, 8, 9), (8, 9, 3), (1, 8, 9)])
def test_an_image_is_a_clip_of_one_frame(shape: tuple[int, ...]) -> None:
    frames = read_clip(_pixels(*shape)).frames
    assert frames.shape == (1, 3 if 3 in shape else 1, 8, 9)


def test_a_grey_clip_may_lack_the_channels() -> None:
    assert read_clip(_pixels(5, 8, 9)).frames.shape == (5, 1, 8, 9)


@pytest.mark.parametrize("shape", [(5, 2, 8, 9), (8, 9), (2, 5, 3, 8, 9), (0, 3, 8, 9)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with _refused(ValueError, f"clip has the shape {list(shape)}; supported are [frames, channels, height, width]"):
        read_clip(np.zeros(shape))


@pytest.mark.parametrize("ending", ["pt", "pth", "npy", "safetensors"])
def test_a_file_of_tensors_is_the_clip(ending: str, tmp_path: Path) -> None:
    clip = torch.rand(2, 3, 8, 9)
    path = tmp_path / f"clip.{ending}"
    if ending == "npy":
        np.save(path, clip.numpy())
    elif ending == "safetensors":
        pytest.importorskip("safetensors.torch").save_file({"video": clip}, path)
    else:
        torch.save(clip if ending == "pt" else {"video": clip}, path)
    read = read_clip(path)
    assert np.array_equal(read.frames, clip.numpy()) and read.name == str(path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_floating_point_is_black_at_0_and_white_at_1(dtype: torch.dtype) -> None:
    clip = read_clip(torch.tensor([0, 1], dtype=dtype).expand(1, 1, 5, 2) / 4)
    assert clip.frame(0)[0, 0].tolist() == [0, 0.25] and clip.frame(0).dtype == np.float64


def test_black_and_white_may_be_given() -> None:
    clip = read_clip(torch.tensor([-1, 0.5]).expand(1, 1, 5, 2), values=(-1, 1))
    assert clip.frame(0)[0, 0].tolist() == [0, 0.75]


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535), (np.bool_, 1)])
def test_integers_span_their_type_whatever_the_values_of_floats(dtype: Any, white: int) -> None:
    array = np.array([[[[0, white]]]], dtype=dtype)
    assert read_clip(array, values=(-1, 1)).frame(0).ravel().tolist() == [0, 1]


def test_rounding_beyond_white_is_clamped_and_more_is_refused() -> None:
    assert read_clip(np.full((1, 1, 2, 2), 1.003)).frame(0).max() == 1
    with _refused(ValueError, "clip has values from -1 to 1, outside of black 0 and white 1; pass values"):
        read_clip(np.array([-1.0, 1.0]).reshape(1, 1, 1, 2))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((1, 1, 2, 2), np.nan), "holds values that are not finite"),
        (np.full((1, 1, 2, 2), np.inf), "holds values that are not finite"),
        (np.zeros((1, 1, 2, 2), np.int64), "has the dtype int64; supported are uint8, uint16, bool and floating point"),
    ],
)
def test_pixels_of_other_kinds_are_refused(array: np.ndarray, message: str) -> None:
    with _refused(ValueError, message):
        read_clip(array)


# Images


def test_a_folder_is_ordered_by_number_and_other_files_are_left_out(tmp_path: Path) -> None:
    for i in (10, 9, 1):
        Image.fromarray(np.full((8, 9, 3), i, np.uint8)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden.png").write_text("")
    assert read_clip(tmp_path).frames[:, 0, 0, 0].tolist() == [1, 9, 10]


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp"])
def test_an_image_file_is_read(ending: str, tmp_path: Path) -> None:
    pixels = _pixels(8, 9, 3)
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", lossless=True)
    assert np.array_equal(read_clip(tmp_path / f"a.{ending}").frames[0].transpose(1, 2, 0), pixels)


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    pixels = _pixels(8, 9)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(read_clip(tmp_path / "a.png").frames, pixels[None, None])


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    pixels = _pixels(8, 9).astype(np.uint16) * 257
    Image.fromarray(pixels).save(tmp_path / "a.png")
    clip = read_clip(tmp_path / "a.png")
    assert clip.frames.dtype == np.uint16 and np.array_equal(clip.frames[0, 0], pixels)
    assert np.allclose(clip.frame(0), pixels / 65535)


def test_opaque_alpha_is_dropped_and_transparency_shown_on_black(tmp_path: Path) -> None:
    pixels = _pixels(8, 9, 4)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    opaque = read_clip(tmp_path / "opaque.png")
    assert np.array_equal(opaque.frames[0].transpose(1, 2, 0), pixels[..., :3]) and opaque.notes == ()
    pixels[:, :4, 3], pixels[:, 4, 3] = 0, 51
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    clear = read_clip(tmp_path / "clear.png")
    assert (clear.frames[..., :4] == 0).all() and np.array_equal(clear.frames[..., 5:], opaque.frames[..., 5:])
    assert np.array_equal(clear.frames[0, :, :, 4].T, np.round(pixels[:, 4, :3] / 5))
    assert clear.notes == (f"{tmp_path / 'clear.png'}: transparent pixels are shown on black",)


def test_grey_colour_and_transparent_frames_of_a_folder_go_together(tmp_path: Path) -> None:
    grey, colour, clear = _pixels(8, 9), _pixels(8, 9, 3), np.full((8, 9, 4), 255, np.uint8)
    for i, pixels in enumerate((grey, colour, clear, grey.astype(np.uint16) * 257)):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    frames = read_clip(tmp_path).frames
    assert frames.shape == (4, 3, 8, 9) and frames.dtype == np.uint8
    assert (
        (frames[0] == grey).all() and np.array_equal(frames[1].transpose(1, 2, 0), colour) and (frames[3] == grey).all()
    )


def test_a_palette_is_read_as_its_colours(tmp_path: Path) -> None:
    pixels = np.zeros((8, 9, 3), np.uint8)
    pixels[:, 4:] = (10, 200, 30)
    Image.fromarray(pixels).quantize(2).save(tmp_path / "a.png")
    assert np.array_equal(read_clip(tmp_path / "a.png").frames[0].transpose(1, 2, 0), pixels)


def test_a_gif_is_a_clip(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 9, 3), 80 * i, np.uint8)) for i in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_clip(tmp_path / "a.gif").frames[:, 0, 0, 0].tolist() == [0, 80, 160]
    with _refused(ValueError, "a.gif holds 3 frames; a folder has one in each image"):
        read_clip(tmp_path)


def test_frames_of_two_sizes_are_refused(tmp_path: Path) -> None:
    for i, size in enumerate(((8, 9), (9, 8))):
        Image.fromarray(_pixels(*size)).save(tmp_path / f"{i}.png")
    with _refused(ValueError, "the frames of a clip have one size: "):
        read_clip(tmp_path)


# Videos


@_leaves_a_pipe
def test_a_video_is_read(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    from pab_kernels.analysis.video import write_mp4

    film = np.repeat(np.array([0, 128, 255], np.uint8)[:, None], 16 * 16 * 3, axis=1).reshape(3, 16, 16, 3)
    clip = read_clip(write_mp4(tmp_path / "a.mp4", film, repeats=2))
    assert clip.frames.shape == (6, 3, 16, 16) and clip.frames.dtype == np.uint8
    assert np.abs(clip.frames[:, 0, 0, 0].astype(int) - [0, 128, 255] * 2).max() <= 4


# What cannot be read


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with _refused(FileNotFoundError, "there is no file or folder"):
        read_clip(tmp_path / "a.mp4")


def test_an_empty_folder_is_said(tmp_path: Path) -> None:
    with _refused(ValueError, "holds no images; supported are .png .jpg"):
        read_clip(tmp_path)


@pytest.mark.parametrize("name", ["clip.txt", "clip"])
def test_an_unsupported_ending_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("")
    with _refused(
        ValueError, f"ends in {Path(name).suffix or 'nothing'}; supported are folders of images and .mp4 .m4v"
    ):
        read_clip(tmp_path / name)


@pytest.mark.parametrize("ending", [pytest.param("mp4", marks=_leaves_a_pipe), "png", "pt", "npy", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"this is no such file"])
def test_a_damaged_file_is_one_line_that_names_it(ending: str, content: bytes, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    pytest.importorskip("safetensors")
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    with _refused(ValueError, f"{path} cannot be read as {ending}: "):
        read_clip(path)


def test_a_file_of_several_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "a.pt")
    with _refused(ValueError, "it holds 2 entries (a, b); save the clip alone"):
        read_clip(tmp_path / "a.pt")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "a.pt")
    with _refused(ValueError, "it holds a list; save the clip as one tensor"):
        read_clip(tmp_path / "a.pt")
