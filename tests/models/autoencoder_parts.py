"""What written-out autoencoders share: random weights, group norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def randomized(model: Any, seed: int = 0) -> Any:
    """The model in float64 with weights that keep the size of what they are applied to."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data = noise * p[0].numel() ** -0.5
        elif "norm" in name and name.endswith("weight"):
            p.data = 1 + 0.3 * noise
        else:
            p.data = 0.3 * noise
    return model.double().eval().requires_grad_(False)


def normed(w: Weights, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
    """A group norm over everything behind the channels."""
    parts = x.reshape(len(x), groups, -1)
    parts = parts - parts.mean(-1, keepdim=True)
    x = (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    weight, bias = (w[f"{name}.{part}"].reshape(-1, *[1] * (x.ndim - 2)) for part in ("weight", "bias"))
    return x * weight + bias


def swish(x: Tensor) -> Tensor:
    return x * x.sigmoid()
