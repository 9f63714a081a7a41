"""The demo model as a stock diffusers `LattePipeline`: schedulers, weights, and clips from prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...extras import require
from ...rules.config import PABConfig
from ...rules.formats import load_config
from .. import packaged
from ..packaged import GUIDANCE, STEPS, WEIGHTS, PackagedPipeline, Weights
from .network import CAPTION_CHANNELS, SCHEDULER_CONFIG, build_transformer
from .shapes import FILLERS, FRAMES, SIZE, VOCABULARY, parse

__all__ = [
    "GUIDANCE",
    "SCHEDULERS",
    "STEPS",
    "WEIGHTS",
    "DemoPipeline",
    "calibrated",
    "load",
    "make_scheduler",
    "read_weights",
]

MODEL = "the demo model"
"""Its name in messages."""

_TRAINED = SCHEDULER_CONFIG | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # as Latte's; clipping would clip the clip but not the noise
    "ddim": ("DDIMScheduler", _TRAINED | {"clip_sample": False, "timestep_spacing": "leading"}),
    "dpm++": ("DPMSolverMultistepScheduler", _TRAINED),
    "pndm": ("PNDMScheduler", _TRAINED | {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", _TRAINED),
    "euler": ("EulerDiscreteScheduler", _TRAINED),
    "unipc": ("UniPCMultistepScheduler", _TRAINED),
}
"""By name, the class in diffusers and its settings: the noise schedule of training, and more."""


def make_scheduler(name: str) -> Any:
    """A diffusers scheduler with the noise schedule of training; a ValueError if `name` is not in `SCHEDULERS`."""
    return packaged.make_scheduler(name, SCHEDULERS, MODEL)


def read_weights(path: str | Path | None = None) -> Weights:
    """Read weights, by default those of the package; a FileNotFoundError if there are none."""
    return packaged.read_weights(path, __package__, MODEL)


def calibrated(scheduler: str = "ddim", steps: int = STEPS, guidance: float = GUIDANCE) -> PABConfig | None:
    """The plan that `pab calibrate` found for the demo model; None where it was found for another way to sample.

    Args:
        scheduler: one of `SCHEDULERS`.
        steps: sampling steps.
        guidance: scale of classifier-free guidance.
    """
    path = Path(__file__).with_name("calibrated.yaml")
    found_for = require("yaml", MODEL).safe_load(path.read_text())["calibration"]
    asked = {"scheduler": SCHEDULERS[scheduler][0], "steps": steps, "guidance": guidance}
    return load_config(path) if all(found_for[name] == value for name, value in asked.items()) else None


class DemoPipeline(PackagedPipeline):
    """The demo model in an unmodified `LattePipeline`."""

    parse = staticmethod(parse)
    size = {"height": SIZE, "width": SIZE, "video_length": FRAMES}


def load(
    scheduler: str = "ddim",
    device: str | torch.device | None = None,
    weights: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> DemoPipeline:
    """The demo model with its trained weights, in a stock `LattePipeline`.

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
    from .components import PixelDecoder

    sampler = make_scheduler(scheduler)
    loaded = read_weights(weights)
    transformer: Any = build_transformer()
    encoder = PromptEncoder(list(VOCABULARY.items()), CAPTION_CHANNELS)
    decoder = PixelDecoder()
    packaged.fill({"transformer": transformer, "prompts": encoder.prompts}, loaded)
    nn.ModuleList([transformer, encoder, decoder]).to(packaged.target(device), dtype).eval().requires_grad_(False)
    tokenizer = PromptTokenizer(list(VOCABULARY.items()), sorted(FILLERS), MODEL)
    pipe = diffusers.LattePipeline(tokenizer, encoder, decoder, transformer, sampler)
    pipe.set_progress_bar_config(disable=True)
    return DemoPipeline(pipe, encoder.prompts, loaded.training, loaded.sha256)
