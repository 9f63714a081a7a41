"""The video model as a stock diffusers `WanPipeline`: schedulers, weights, and clips from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...extras import require
from .. import packaged
from ..packaged import GUIDANCE, STEPS, WEIGHTS, PackagedPipeline, Weights
from .captions import FILLERS, VOCABULARY, parse
from .network import CAPTION_CHANNELS, FRAMES, SHIFT, SIZE, build_transformer

__all__ = ["GUIDANCE", "SCHEDULERS", "STEPS", "WEIGHTS", "VideoPipeline", "load", "make_scheduler", "read_weights"]

MODEL = "the video model"
"""Its name in messages."""

_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": SHIFT}

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": SHIFT}),
    "heun": ("FlowMatchHeunDiscreteScheduler", {"shift": SHIFT}),
    "unipc": ("UniPCMultistepScheduler", _FLOW),
    "dpm++": ("DPMSolverMultistepScheduler", _FLOW),
}
"""By name, the class in diffusers and its settings: the sigmas of training."""


def make_scheduler(name: str) -> Any:
    """A diffusers scheduler with the sigmas of training; a ValueError if `name` is not in `SCHEDULERS`."""
    return packaged.make_scheduler(name, SCHEDULERS, MODEL)


def read_weights(path: str | Path | None = None) -> Weights:
    """Read weights, by default those of the package; a FileNotFoundError if there are none."""
    return packaged.read_weights(path, __package__, MODEL)


class VideoPipeline(PackagedPipeline):
    """The video model in an unmodified `WanPipeline`."""

    parse = staticmethod(parse)
    size = {"height": SIZE, "width": SIZE, "num_frames": FRAMES}


def load(
    scheduler: str = "flow",
    device: str | torch.device | None = None,
    weights: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> VideoPipeline:
    """The video model with its trained weights, in a stock `WanPipeline`.

    Args:
        scheduler: one of `SCHEDULERS`.
        device: default CUDA if available, else the CPU.
        weights: a file to read instead of the package's.
        dtype: of the transformer; the file holds float16.

    Raises:
        ValueError: the scheduler is unknown.
        FileNotFoundError: there are no weights.
        ModuleNotFoundError: diffusers or transformers is not installed.
    """
    diffusers = require("diffusers", MODEL)
    require("transformers", MODEL)
    from ..prompt_components import PromptEncoder, PromptTokenizer
    from .codec import BlockCosines

    sampler = make_scheduler(scheduler)
    loaded = read_weights(weights)
    mean, std = (loaded.tensors.pop(f"latents_{name}").tolist() for name in ("mean", "std"))
    transformer: Any = build_transformer()
    encoder = PromptEncoder(list(VOCABULARY.items()), CAPTION_CHANNELS)
    codec = BlockCosines(mean, std)
    packaged.fill({"transformer": transformer, "prompts": encoder.prompts}, loaded)
    nn.ModuleList([transformer, encoder, codec]).to(packaged.target(device), dtype).eval().requires_grad_(False)
    tokenizer = PromptTokenizer(list(VOCABULARY.items()), sorted(FILLERS), MODEL)
    pipe = diffusers.WanPipeline(tokenizer, encoder, codec, sampler, transformer)
    pipe.set_progress_bar_config(disable=True)
    return VideoPipeline(pipe, encoder.prompts, loaded.training, loaded.sha256)
