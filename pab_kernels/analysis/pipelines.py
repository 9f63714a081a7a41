"""Loading a pipeline by hub id or from a folder, or the demo model."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..extras import require
from ..files import path_of, read_text
from ..messages import first_line, shortened, shown
from ..models.published_pipelines import PUBLISHED, is_published
from ..models.published_pipelines import load as load_published

DEMO = "demo"
"""The name of the demo model."""
OFFLOADS = ("none", "model", "sequential")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""Of weights, by their names on command lines."""
_PARTS = ("demo.components", "video.codec", "prompt_components")
"""Modules of `pab_kernels.models` with parts of a saved pipeline: diffusers accepts their classes only if imported."""

_CLASSES = {
    "OpenSoraPipeline": "open_sora.pipeline",
    "OpenSoraPlan11Pipeline": "open_sora_plan.pipelines",
    "OpenSoraPlan12Pipeline": "open_sora_plan.pipelines",
}
"""Pipelines of this package that are saved to folders, and their modules in `pab_kernels.models`."""


def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    offload: str = "none",
    local_files_only: bool = False,
    weights: str | Path | None = None,
) -> Any:
    """Load a diffusers pipeline; from a folder also a saved one of Open-Sora or Open-Sora-Plan.

    Args:
        model: a folder written by `save_pretrained`, the id of a repository on the hub ("owner/name"), "demo", or a
            name in `published_pipelines.PUBLISHED`, perhaps with its variant.
        dtype: of the weights; default bfloat16 on CUDA and float32 elsewhere; float32 for the demo model.
        device: default CUDA if available, else the CPU.
        offload: "model" or "sequential" keep weights on the host except those of the model, or of the module, that
            runs; needs accelerate and CUDA.
        local_files_only: do not fetch anything; an id must be cached.
        weights: folder with the parts of a published model; see `published_pipelines.load`.

    Returns:
        The pipeline on `device`.

    Raises:
        FileNotFoundError: there is no such folder, or no pipeline in it.
        ValueError: the pipeline has no `transformer`, the hub has no such repository, the device is not available, or
            `offload` is not supported.
        ModuleNotFoundError: diffusers is not installed.

    >>> load_pipeline("demo", device="cpu").transformer.config.num_layers
    4
    """
    if weights is not None and not is_published(str(model)):
        known = ", ".join(PUBLISHED)
        raise ValueError(f"weights are for published models by name ({known}), got model {shown(str(model))}")
    target = usable_device(device)
    _check_offload(offload, target)
    if str(model) == DEMO:
        from ..models.demo import pipeline

        pipe = pipeline.load(device=target if offload == "none" else "cpu", dtype=dtype or torch.float32).pipe
        return _placed(pipe, target, offload)
    diffusers = require("diffusers", "loading a pipeline")
    kind = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    if is_published(str(model)) and not os.path.isdir(str(model)):
        pipe = load_published(str(model), weights, dtype=kind, local_files_only=local_files_only)
        return _placed(pipe, target, offload)
    source = _source(model)
    local = local_files_only or os.path.isdir(source)
    try:
        pipe = _class(source, diffusers).from_pretrained(source, dtype=kind, local_files_only=local)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, RecursionError) as error:
        raise ValueError(
            f"{shortened(str(model))} could not be loaded as a diffusers pipeline: {first_line(error)}"
        ) from error
    if not isinstance(getattr(pipe, "transformer", None), nn.Module):
        parts = ", ".join(sorted(pipe.components))
        got = f"{model} is a {type(pipe).__name__} without a `transformer`; it has {parts}"
        raise ValueError(f"{got}. PAB is for diffusion transformers")
    return _placed(pipe, target, offload)


def _class(source: str, diffusers: Any) -> Any:
    """The class that loads a pipeline; diffusers finds only its own by the name in a folder."""
    index = Path(source) / "model_index.json"
    text = read_text(index) if index.is_file() else ""
    for name, module in _CLASSES.items():
        if f'"{name}"' in text:
            return getattr(importlib.import_module(f"pab_kernels.models.{module}"), name)
    return diffusers.DiffusionPipeline


def _check_offload(offload: str, target: torch.device) -> None:
    if offload not in OFFLOADS:
        raise ValueError(f"offload {offload!r} is not supported; supported are {', '.join(OFFLOADS)}")
    if offload != "none":
        require("accelerate", "offloading")
        if target.type == "cpu":
            raise ValueError(f"offload {offload!r} needs a CUDA device, and the device is {target}; leave it out")


def _placed(pipe: Any, target: torch.device, offload: str) -> Any:
    if offload == "none":
        return pipe.to(target)
    (pipe.enable_model_cpu_offload if offload == "model" else pipe.enable_sequential_cpu_offload)(device=target)
    return pipe


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The device to run on; default CUDA if available, else the CPU.

    Raises:
        ValueError: the device is not available.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {shown(str(device))} cannot be used here: {first_line(error)}") from None
    return target


def _source(model: str | Path) -> str:
    """The argument of `from_pretrained`: a folder with a pipeline in it, or an id."""
    folder = Path(os.path.expanduser(path_of(model)))
    if os.path.isdir(folder):
        index = folder / "model_index.json"
        if not os.path.isfile(index):
            raise FileNotFoundError(f"{model} is not a diffusers pipeline: it has no model_index.json")
        text = read_text(index)
        for module in (f"pab_kernels.models.{part}" for part in _PARTS):
            if module in text:
                importlib.import_module(module)
        return str(folder)
    if isinstance(model, Path) or model.startswith((".", "/", "~")) or model.count("/") != 1 or os.path.lexists(folder):
        name = shortened(str(model))
        raise FileNotFoundError(
            f"there is no folder {name}; give the folder of a diffusers pipeline, an id such as owner/name, or 'demo'"
        )
    return model
