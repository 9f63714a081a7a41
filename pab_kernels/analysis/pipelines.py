"""Loading a pipeline by hub id, from a folder, or the demo model: the one place for every command that samples."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..extras import require
from ..files import path_of, read_text
from ..messages import first_line, shortened, shown

DEMO = "demo"
"""The name of the demo model, which comes with the package."""
OFFLOADS = ("none", "model", "sequential")
_DEMO_PARTS = "pab_kernels.models.demo.components"


def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    offload: str = "none",
    local_files_only: bool = False,
) -> Any:
    """A diffusers pipeline, ready to be called.

    Args:
        model: a folder that `save_pretrained` wrote, the id of a repository on the hub ("owner/name"), or "demo".
        dtype: of the weights; default bfloat16 on CUDA and float32 elsewhere; float32 for the demo model.
        device: default CUDA where there is one, else the CPU.
        offload: "model" or "sequential": weights stay on the host but for the model, or the module, that runs; needs
            accelerate and CUDA.
        local_files_only: fetch nothing: an id is looked up among what was fetched before. A folder is always read as it
            is.

    Returns:
        The pipeline, on `device`.

    Raises:
        FileNotFoundError: there is no such folder, or it is no pipeline's.
        ValueError: the pipeline has no `transformer`, the hub no such repository, the device is not here, or `offload`
        is not supported. ModuleNotFoundError: diffusers is not installed; the message says how to install it.
    """
    target = usable_device(device)
    _check_offload(offload, target)
    if str(model) == DEMO:
        from ..models.demo import pipeline

        pipe = pipeline.load(device=target if offload == "none" else "cpu", dtype=dtype or torch.float32).pipe
        return _placed(pipe, target, offload)
    diffusers = require("diffusers", "loading a pipeline")
    source = _source(model)
    kind = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    local = local_files_only or os.path.isdir(source)
    try:
        with _quiet(diffusers.utils.logging):
            pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=kind, local_files_only=local)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError, RecursionError) as error:
        raise ValueError(
            f"{shortened(str(model))} could not be loaded as a diffusers pipeline: {first_line(error)}"
        ) from error
    if not isinstance(getattr(pipe, "transformer", None), nn.Module):
        parts = ", ".join(sorted(pipe.components))
        raise ValueError(
            f"{model} is a {type(pipe).__name__} without a `transformer`; it has {parts}. PAB is for diffusion "
            "transformers"
        )
    return _placed(pipe, target, offload)


def _check_offload(offload: str, target: torch.device) -> None:
    if offload not in OFFLOADS:
        raise ValueError(f"offload {offload!r} is not supported; there are {', '.join(OFFLOADS)}")
    if offload != "none":
        require("accelerate", "offloading")
        if target.type == "cpu":
            raise ValueError(
                f"offload {offload!r} keeps weights on the host for a CUDA device; there is none in use: leave it out"
            )


def _placed(pipe: Any, target: torch.device, offload: str) -> Any:
    if offload == "none":
        return pipe.to(target)
    (pipe.enable_model_cpu_offload if offload == "model" else pipe.enable_sequential_cpu_offload)(device=target)
    return pipe


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The device to run on; default CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {shown(str(device))} cannot be used here: {first_line(error)}") from None
    return target


def _source(model: str | Path) -> str:
    """What `from_pretrained` takes: a folder with a pipeline in it, or an id."""
    try:
        folder = path_of(model).expanduser()
    except RuntimeError:  # ~somebody, who is not here
        folder = Path(model)
    if os.path.isdir(folder):
        if not os.path.isfile(folder / "model_index.json"):
            raise FileNotFoundError(
                f"{model} is no diffusers pipeline: no model_index.json; give what save_pretrained wrote"
            )
        if _DEMO_PARTS in read_text(folder / "model_index.json"):
            importlib.import_module(
                _DEMO_PARTS
            )  # diffusers takes classes of other packages only where these are imported
        return str(folder)
    text = str(model)
    looks_like_a_path = (
        isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1 or os.path.exists(folder)
    )
    if looks_like_a_path:
        name = shortened(str(model))
        raise FileNotFoundError(
            f"there is no folder {name}; give the folder of a diffusers pipeline, an id such as owner/name, or 'demo'"
        )
    return text


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without diffusers' bars where nobody watches them."""
    enabled = logging.is_progress_bar_enabled()
    if sys.stderr.isatty() or not enabled:
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
