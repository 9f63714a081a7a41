"""Calling any diffusers pipeline: its arguments, progress by step, and its output as frames."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..messages import first_line
from ..progress import Progress
from ..rules.schedule import check_steps
from .sampling import check_seed

_FRAMES = ("num_frames", "video_length")
"""Names of the argument for the number of frames."""


@dataclass(frozen=True)
class Wish:
    """What a user asks a pipeline for; None leaves it to the pipeline.

    Args:
        prompt, negative_prompt: texts.
        steps: sampling steps.
        guidance: scale of classifier-free guidance.
        size: frames, height, width in pixels, or height, width.
        seed: of the noise, which is generated on the CPU: the same on every device.
        further: arguments by their names in the pipeline.

    Raises:
        ValueError: a value is out of bounds.
    """

    prompt: str | None
    negative_prompt: str | None = None
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, ...] | None = None
    seed: int = 0
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        check_steps(self.steps or 1)
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        check_seed(self.seed)
        if self.size is not None and (len(self.size) not in (2, 3) or min(self.size) < 1):
            got = "x".join(map(str, self.size))
            raise ValueError(f"a size is frames x height x width or height x width, each at least 1; got {got}")


def arguments(pipe: Any, wish: Wish, output_type: str = "pt") -> dict[str, Any]:
    """The arguments of `pipe(...)` for a wish, without the generator of the noise.

    Args:
        pipe: a diffusers pipeline.
        wish: the request.
        output_type: for pipelines that have this argument.

    Raises:
        ValueError: the pipeline does not take one of them, or needs others.
    """
    taken = inspect.signature(pipe.__call__).parameters
    size = wish.size or _trained_size(pipe)
    frames, height, width = ((None,) * (3 - len(size)) + size) if size else (None, None, None)
    counts = next((name for name in _FRAMES if name in taken), _FRAMES[0])
    wanted = {
        "prompt": wish.prompt,
        "negative_prompt": wish.negative_prompt,
        "num_inference_steps": wish.steps,
        "guidance_scale": wish.guidance,
        counts: frames,
        "height": height,
        "width": width,
    }
    asked = {name: value for name, value in wanted.items() if value is not None} | dict(wish.further)
    if unknown := [name for name in asked if name not in taken]:
        raise ValueError(f"{type(pipe).__name__} takes no {unknown[0]}; leave it out. It takes {', '.join(taken)}")
    required = [n for n, p in taken.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if "prompt" in taken and "prompt_embeds" not in asked:
        required.append("prompt")
    if missing := [name for name in dict.fromkeys(required) if name not in asked]:
        names = ", ".join(missing)
        raise ValueError(f"{type(pipe).__name__} needs {names}; give it (--prompt TEXT or --argument NAME=VALUE)")
    return ({"output_type": output_type} if "output_type" in taken else {}) | asked


def _trained_size(pipe: Any) -> tuple[int, ...] | None:
    """The training size of a model with a fixed number of frames (Latte), from its config; None for other models."""
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    frames, side = (getattr(config, name, None) for name in ("video_length", "sample_size"))
    factor = getattr(pipe, "vae_scale_factor", None)
    if not (isinstance(frames, int) and isinstance(side, int) and isinstance(factor, int)):
        return None
    return frames, side * factor, side * factor


def call(pipe: Any, wish: Wish, on_step: Progress | None = None) -> torch.Tensor:
    """Call a pipeline and return its frames.

    Args:
        pipe: a diffusers pipeline.
        wish: the request.
        on_step: called after every step.

    Returns:
        `[frames, 3, height, width]`, floating point in [0, 1], on the CPU; an image has one frame.

    Raises:
        ValueError: the pipeline does not take an argument, fails, or returns neither frames nor images.
    """
    asked = arguments(pipe, wish)
    taken = inspect.signature(pipe.__call__).parameters
    if "generator" in taken:
        asked["generator"] = torch.Generator().manual_seed(wish.seed)
    if on_step is not None:
        default = taken["num_inference_steps"].default if "num_inference_steps" in taken else None
        asked |= _callback(pipe, on_step, wish.steps or (default if isinstance(default, int) else None), taken)
    try:
        output = pipe(**asked)
    except (MemoryError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{type(pipe).__name__} failed: {first_line(error)}") from error
    frames = frames_of(output)
    if not frames.isfinite().all():
        raise ValueError(f"the output of {type(pipe).__name__} is not finite; try dtype bfloat16 or float32")
    return frames


def _callback(pipe: Any, on_step: Progress, steps: int | None, taken: Any) -> dict[str, Any]:
    """The arguments that make a pipeline call `on_step`; none if it has no callback."""
    done = itertools.count(1)

    def step(*_: Any, **__: Any) -> dict[str, Any]:
        on_step(next(done), getattr(pipe, "num_timesteps", None) or steps)  # second-order schedulers take more steps
        return {}

    if "callback_on_step_end" in taken:
        return {"callback_on_step_end": step}
    if "callback" in taken:  # older pipelines
        return {"callback": step, "callback_steps": 1}
    return {}


def frames_of(output: Any) -> torch.Tensor:
    """The frames or images of the first prompt in a pipeline's output: `[frames, 3, height, width]` in [0, 1].

    Raises:
        ValueError: there are none.
    """
    found = next((value for name in ("frames", "images") if (value := getattr(output, name, None)) is not None), None)
    if found is None or len(found) == 0:
        got = f"the pipeline returned {type(output).__name__}, which has neither frames nor images"
        raise ValueError(f"{got}; pipelines of images and videos are supported")
    first = found[0]  # of the batch
    if isinstance(first, torch.Tensor):
        frames = first.detach().float().cpu()
        return frames if frames.ndim == 4 else frames[None]
    pictures = first if isinstance(first, Sequence) else [first]
    arrays = np.stack([np.asarray(picture) for picture in pictures])
    arrays = arrays.reshape(-1, *arrays.shape[-3:])  # [frames, height, width, 3]
    scale = 255 if arrays.dtype == np.uint8 else 1
    return torch.from_numpy(np.ascontiguousarray(arrays, dtype=np.float32) / scale).movedim(-1, 1)
