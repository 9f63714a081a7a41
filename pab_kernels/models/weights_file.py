"""Files of checkpoints: configs and tensors, from anybody, so that nothing in them is run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..extras import require
from ..files import read_text
from ..messages import first_line, shown
from ..strict_json import from_json

SAFETENSORS, PICKLED = (".safetensors",), (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files of weights."""


def read_config(path: Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        ValueError: it is no JSON, or holds something else than a config.
    """
    try:
        config = from_json(read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is no config: {first_line(error)}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config, but holds {shown(config)}")
    return config


def read_weights(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a file of weights holds, by name; of pickled files only tensors and what holds them are read.

    Args:
        path: of a safetensors file, or of one that torch has saved.
        device: of the tensors.

    Raises:
        ValueError: the file is damaged, has other objects, or is of another kind.
    """
    if path.suffix in SAFETENSORS:
        return _safetensors(path, device)
    if path.suffix not in PICKLED:
        raise ValueError(f"{path} has an unknown ending; supported are {', '.join(SAFETENSORS + PICKLED)}")
    try:
        found = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other objects than tensors, or is damaged, and is not read ({first_line(error)}); save the "
            "tensors of a checkpoint that you trust by torch.save or as safetensors"
        ) from None
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} holds no weights that can be read: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} in place of tensors by name")
    return found


def _safetensors(path: Path, device: torch.device | str) -> dict[str, torch.Tensor]:
    safetensors = require("safetensors", "reading safetensors")
    try:
        with safetensors.safe_open(str(path), framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a safetensors file: {first_line(error)}") from error
