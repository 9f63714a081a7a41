"""Loading and saving the autoencoders of Open-Sora and Open-Sora-Plan, as they were published and as diffusers does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from pab_kernels.models.open_sora.vae import OpenSoraVAE
from pab_kernels.models.open_sora_plan.causal_vae import CausalVAE
from tests.models.autoencoder_parts import randomized
from tests.models.open_sora_plan_configs import VERSIONS
from tests.models.open_sora_written_out import TINY

OPEN_SORA = {
    "architectures": ["VideoAutoencoderPipeline"],
    "cal_loss": False,
    "micro_frame_size": 17,
    "model_type": "VideoAutoencoderPipeline",
    "scale": [3.85, 2.32, 2.33, 3.06],
    "shift": [-0.1, 0.34, 0.27, 0.98],
    "vae_2d": {
        "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        "micro_batch_size": 2,
        "type": "VideoAutoencoderKL",
    },
    "vae_temporal": {"from_pretrained": None, "type": "VAE_Temporal_SD"},
}
OPEN_SORA_PLAN = {
    "_class_name": "CausalVAEModel",
    "_diffusers_version": "0.27.2",
    "loss_type": "opensora.models.ae.videobase.losses.LPIPSWithDiscriminator3D",
    "lr": 1e-05,
    "resolution": 256,
    "dropout": 0.0,
    "hidden_size": 32,
    "hidden_size_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    **VERSIONS["1.2"],
}


class TinyOpenSora(OpenSoraVAE):
    """A small one: the published config.json has no widths."""

    @classmethod
    def translated(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().translated(config), **TINY}


CLASSES = {
    "open-sora": (TinyOpenSora, OPEN_SORA, TINY),
    "open-sora-plan": (CausalVAE, OPEN_SORA_PLAN, CausalVAE.translated(OPEN_SORA_PLAN)),
}
"""Class, published config.json, arguments of a small model."""


def new(name: str) -> Any:
    cls, config, _ = CLASSES[name]
    return randomized(cls(**cls.translated(config))).float()


def published(folder: Path, name: str, tensors: Mapping[str, Tensor], to: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CLASSES[name][1]))
    if to.endswith(".safetensors"):
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / to)
    else:
        torch.save(tensors, folder / to)
    return folder


def same(one: Any, other: Any) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[n]) for n, tensor in one.state_dict().items())
    latents = torch.randn(1, 4, 2, 2, 2)
    with torch.no_grad():
        torch.testing.assert_close(one.decode(latents).sample, other.decode(latents).sample)


@pytest.mark.parametrize("to", ["model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_published_checkpoint_is_loaded_from_a_folder(name: str, to: str, tmp_path: Path) -> None:
    vae = new(name)
    published(tmp_path / "vae", name, vae.state_dict() | {"loss.logvar": torch.zeros(1)}, to)
    loaded = type(vae).from_pretrained(tmp_path, subfolder="vae")
    same(loaded, vae)
    assert not loaded.training and loaded.dtype is torch.float32
    half = type(vae).from_pretrained(tmp_path / "vae", torch_dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.bfloat16}


def test_the_published_config_is_translated() -> None:
    arguments = OpenSoraVAE.translated(OPEN_SORA)
    assert arguments == {
        "chunk_frames": 17,
        "frames_at_once": 2,
        "latents_std": [3.85, 2.32, 2.33, 3.06],
        "latents_mean": [-0.1, 0.34, 0.27, 0.98],
    }
    assert CausalVAE.translated(OPEN_SORA_PLAN).keys() == OPEN_SORA_PLAN.keys() - {
        "_class_name",
        "_diffusers_version",
        "loss_type",
        "lr",
        "resolution",
        "dropout",
    }


@pytest.mark.parametrize(
    "of_training",
    [
        lambda tensors: {"state_dict": tensors | {"loss.logvar": torch.zeros(())}, "epoch": 3},
        lambda tensors: {"state_dict": {"gen_model": tensors, "dics_model": {}}},
        lambda tensors: {
            "ema_state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()},
            "state_dict": {name: torch.zeros_like(tensor) for name, tensor in tensors.items()},
        },
    ],
)
def test_a_checkpoint_of_the_training_is_loaded_with_its_averaged_weights(
    of_training: Callable[[dict[str, Tensor]], dict[str, Any]], tmp_path: Path
) -> None:
    vae = new("open-sora-plan")
    published(tmp_path, "open-sora-plan", of_training(vae.state_dict()), "checkpoint.ckpt")
    same(CausalVAE.from_pretrained(tmp_path), vae)


@pytest.mark.parametrize("name", CLASSES)
def test_a_hub_id_is_loaded_from_the_cache(name: str, tmp_path: Path) -> None:
    vae, commit = new(name), "1" * 40
    repository = tmp_path / "models--somebody--autoencoder"
    published(repository / "snapshots" / commit / "vae", name, vae.state_dict(), "pytorch_model.bin")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    where = {"subfolder": "vae", "cache_dir": str(tmp_path), "local_files_only": True}
    same(type(vae).from_pretrained("somebody/autoencoder", **where), vae)
    (repository / "snapshots" / commit / "vae" / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="somebody/autoencoder/vae has no diffusion_.*, is no folder, and"):
        type(vae).from_pretrained("somebody/autoencoder", **where)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_saved_is_loaded_again_also_as_a_part_of_a_pipeline(name: str, tmp_path: Path) -> None:
    class Pipeline(DiffusionPipeline):
        def __init__(self, vae: Any) -> None:
            super().__init__()
            self.register_modules(vae=vae)

    cls: Any = OpenSoraVAE if name == "open-sora" else CausalVAE
    vae = randomized(cls(**CLASSES[name][2])).float()
    vae.save_pretrained(tmp_path / "alone")
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert config["_class_name"] == cls.__name__
    loaded = cls.from_pretrained(tmp_path / "alone")
    same(loaded, vae)
    assert dict(loaded.config).items() >= {k: v for k, v in config.items() if k[0] != "_"}.items()
    Pipeline(vae).save_pretrained(tmp_path / "pipeline")
    pipe = Pipeline.from_pretrained(tmp_path / "pipeline")
    same(pipe.vae, vae)
    assert pipe.vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize("name", CLASSES)
def test_encode_and_decode_call_the_hooks_of_offloading(name: str) -> None:
    class Counted(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    vae, hook = new(name), Counted()
    add_hook_to_module(vae, hook)
    with torch.no_grad():
        vae.decode(vae.encode(torch.zeros(1, 3, 1, 16, 16)).latent_dist.mode())
    assert hook.calls == 2


# What is refused


@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_of_another_model_is_refused(name: str, tmp_path: Path) -> None:
    vae = new(name)
    tensors = dict(vae.state_dict())
    removed, *_ = names = sorted(tensors)
    cases = {
        f"model.safetensors is of another model: it lacks '{removed}'": {n: tensors[n] for n in names[1:]},
        "it has unknown 'x0', 'x1', 'x2' and 2 more": tensors | {f"x{i}": torch.zeros(1) for i in range(5)},
        f"{removed} has the shape [7], its config needs": tensors | {removed: torch.zeros(7)},
    }
    for error, given in cases.items():
        published(tmp_path, name, given)
        with pytest.raises(ValueError, match=re.escape(error)):
            type(vae).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("cls", "config", "error"),
    [
        (OpenSoraVAE, {"model_type": "STDiT3"}, "model_type 'STDiT3'; Open-Sora's autoencoder is a VideoAutoencoderP"),
        (OpenSoraVAE, {**OPEN_SORA, "vae_temporal": {"type": "X"}}, "vae_temporal in config.json is a 'X'; only VAE_T"),
        (OpenSoraVAE, {**OPEN_SORA, "micro_frame_size": None}, "micro_frame_size in config.json is None; a number of"),
        (
            CausalVAE,
            {"_class_name": "WFVAEModel"},
            "names the class 'WFVAEModel'; Open-Sora-Plan's autoencoder is a Ca",
        ),
    ],
)
def test_the_config_of_another_model_is_refused(cls: Any, config: dict[str, Any], error: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(error)):
        cls.from_pretrained(tmp_path)


class Unknown:
    """An object that a pickled file may hold."""


def test_other_objects_than_tensors_are_not_read(tmp_path: Path) -> None:
    published(tmp_path, "open-sora-plan", {"state_dict": {}, "callback": Unknown()}, "checkpoint.ckpt")
    with pytest.raises(ValueError, match="checkpoint.ckpt holds other objects than tensors, or is damaged"):
        CausalVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "checkpoint.ckpt"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "CausalVAEModel"}))
    (tmp_path / name).write_bytes(b"[1, 2]")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        CausalVAE.from_pretrained(tmp_path)


def test_options_that_do_not_suit_and_folders_without_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OPEN_SORA_PLAN))
    with pytest.raises(FileNotFoundError, match="has no diffusion_pytorch_model.safetensors or model.safe"):
        CausalVAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map suits a folder of save_pretrained, not the published checkpoint"):
        CausalVAE.from_pretrained(tmp_path, device_map="auto")
    for nowhere in (str(tmp_path / "nowhere"), "somebody/something"):
        with pytest.raises(FileNotFoundError, match=f"{nowhere} has no config.json, is no folder, and"):
            CausalVAE.from_pretrained(nowhere)
