"""A tiny STDiT3 whose gates and shifts matter, and its inputs: sizes that are no multiple of the patch, and texts of
unequal length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pab_kernels.models.stdit3 import STDiT3

CHANNELS, HEADS, TEXT, TEXT_CHANNELS = 64, 2, 5, 24
LAYERS = 2
LENGTHS = (3, 5)
"""Tokens of text of the two samples."""


def tiny_stdit3(dtype: torch.dtype = torch.float32, *, seed: int = 0, **config: Any) -> STDiT3:
    """2 spatial and 2 temporal blocks of 2 heads x 32; `config` overrides this."""
    sizes = {"hidden_size": CHANNELS, "num_heads": HEADS, "depth": LAYERS, "caption_channels": TEXT_CHANNELS}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = STDiT3(**sizes | {"model_max_length": TEXT} | config)
        for name, p in model.named_parameters():
            if "scale_shift_table" in name:
                nn.init.normal_(p, std=0.5)
            elif "norm" in name:
                nn.init.normal_(p, 1, 0.3)
    return model.to(dtype).eval().requires_grad_(False)


def noise(
    seed: int = 0, *, batch: int = 2, frames: int = 3, size: tuple[int, int] = (5, 7), dtype: Any = torch.float32
) -> Tensor:
    return torch.randn(batch, 4, frames, *size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def text(seed: int = 1, *, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 1, TEXT, TEXT_CHANNELS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def conditions(*, batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What stays the same in all calls of a run, but for the text."""
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1]])[:batch]
    return {"mask": mask} | {
        name: torch.tensor([value], dtype=dtype) for name, value in (("fps", 24.0), ("height", 40.0), ("width", 56.0))
    }


def given_frames(frames: int = 3, *, batch: int = 2, free: int = 1) -> Tensor:
    """`x_mask` that gives all frames but those from `free` on."""
    return (torch.arange(frames) >= free).expand(batch, -1)


def run_model(call: Callable[..., Tensor], timesteps: Any, x: Tensor, texts: dict[str, Tensor], **fixed: Any) -> Tensor:
    """A sampling loop of its own: `call(context, step, x, timestep=, y=, ...)` once a step and context."""
    for step, t in enumerate(timesteps):
        timestep = torch.full((x.shape[0],), float(t), dtype=x.dtype)
        outs = [call(name, step, x, timestep=timestep, y=y, **fixed)[:, :4].to(x.dtype) for name, y in texts.items()]
        x = x - 0.1 * sum(outs)
    return x
