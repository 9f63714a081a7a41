"""Two clips compared: the measures, LPIPS present and absent, the table, the picture, what is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("skimage")

from pab_kernels.analysis import compare


def _clips(frames: int = 4, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    b = rng.random((frames, channels, 16, 17))
    return (b + rng.normal(0, 0.05, b.shape)).clip(0, 1), b


def _refused(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=f"^[^\\n]*{re.escape(message)}[^\\n]*$")


def test_consistency_is_the_change_from_frame_to_frame() -> None:
    steady = np.full((3, 1, 8, 8), 0.5)
    flickers = steady + np.array([0, 0.2, 0.1]).reshape(3, 1, 1, 1)
    found = compare(flickers, steady, lpips=False)
    assert [f.consistency_b for f in found.frames] == [None, 1, 1] and found.total.consistency_b == 1
    assert found.frames[0].consistency_a is None
    assert [f.consistency_a for f in found.frames[1:]] == pytest.approx(
        [0.8, 0.9]
    ) and found.total.consistency_a == pytest.approx(0.85)


def test_a_single_frame_has_no_consistency() -> None:
    a, b = _clips(frames=1)
    found = compare(a, b, lpips=False)
    assert found.total.consistency_a is found.total.consistency_b is None and "consistency" not in str(found)


def test_equal_clips_say_so() -> None:
    a, _ = _clips()
    found = compare(a, a.copy(), lpips=False)
    assert found.total.psnr == math.inf and found.total.ssim == pytest.approx(1)
    assert found.to_dict()["equal"] is True and found.to_dict()["total"]["psnr"] is None
    assert str(found).splitlines()[-1].split()[:2] == ["total", "same"]


def test_a_grey_clip_is_compared_with_a_coloured_one_and_said() -> None:
    grey = _clips(channels=1)[0]
    found = compare(grey, np.repeat(grey, 3, axis=1), lpips=False)
    assert found.total.psnr == math.inf and found.notes == ("A is grey and is compared as three equal channels",)


def test_bytes_are_compared_with_floats() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), dtype=np.uint8)
    assert compare(pixels, torch.from_numpy(pixels).double() / 255, lpips=False).total.psnr == math.inf
    assert compare(pixels, torch.from_numpy(pixels).double() / 127.5 - 1, values=(-1, 1), lpips=False).total.psnr > 200


def test_progress_is_told_after_every_frame() -> None:
    seen: list[tuple[int, int]] = []
    compare(*_clips(), lpips=False, progress=lambda done, todo: seen.append((done, todo)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (
            np.zeros((3, 3, 8, 8)),
            np.zeros((2, 3, 8, 8)),
            "A has 3 frame(s) and B has 2; the numbers must agree: cut the longer one",
        ),
        (
            np.zeros((2, 3, 8, 9)),
            np.zeros((2, 3, 9, 8)),
            "A has frames of 8 x 9 and B of 9 x 8 (height x width); they must agree",
        ),
        (np.zeros((2, 3, 6, 8)), np.zeros((2, 3, 6, 8)), "SSIM needs at least 7 x 7 pixels"),
        (np.zeros((8, 9)), np.zeros((2, 3, 9, 8)), "A has the shape [8, 9]"),
        (np.zeros((2, 3, 8, 8)), np.full((2, 3, 8, 8), 2.0), "B has values from 2 to 2"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(a: np.ndarray, b: np.ndarray, message: str) -> None:
    with _refused(ValueError, message):
        compare(a, b, lpips=False)


@pytest.mark.parametrize("values", [(1, 0), (0, 0), (0, 1, 2)])
def test_black_and_white_are_two_numbers_in_order(values: Any) -> None:
    with _refused(ValueError, "values must be two numbers, black below white, got"):
        compare(*_clips(), values=values)


# LPIPS


class _Distance:
    """Stands in for the packages' networks: the mean absolute difference, of frames that it checks."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def eval(self) -> _Distance:
        return self

    def __call__(self, a: torch.Tensor, b: torch.Tensor, normalize: bool = True) -> torch.Tensor:
        assert a.shape == b.shape and a.shape[:2] == (1, 3) and a.dtype == torch.float32 and normalize
        assert not torch.is_grad_enabled()
        return (a - b).abs().mean().reshape(1, 1, 1, 1)


def _install(monkeypatch: pytest.MonkeyPatch, package: str, network: Any) -> None:
    for name in ("lpips", "torchmetrics", "torchmetrics.image", "torchmetrics.image.lpip"):
        monkeypatch.setitem(sys.modules, name, None)
    if package == "lpips":
        module = ModuleType("lpips")
        module.LPIPS = network
        monkeypatch.setitem(sys.modules, "lpips", module)
    elif package == "torchmetrics":
        for name in ("torchmetrics", "torchmetrics.image", "torchmetrics.image.lpip"):
            module = ModuleType(name)
            module.LearnedPerceptualImagePatchSimilarity = network
            monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("package", ["lpips", "torchmetrics"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_is_measured_where_a_package_is_installed(
    package: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, package, _Distance)
    a, b = _clips(channels=channels)
    found = compare(a, b)
    assert found.total.lpips == pytest.approx(np.abs(a - b).mean(), rel=1e-5) and found.notes == ()
    assert [f.lpips for f in found.frames] == pytest.approx(np.abs(a - b).mean(axis=(1, 2, 3)), rel=1e-5)
    assert "LPIPS" in str(found) and compare(a, b, lpips=False).total.lpips is None


def test_without_a_package_a_note_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "", None)
    found = compare(*_clips())
    (note,) = found.notes
    assert found.total.lpips is None and note.startswith(
        "LPIPS was not measured: neither the package lpips nor torchmetrics"
    )
    assert "pip install lpips" in note and "\n" not in note and f"note: {note}" in str(found)
    with _refused(ModuleNotFoundError, "LPIPS cannot be measured: neither the package lpips nor torchmetrics"):
        compare(*_clips(), lpips=True)


def test_weights_that_cannot_be_fetched_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**options: Any) -> None:
        raise OSError("no route to host\nand more")

    _install(monkeypatch, "lpips", offline)
    assert compare(*_clips()).notes == ("LPIPS was not measured: lpips cannot load its network: no route to host",)
    with _refused(ValueError, "LPIPS cannot be measured: lpips cannot load its network: no route to host"):
        compare(*_clips(), lpips=True)


# What is shown


def test_the_table_has_a_line_for_each_frame_and_the_total() -> None:
    lines = str(compare(*_clips(), lpips=False)).splitlines()
    assert lines[:4] == ["A  A", "B  B", "4 frame(s) of 16 x 17", ""]
    assert [line.split()[0] for line in lines[4:]] == ["frame", "0", "1", "2", "3", "total"]
    assert len({len(line) for line in lines[4:]}) == 1


def test_the_dict_is_json_and_complete() -> None:
    found = compare(*_clips(), lpips=False)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["total"]["psnr"] == found.total.psnr and [f["frame"] for f in data["frames"]] == [0, 1, 2, 3]
    assert data["frames"][0]["consistency_a"] is None and (data["height"], data["width"]) == (16, 17)


@pytest.mark.parametrize("equal", [False, True])
def test_the_picture_has_a_panel_for_each_measure(equal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    _install(monkeypatch, "lpips", _Distance)
    a, b = _clips()
    if equal:
        b[1] = a[1]
    figure = compare(a, b).plot(tmp_path / "curve.png")
    assert [ax.get_ylabel() for ax in figure.axes] == ["PSNR, dB", "SSIM", "consistency", "LPIPS"]
    assert ("equal" in figure.axes[0].get_title(loc="left")) is equal
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
