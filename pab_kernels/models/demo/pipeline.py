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
    # As Latte has it. Clipping would clip the clip but not the noise, and drift apart.
    "ddim": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "leading"}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name of a scheduler here, its class in diffusers, and what is set beyond `SCHEDULER_CONFIG`."""

WEIGHTS = "weights.safetensors"
GUIDANCE = 3.0
STEPS = 50


def make_scheduler(name: str) -> Any:
    """A diffusers scheduler with the noise schedule of training.

    Raises:
        ValueError: `name` is none of `SCHEDULERS`.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"the demo model has no scheduler {name!r}; it has {', '.join(SCHEDULERS)}")
    class_name, extra = SCHEDULERS[name]
    config = SCHEDULER_CONFIG | {"prediction_type": "v_prediction", "timestep_spacing": "trailing"} | extra
    return getattr(require("diffusers", "the demo model"), class_name)(**config)


@dataclass(frozen=True)
class Weights:
    """The demo's weights and where they are from.

    Args:
        tensors: by parameter name, with the prefix `transformer.` or `prompts.`.
        training: what the file says of its training: `steps`.
        sha256: of the file.
    """

    tensors: dict[str, torch.Tensor]
    training: dict[str, str]
    sha256: str


def read_weights(path: str | Path | None = None) -> Weights:
    """Read weights, the package's own unless `path` is given.

    Raises:
        FileNotFoundError: there is no such file; the message says how to get it.
    """
    safetensors = require("safetensors", "reading the demo model's weights")
    resource = importlib.resources.files(__package__).joinpath(WEIGHTS)
    with importlib.resources.as_file(resource) if path is None else contextlib.nullcontext(Path(path)) as file:
        if not file.is_file():
            raise FileNotFoundError(
                f"the demo model's weights are not at {file}; they come with the package, or "
                "`python examples/train_demo_model.py --export pab_kernels/models/demo` makes them from a training's "
                "checkpoint"
            )
        with safetensors.safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            training = opened.metadata() or {}
        return Weights(tensors, training, hashlib.sha256(file.read_bytes()).hexdigest())


@dataclass(frozen=True)
class DemoPipeline:
    """The demo model.

    Args:
        pipe: diffusers' own `LattePipeline`, unmodified: what `pab_kernels.enable` takes.
        prompts: the table that embeds captions.
        training: what the weights' file says of its training.
        sha256: of the weights' file.
    """

    pipe: Any
    prompts: PromptTable
    training: dict[str, str]
    sha256: str

    def schedule(self, steps: int) -> Schedule:
        """The timesteps of a sampling with `steps` steps; a second-order scheduler has more timesteps than that."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        return Schedule.of(timesteps=scheduler.timesteps)

    def inputs(self, captions: Sequence[Caption], seeds: Sequence[int]) -> dict[str, Any]:
        """The arguments of `pipe(...)` that say what is drawn: embeddings, one noise generator a clip, the clip's
        size."""
        if not captions or len(captions) != len(seeds):
            raise ValueError(f"each clip needs a prompt and a seed, got {len(captions)} prompts and {len(seeds)} seeds")
        device = self.pipe.transformer.device
        with torch.no_grad():
            embeds = self.prompts(self.prompts.indices(list(captions)).to(device))
            negative = self.prompts(self.prompts.indices([Caption()] * len(captions)).to(device))
        generators = [
            torch.Generator().manual_seed(seed) for seed in seeds
        ]  # on the CPU: the same noise on every device
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
        """Draw a clip for each prompt with one call of the pipeline.

        Args:
            prompts: texts of the demo's vocabulary, or captions.
            seeds: one a clip; a clip's noise depends on its own seed alone.
            steps: sampling steps.
            guidance: scale of classifier-free guidance, against the caption with every slot open.
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
        device: default CUDA where there is one, else the CPU.
        weights: a file to read instead of the package's own.
        dtype: of the transformer; the file holds float16.

    Raises:
        ValueError: an unknown scheduler.
        FileNotFoundError: no weights.
        ModuleNotFoundError: diffusers is not installed; the message says how to install it.
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
