"""Loading a pipeline by hub id, from a folder, or the demo model: the one place for every command that samples."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..extras import require

DEMO = "demo"
"""The name of the demo model, which comes with the package."""


def load_pipeline(
    model: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    local_files_only: bool = False,
) -> Any:
    """A diffusers pipeline, ready to be called.

    Args:
        model: a folder that `save_pretrained` wrote, the id of a repository on the hub ("owner/name"), or "demo".
        dtype: of the weights; default bfloat16 on CUDA and float32 elsewhere; float32 for the demo model.
        device: default CUDA where there is one, else the CPU.
        local_files_only: fetch nothing: an id is looked up among what was fetched before. A folder is always read as it is.

    Returns:
        The pipeline, on `device`. That of the demo model takes prompts as `models.demo.DemoPipeline.inputs` makes them.

    Raises:
        FileNotFoundError: there is no such folder, or it is no pipeline's.
        ValueError: the pipeline has no `transformer`, the hub has no such repository, or there is no such device.
        ModuleNotFoundError: diffusers is not installed; the message says how to install it.
    """
    target = usable_device(device)
    if str(model) == DEMO:
        from ..models.demo import pipeline

        return pipeline.load(device=target, dtype=dtype or torch.float32).pipe
    diffusers = require("diffusers", "loading a pipeline")
    source = _source(model)
    kind = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    local = local_files_only or Path(source).is_dir()
    try:
        with _quiet(diffusers.utils.logging):
            pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=kind, local_files_only=local)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise ValueError(f"{model} could not be loaded as a diffusers pipeline: {_first_line(error)}") from error
    if not isinstance(getattr(pipe, "transformer", None), nn.Module):
        parts = ", ".join(sorted(pipe.components))
        raise ValueError(f"{model} is a {type(pipe).__name__} without a `transformer`; it has {parts}. PAB is for diffusion transformers")
    return pipe.to(target)


def usable_device(device: str | torch.device | None = None) -> torch.device:
    """The device to run on; default CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {str(device)!r} cannot be used here: {_first_line(error)}") from None
    return target


def _source(model: str | Path) -> str:
    """What `from_pretrained` takes: a folder with a pipeline in it, or an id."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{model} is no diffusers pipeline: no model_index.json; give what save_pretrained wrote")
        return str(folder)
    text = str(model)
    looks_like_a_path = isinstance(model, Path) or text.startswith((".", "/", "~")) or text.count("/") != 1 or folder.exists()
    if looks_like_a_path:
        raise FileNotFoundError(f"there is no folder {model}; give the folder of a diffusers pipeline, an id such as owner/name, or 'demo'")
    return text


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Without diffusers' bars where nobody watches them."""
    shown = logging.is_progress_bar_enabled()
    if sys.stderr.isatty() or not shown:
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
