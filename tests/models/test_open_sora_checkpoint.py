"""Loading and saving STDiT3: its manifest, files, folders, the hub's cache, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("huggingface_hub")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from safetensors.torch import save_file

from pab_kernels.models.open_sora.checkpoint import check, manifest
from pab_kernels.models.stdit3 import STDiT3
from tests.models.tiny_open_sora import one_layer


@pytest.fixture
def model() -> STDiT3:
    return one_layer()


def equal(a: STDiT3, b: STDiT3) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_manifest_is_that_of_the_model_at_full_size() -> None:
    with torch.device("meta"):
        full = STDiT3()
    assert {name: list(tensor.shape) for name, tensor in full.state_dict().items()} == manifest()
    assert len(manifest()) == 973 and sum(p.numel() for p in full.parameters()) == 1_207_643_972


def test_a_folder_is_saved_and_loaded(model: STDiT3, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "a" / "transformer")
    assert json.loads((tmp_path / "a" / "transformer" / "config.json").read_text())["hidden_size"] == 64
    loaded = STDiT3.from_pretrained(tmp_path / "a", subfolder="transformer")
    assert equal(loaded, model) and not loaded.training and loaded.dtype == torch.float32
    assert STDiT3.from_pretrained(str(tmp_path / "a" / "transformer" / "model.safetensors")).device.type == "cpu"
    half = STDiT3.from_pretrained(tmp_path / "a", subfolder="transformer", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and equal(half, model.bfloat16())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ema.pt"])
def test_files_of_torch_are_loaded(model: STDiT3, tmp_path: Path, name: str) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / name)
    assert equal(STDiT3.from_pretrained(tmp_path if name.endswith("bin") else tmp_path / name), model)


def test_a_repository_in_the_cache_of_the_hub_is_loaded(model: STDiT3, tmp_path: Path) -> None:
    repository, commit = tmp_path / "models--someone--stdit", 40 * "a"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    assert equal(STDiT3.from_pretrained("someone/stdit", **hub), model)
    with pytest.raises(ValueError, match="someone/else could not be loaded from the hub: "):
        STDiT3.from_pretrained("someone/else", **hub)


def test_names_that_do_not_fit_are_refused_and_a_few_are_named(model: STDiT3, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tensors = model.state_dict()
    tensors["extra.weight"] = tensors.pop("spatial_blocks.0.attn.proj.bias")
    tensors["rope.freqs"] = torch.ones(5)
    save_file(tensors, tmp_path / "model.safetensors")
    message = (
        r"of its 55 tensors, 1 missing \(spatial_blocks.0.attn.proj.bias\), 1 unexpected \(extra.weight\), "
        r"1 of another shape \(rope.freqs \[5\] for \[16\]\); give the config.json that belongs to it; hpcai-tech/Open"
    )
    with pytest.raises(ValueError, match=message):
        STDiT3.from_pretrained(tmp_path)


def test_a_wrong_config_beside_the_published_weights_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        full, small = STDiT3(), STDiT3(depth=1)
    with pytest.raises(ValueError, match=r"918 unexpected .* has the 973 tensors of .*: correct or remove the config"):
        check(tmp_path / "model.safetensors", full.state_dict(), small.state_dict())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"skip_y_embedder": True}, "skip_y_embedder is on; only models that embed their text"),
        ({"model_type": "STDiT2"}, "is the config of a STDiT2; only STDiT3 is supported"),
        ([], "is no config, but holds"),
    ],
)
def test_configs_that_are_not_supported_are_refused(model: STDiT3, tmp_path: Path, config: Any, message: str) -> None:
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        STDiT3.from_pretrained(tmp_path)


class Custom:
    """What `weights_only` does not load."""


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder ./absent; give one, or the id"):
        STDiT3.from_pretrained("./absent")
    with pytest.raises(FileNotFoundError, match="has no weights in .*: none of model.safetensors, "):
        STDiT3.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        STDiT3.from_pretrained(tmp_path)
    torch.save({"a": Custom()}, tmp_path / "custom.pt")
    with pytest.raises(ValueError, match="holds other objects than tensors, or is damaged"):
        STDiT3.from_pretrained(tmp_path / "custom.pt")
    torch.save({"state_dict": {}}, tmp_path / "nested.pt")
    with pytest.raises(ValueError, match="something else than tensors by name; give the state_dict"):
        STDiT3.from_pretrained(tmp_path / "nested.pt")
    (tmp_path / "weights.npz").write_text("")
    with pytest.raises(ValueError, match="has an unknown ending; supported are .safetensors, .bin"):
        STDiT3.from_pretrained(tmp_path / "weights.npz")
