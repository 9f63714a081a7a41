"""Loading and saving the weights of `STDiT3`: a hub id, a folder or a file; names and shapes are checked."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...extras import require
from ...files import path_of, replacing, write_text
from ...messages import first_line, shortened
from ...strict_json import from_json, to_json
from ..weights_file import read_config, read_weights

PUBLISHED = "hpcai-tech/OpenSora-STDiT-v3"
"""The checkpoint of Open-Sora 1.2 on the hub."""
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin")
"""Names of files with weights in a folder, in the order in which they are looked for."""

Shapes = Mapping[str, Sequence[int]]
"""The shape of every tensor, by name."""


def manifest() -> dict[str, list[int]]:
    """Names and shapes of the 973 tensors in the checkpoint of Open-Sora 1.2.

    >>> manifest()["temporal_blocks.27.attn.qkv.weight"]
    [3456, 1152]
    """
    file = importlib.resources.files(__package__).joinpath("stdit3_tensors.json")
    data = from_json(file.read_text())
    blocks = (f"{group}.{i}" for group in data["groups"] for i in range(data["depth"]))
    return data["others"] | {f"{block}.{name}": shape for block in blocks for name, shape in data["block"].items()}


def find(name_or_path: str | Path, subfolder: str | None = None, **hub: Any) -> tuple[dict[str, Any], Path]:
    """The config of a checkpoint and the file with its weights; downloads a hub id.

    Args:
        name_or_path: a file, a folder, or the id of a repository on the hub.
        subfolder: of the folder or repository.
        hub: arguments of `huggingface_hub.snapshot_download`.

    Returns:
        `config.json` as a dict, empty if there is none: the sizes of Open-Sora 1.2; and the path of the weights.

    Raises:
        FileNotFoundError: there is no such file or folder, or no weights in it.
        ValueError: the hub has no such repository, or config.json is not that of an STDiT3.
    """
    path = Path(os.path.expanduser(path_of(name_or_path)))
    if path.is_file():
        weights = path
    else:
        folder = path if path.is_dir() else _downloaded(str(name_or_path), subfolder, hub)
        weights = _weights_in(folder / (subfolder or ""), name_or_path)
    config = weights.with_name(CONFIG)
    return (_read_config(config) if config.is_file() else {}), weights


def _weights_in(folder: Path, name: str | Path) -> Path:
    found = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{name} has no weights in {folder}: none of {', '.join(WEIGHTS)}; give the file itself"
        )
    return found


def _downloaded(name: str, subfolder: str | None, hub: Mapping[str, Any]) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"there is no file or folder {shortened(name)}; give one, or the id of a repository such as {PUBLISHED}"
        )
    download = require("huggingface_hub", "loading a hub id").snapshot_download
    before = f"{subfolder}/" if subfolder else ""
    try:
        for files in (WEIGHTS[:2], WEIGHTS[2:]):  # pickled weights only where there are no others
            folder = Path(download(name, allow_patterns=[before + file for file in (CONFIG, *files)], **hub))
            if any((folder / before / file).is_file() for file in files):
                break
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} could not be loaded from the hub: {first_line(error)}") from error
    return folder


def _read_config(path: Path) -> dict[str, Any]:
    config = read_config(path)
    kind = config.get("model_type", config.get("_class_name", "STDiT3"))
    if kind != "STDiT3":
        raise ValueError(f"{path} is the config of a {kind}; only STDiT3 is supported")
    return config


def read(path: Path, device: torch.device | str | None, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of a file of weights.

    Args:
        path: of a safetensors file, or of one that torch has saved, of which only tensors are read (`weights_only`).
        device: of the tensors; default the CPU.
        dtype: of the tensors; default the file's.

    Raises:
        ValueError: the file holds something else.
    """
    found = read_weights(path, device or "cpu")
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise ValueError(f"{path} holds something else than tensors by name; give the state_dict of the model")
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def check(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare the names and shapes in a file with those of a model.

    Raises:
        ValueError: they differ; the message names a few, and says whether the file has those of Open-Sora 1.2.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} {list(found[name].shape)} for {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    wrong = [f"{len(names)} {kind} ({_few(names)})" for kind, names in kinds.items() if names]
    if not wrong:
        return
    published = manifest()
    if {name: list(tensor.shape) for name, tensor in found.items()} == published:
        hint = f"the file has the {len(published)} tensors of {PUBLISHED}: correct or remove the {CONFIG} beside it"
    else:
        hint = f"give the {CONFIG} that belongs to it; {PUBLISHED} has {len(published)} tensors"
    raise ValueError(f"{path} does not fit this STDiT3: of its {len(found)} tensors, {', '.join(wrong)}; {hint}")


def _few(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def save(folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and `model.safetensors` into a folder, which is made if there is none."""
    to_file = require("safetensors.torch", "saving weights").save_file
    folder = path_of(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, to_json({"model_type": "STDiT3", **config}))
    with replacing(folder / WEIGHTS[0]) as made:
        to_file({name: tensor.contiguous() for name, tensor in tensors.items()}, made, metadata={"format": "pt"})
