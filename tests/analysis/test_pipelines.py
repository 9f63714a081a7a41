"""Loading pipelines: folders, the demo model, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTPipeline, UNet2DModel

from pab_kernels.analysis import pipelines
from pab_kernels.analysis.pipelines import load_pipeline
from tests.analysis.tiny_dit import tiny_dit

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit")
    tiny_dit().save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_loaded_in_the_dtype_that_is_asked_for(folder: Path, kind: Any) -> None:
    pipe = load_pipeline(kind(folder), dtype=torch.float16, device="cpu")
    assert isinstance(pipe, DiTPipeline) and pipe.transformer.dtype == torch.float16
    assert load_pipeline(folder, device="cpu").transformer.dtype == torch.float32


def test_the_demo_model_comes_with_the_package() -> None:
    pipe = load_pipeline("demo", device="cpu")
    assert type(pipe.transformer).__name__ == "LatteTransformer3DModel"


def test_a_saved_open_sora_pipeline_is_loaded(tmp_path: Path) -> None:
    from tests.models.tiny_open_sora import OpenSoraPipeline, tiny_pipe

    tiny_pipe().save_pretrained(tmp_path)
    assert type(load_pipeline(tmp_path, device="cpu")) is OpenSoraPipeline


def test_what_is_no_pipeline_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    broken = tmp_path / "broken"
    broken.mkdir()
    index = json.loads((folder / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps(index))
    unet = DDIMPipeline(
        UNet2DModel(
            block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
        ),
        DDIMScheduler(),
    )
    unet.save_pretrained(tmp_path / "unet")
    for model, error, message in (
        (tmp_path / "nothing", FileNotFoundError, "there is no folder"),
        (
            "not-a-folder",
            FileNotFoundError,
            "there is no folder not-a-folder; give the folder of a diffusers pipeline, an id",
        ),
        (tmp_path / "file", FileNotFoundError, "there is no folder"),
        (tmp_path / "empty", FileNotFoundError, "no model_index.json"),
        (broken, ValueError, "could not be loaded as a diffusers pipeline"),
        ("owner/never-fetched", ValueError, "owner/never-fetched could not be loaded"),
        (tmp_path / "unet", ValueError, "is a DDIMPipeline without a `transformer`; it has scheduler, unet"),
    ):
        with pytest.raises(error, match=message) as info:
            load_pipeline(model, device="cpu", local_files_only=True)
        assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("offload", "expected"),
    [("none", "to"), ("model", "enable_model_cpu_offload"), ("sequential", "enable_sequential_cpu_offload")],
)
def test_offloading_is_diffusers_own(offload: str, expected: str) -> None:
    pipe, device = mock.Mock(), torch.device("cuda")
    placed = pipelines._placed(pipe, device, offload)
    ((name, args, kwargs),) = pipe.method_calls
    assert (
        name == expected
        and (*args, *kwargs.values()) == (device,)
        and placed is (pipe.to.return_value if offload == "none" else pipe)
    )
