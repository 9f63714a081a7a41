from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

pytest.importorskip("imageio")
pytest.importorskip("imageio_ffmpeg")
pytest.importorskip("PIL")

from pab_kernels.analysis.video import columns, pixels, side_by_side, write_gif, write_mp4, write_png


def clips(count: int = 2, frames: int = 3, height: int = 8, width: int = 40) -> torch.Tensor:
    return torch.rand(count, frames, 3, height, width, generator=torch.Generator().manual_seed(count))


def test_every_clip_is_in_the_film_enlarged_and_unchanged():
    first, second = clips(), 1 - clips()
    film = side_by_side([("one", "", first), ("two", "below", second)], ["a", "b"], scale=2)
    assert film.dtype == np.uint8 and film.shape[0] == 3 and film.shape[1] % 16 == 0 and film.shape[2] % 16 == 0
    for column in (first, second):
        for clip in column:
            wanted = (
                (clip * 255).round().byte().permute(0, 2, 3, 1).numpy().repeat(2, 1).repeat(2, 2)
            )  # [frames, 16, 80, 3]
            windows = np.lib.stride_tricks.sliding_window_view(film[0], (16, 80, 3))[:, :, 0]
            found = np.argwhere((windows == wanted[0]).all(axis=(2, 3, 4)))
            assert len(found) == 1
            y, x = found[0]
            assert np.array_equal(film[:, y : y + 16, x : x + 80], wanted)


def test_titles_and_captions_are_drawn():
    bare = side_by_side([("", "", clips())], ["", ""])
    labelled = side_by_side([("title", "below", clips())], ["caption", "another"])
    assert not np.array_equal(bare[:, : labelled.shape[1]], labelled[:, : bare.shape[1]])


def test_a_long_title_wraps_and_moves_the_clips_down():
    short = side_by_side([("a", "", clips())], ["", ""], scale=4)
    long = side_by_side([("a title of very many words that one line cannot hold", "", clips())], ["", ""], scale=4)
    assert long.shape[1] > short.shape[1] and long.shape[2] == short.shape[2]


@pytest.mark.parametrize(
    ("columns", "captions", "message"),
    [
        ([], [], "got none"),
        (
            [("a", "", clips()), ("b", "", clips(frames=4))],
            ["x", "y"],
            r"must all be \[clips, frames, 3, height, width\]",
        ),
        ([("a", "", clips()[0])], ["x", "y"], "must all be"),
        ([("a", "", clips())], ["x"], "2 clips need 2 captions"),
    ],
)
def test_what_does_not_fit_together_is_refused(columns, captions, message):
    with pytest.raises(ValueError, match=message):
        side_by_side(columns, captions)


def test_a_gif_holds_every_frame_and_repeats(tmp_path):
    import PIL.Image

    film = side_by_side([("one", "", clips())], ["a", "b"])
    with PIL.Image.open(write_gif(tmp_path / "film.gif", film)) as image:
        assert image.n_frames == 3 and image.size == film.shape[2:0:-1] and image.info["loop"] == 0
        assert image.info["duration"] == 1000 // 6 // 10 * 10


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # imageio's reader leaves a pipe to the collector
def test_an_mp4_repeats_the_clip_at_full_size(tmp_path):
    import imageio.v2 as imageio

    film = np.full((3, 48, 64, 3), 128, np.uint8)
    film[1] = 250
    reader = imageio.get_reader(str(write_mp4(tmp_path / "film.mp4", film, repeats=2)))
    frames = [np.asarray(frame) for frame in reader]
    reader.close()
    assert len(frames) == 6 and frames[0].shape == film.shape[1:]
    assert [round(float(frame.mean()) / 10) for frame in frames] == [13, 25, 13, 13, 25, 13]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("size", "shown"), [((48, 854), (48, 854)), ((47, 65), (48, 66))])
def test_an_mp4_keeps_the_size_of_its_frames_but_for_odd_ones(size, shown, tmp_path):
    import imageio.v2 as imageio

    film = np.full((2, *size, 3), 60, np.uint8)
    film[:, -1] = film[:, :, -1] = 200
    reader = imageio.get_reader(str(write_mp4(tmp_path / "film.mp4", film, repeats=1)))
    frames = [np.asarray(frame) for frame in reader]
    reader.close()
    assert len(frames) == 2 and frames[0].shape == (*shown, 3)
    assert frames[0][-1].mean() > 150 and frames[0][:, -1].mean() > 150 and frames[0][:-4, :-4].mean() < 80


def test_a_png_holds_the_pixels(tmp_path):
    import PIL.Image

    clip = torch.tensor([-1.0, 0, 0.2, 0.5, 1, 3]).reshape(1, 1, 2, 3).expand(1, 3, 2, 3)
    image = pixels(clip)[0]
    assert image[:, :, 0].tolist() == [[0, 0, 51], [128, 255, 255]]
    with PIL.Image.open(write_png(tmp_path / "image.png", image)) as read:
        assert np.array_equal(np.asarray(read), image)


def test_what_stands_below_a_title():
    runs = [("a", 2.04, None, clips()), ("b", 1.02, 33.33, clips()), ("c", 4.08, float("inf"), clips())]
    assert [line for _, line, _ in columns(runs)] == ["2.0 s", "2.00x, 33.3 dB", "0.50x, identical"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "ffmpeg failed: it gave no reason"),
        (
            "cat > /dev/null; echo '[out#0 @ 0x5] Error closing file: No space left on device' >&2; echo bye >&2; exit "
            "228",
            None,
        ),
        (
            "cat > /dev/null; echo 'first' >&2; echo '[mp4 @ 0x55] [a @ 0x1] no such codec' >&2; exit 1",
            "ffmpeg failed: no such codec",
        ),
    ],
)
def test_a_film_that_ffmpeg_cannot_write_is_no_file(script: str, said: str | None, tmp_path, monkeypatch):
    """Also where it ends before it has read the film."""
    import imageio_ffmpeg

    fake = tmp_path / "ffmpeg"
    fake.write_text(f'#!/bin/sh\nfor last in "$@"; do :; done\necho half > "$last"\n{script}\n')
    fake.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(fake))
    (tmp_path / "film.mp4").write_text("old")
    with pytest.raises(OSError) as info:
        write_mp4(tmp_path / "film.mp4", np.zeros((9, 300, 400, 3), np.uint8))
    assert (info.value.errno, info.value.filename) == (None if said else errno.ENOSPC, str(tmp_path / "film.mp4"))
    assert info.value.strerror == (said or "No space left on device")
    assert (tmp_path / "film.mp4").read_text() == "old" and {p.name for p in tmp_path.iterdir()} == {
        "film.mp4",
        "ffmpeg",
    }


@pytest.mark.parametrize("write", [write_gif, lambda path, film: write_png(path, film[0])], ids=["gif", "png"])
def test_a_picture_that_cannot_be_written_leaves_the_old_one(write, tmp_path, monkeypatch):
    (tmp_path / "film.png").write_text("old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path / "film.png", np.zeros((2, 8, 8, 3), np.uint8))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("film.png", "old")]
