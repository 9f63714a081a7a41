"""Parts that the tiny models of several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.adapters.expected_models import kinds
from tests.adapters.tiny_models import TEXT, Tiny

Randn = Callable[..., Tensor]


def tiny(
    name: str,
    config: dict[str, Any],
    inputs: Callable[[Randn], dict[str, Any]],
    streams: bool = True,
    of: type[Tiny] = Tiny,
) -> Tiny:
    return of(name, config, inputs, kinds(name), streams)


def timestep(value: float = 500.0) -> Tensor:
    return torch.tensor([value])


def ids(tokens: int) -> Tensor:
    """Places of tokens, text included, on three axes."""
    return torch.stack([torch.zeros(tokens), torch.arange(tokens), torch.arange(tokens) % 3], dim=-1).float()


HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
FLUX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "in_channels": 4,
    "joint_attention_dim": 6,
    "axes_dims_rope": [4, 4, 8],
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 6,
    "freq_dim": 16,
    "ffn_dim": 20,
    "rope_max_seq_len": 16,
}


def flux(r: Randn, axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 15, 4),
        "encoder_hidden_states": r(1, TEXT, 6),
        "timestep": timestep(0.5),
        "img_ids": torch.zeros(15, axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }
