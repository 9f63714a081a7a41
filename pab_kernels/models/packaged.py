"""Models whose weights come with the package: reading the weights, and clips from prompts by a stock pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ..extras import require
from ..rules.schedule import Schedule
from .prompts import PromptTable

WEIGHTS = "weights.safetensors"
GUIDANCE = 3.0
STEPS = 50

Schedulers = Mapping[str, tuple[str, dict[str, Any]]]
"""By name, a scheduler's class in diffusers and its settings."""


def make_scheduler(name: str, schedulers: Schedulers, model: str) -> Any:
    """A diffusers scheduler; a ValueError if `name` is not in `schedulers`."""
    if name not in schedulers:
        raise ValueError(f"{model} has no scheduler {name!r}; it has {', '.join(schedulers)}")
    class_name, config = schedulers[name]
    return getattr(require("diffusers", model), class_name)(**config)


@dataclass(frozen=True)
class Weights:
    """The weights of a model and their origin.

    Args:
        tensors: by parameter name.
        training: the file's metadata: `steps`.
        sha256: of the file.
    """

    tensors: dict[str, torch.Tensor]
    training: dict[str, str]
    sha256: str


def read_weights(path: str | Path | None, package: str, model: str) -> Weights:
    """Read a weights file.

    Args:
        path: the file; None for the one in `package`.
        package: the model's room, such as "pab_kernels.models.demo".
        model: its name, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: safetensors is not installed.
    """
    safetensors = require("safetensors", f"reading {model}'s weights")
    resource = importlib.resources.files(package).joinpath(WEIGHTS)
    with importlib.resources.as_file(resource) if path is None else contextlib.nullcontext(Path(path)) as file:
        if not file.is_file():
            room = package.replace(".", "/")
            raise FileNotFoundError(
                f"{model}'s weights are not at {file}; they come with the package, or "
                f"`python examples/train_{room.rpartition('/')[2]}_model.py --export {room}` exports a training "
                "checkpoint"
            )
        with safetensors.safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  not a dict
            training = opened.metadata() or {}
        return Weights(tensors, training, hashlib.sha256(file.read_bytes()).hexdigest())


def fill(parts: dict[str, nn.Module], weights: Weights) -> None:
    """Put weights into modules: the names of a module's tensors begin with its key."""
    nn.ModuleDict(parts).load_state_dict(weights.tensors)


def target(device: str | torch.device | None) -> torch.device:
    """`device`, by default CUDA if available, else the CPU."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class PackagedPipeline(ABC):
    """A model of the package in a stock pipeline of diffusers.

    Args:
        pipe: the unmodified pipeline, for `pab_kernels.enable`.
        prompts: the table that embeds captions.
        training: metadata of the weights file.
        sha256: of the weights file.
    """

    pipe: Any
    prompts: PromptTable
    training: dict[str, str]
    sha256: str

    size: ClassVar[Mapping[str, int]]
    """The arguments of the pipeline for height, width and frames."""

    @staticmethod
    @abstractmethod
    def parse(prompt: str) -> Any:
        """A prompt as a caption; the caption of "" has every slot open."""

    def schedule(self, steps: int) -> Schedule:
        """The schedule of a sampling with `steps` steps; a second-order scheduler has more timesteps than steps."""
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        return Schedule.of(timesteps=scheduler.timesteps)

    def inputs(self, captions: Sequence[Any], seeds: Sequence[int]) -> dict[str, Any]:
        """The arguments of `pipe(...)` for captions: embeddings, a noise generator for each clip, and the size."""
        if not captions or len(captions) != len(seeds):
            raise ValueError(f"each clip needs a prompt and a seed, got {len(captions)} prompts and {len(seeds)} seeds")
        device = self.pipe.transformer.device
        with torch.no_grad():
            embeds = self.prompts(self.prompts.indices(captions).to(device))
            negative = self.prompts(self.prompts.indices([self.parse("")] * len(captions)).to(device))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # CPU: the same noise on every device
        texts = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "negative_prompt": None}
        return {**texts, "generator": generators, **self.size}

    def generate(
        self,
        prompts: Sequence[Any],
        seeds: Sequence[int],
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        callback: Callable[..., dict[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Generate a clip for each prompt with one call of the pipeline.

        Args:
            prompts: texts of the model's vocabulary, or captions.
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
        captions = [self.parse(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        return self.pipe(
            **self.inputs(captions, seeds),
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="pt",
            callback_on_step_end=callback,
        ).frames.cpu()
