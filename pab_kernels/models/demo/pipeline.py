"""The demo model as a stock diffusers `LattePipeline`: schedulers, weights, and clips from prompts."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...extras import require
from ...rules.schedule import Schedule
from .network import SCHEDULER_CONFIG, PromptTable, build_transformer
from .shapes import FRAMES, SIZE, Caption, parse

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    # as Latte's; clipping would clip the clip but not the noise
    "ddim": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "leading"}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""By name, the class in diffusers and its settings beyond `SCHEDULER_CONFIG`."""

WEIGHTS = "weights.safetensors"
GUIDANCE = 3.0
STEPS = 50


def make_scheduler(name: str) -> Any:
    """A diffusers scheduler with the noise schedule of training; a ValueError if `name` is not in `SCHEDULERS`."""
    if name not in SCHEDULERS:
        raise ValueError(f"the demo model has no scheduler {name!r}; it has {', '.join(SCHEDULERS)}")
    class_name, extra = SCHEDULERS[name]
    config = SCHEDULER_CONFIG | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"} | extra
    return getattr(require("diffusers", "the demo model"), class_name)(**config)


@dataclass(frozen=True)
class Weights:
    """The demo's weights and their origin.

    Args:
        tensors: by parameter name, with the prefix `transformer.` or `prompts.`.
        training: the file's metadata: `steps`.
        sha256: of the file.
    """

    tensors: dict[str, torch.Tensor]
    training: dict[str, str]
    sha256: str


def read_weights(path: str | Path | None = None) -> Weights:
    """Read weights, by default those of the package; a FileNotFoundError if there are none."""
    safetensors = require("safetensors", "reading the demo model's weights")
    resource = importlib.resources.files(__package__).joinpath(WEIGHTS)
    with importlib.resources.as_file(resource) if path is None else contextlib.nullcontext(Path(path)) as file:
        if not file.is_file():
            raise FileNotFoundError(
                f"the demo model's weights are not at {file}; they come with the package, or "
                "`python examples/train_demo_model.py --export pab_kernels/models/demo` exports a training checkpoint"
            )
        with safetensors.safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            training = opened.metadata() or {}
        return Weights(tensors, training, hashlib.sha256(file.read_bytes()).hexdigest())


@dataclass(frozen=True)
class DemoPipeline:
    """The demo model.

    Args:
        pipe: an unmodified `LattePipeline` of diffusers, for `pab_kernels.enable`.
        prompts: the table that embeds captions.
        training: metadata of the weights file.
        sha256: of the weights file.
    """

    pipe: Any
    prompts: PromptTable
    training: dict[str, str]
    sha256: str

    def schedule(self, steps: int) -> Schedule:
        """The schedule of a sampling with `steps` steps; a second-order scheduler has more timesteps than steps."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        return Schedule.of(timesteps=scheduler.timesteps)

    def inputs(self, captions: Sequence[Caption], seeds: Sequence[int]) -> dict[str, Any]:
        """The arguments of `pipe(...)` for captions: embeddings, a noise generator for each clip, and the size."""
        if not captions or len(captions) != len(seeds):
            raise ValueError(f"each clip needs a prompt and a seed, got {len(captions)} prompts and {len(seeds)} seeds")
        device = self.pipe.transformer.device
        with torch.no_grad():
            embeds = self.prompts(self.prompts.indices(list(captions)).to(device))
            negative = self.prompts(self.prompts.indices([Caption()] * len(captions)).to(device))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # CPU: the same noise on every device
        size = {"height": SIZE, "width": SIZE, "video_length": FRAMES}
        texts = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "negative_prompt": None}
        return {**texts, "generator": generators, **size}

    def generate(
        self,
        prompts: Sequence[str | Caption],
        seeds: Sequence[int],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        callback: Callable[..., dict[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Generate a clip for each prompt with one call of the pipeline.

        Args:
            prompts: texts of the demo's vocabulary, or captions.
            seeds: one for each clip; a clip's noise depends only on its seed.
            steps: sampling steps.
            guidance: scale of classifier-free guidance against the caption with every slot open.
            callback: diffusers' `callback_on_step_end`.

        Returns:
            `[clips, frames, 3, height, width]`, float32 in [0, 1], on the CPU.

        Raises:
            ValueError: a prompt has an unknown word, the numbers of prompts and seeds differ, or `steps` is not
            positive.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        captions = [prompt if isinstance(prompt, Caption) else parse(prompt) for prompt in prompts]
        return self.pipe(
            **self.inputs(captions, seeds),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
            callback_on_step_end=callback,
        ).frames.cpu()


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
    diffusers = require("diffusers", "the demo model")
    require("transformers", "the demo model")
    from .components import PixelDecoder, PromptEncoder, PromptTokenizer

    sampler = make_scheduler(scheduler)
    loaded = read_weights(weights)
    transformer: Any = build_transformer()
    encoder = PromptEncoder()
    parts = nn.ModuleDict({"transformer": transformer, "prompts": encoder.prompts})
    parts.load_state_dict(loaded.tensors)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    decoder = PixelDecoder()
    parts["decoder"] = decoder
    parts.to(target, dtype).eval().requires_grad_(False)
    pipe = diffusers.LattePipeline(PromptTokenizer(), encoder, decoder, transformer, sampler)
    pipe.set_progress_bar_config(disable=True)
    return DemoPipeline(pipe, encoder.prompts, loaded.training, loaded.sha256)
