"""Tables for rotary position embedding."""

from __future__ import annotations

import torch

from ..ops import Rope


def rotary_embedding(
    tokens: int,
    channels: int,
    *,
    theta: float = 10000.0,
    interleaved: bool = True,
    device: torch.device | str | None = None,
) -> Rope:
    """The rotary embedding of positions 0, 1, ..., tokens - 1.

        angle[n, i] = n * theta ** (-2 i / channels)

    Source: RoFormer (arXiv 2104.09864), section 3.2.2.

    Args:
        tokens: N.
        channels: how many of a head's D channels rotate; even.
        theta: base of the frequencies.
        interleaved: see `ops.Rope`.
        device: of the tables.

    Returns:
        cos and sin, `[N, channels / 2]` float32.

    Raises:
        ValueError: the number of channels is odd.

    Example:
        >>> rotary_embedding(5, 32).cos.shape
        torch.Size([5, 16])
    """
    if channels < 2 or channels % 2:
        raise ValueError(f"channels is {channels}; an even number is supported: pass one up to the head dimension")
    frequency = theta ** -(torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels)
    angle = torch.arange(tokens, dtype=torch.float64, device=device)[:, None] * frequency
    return Rope(angle.cos().float(), angle.sin().float(), interleaved)
