"""The video model's networks: a small `WanTransformer3DModel`, and the constants of its diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import WanTransformer3DModel

SIZE = 32
"""Height and width of a clip in pixels."""
FRAMES = 9
"""Frames of a clip."""
BLOCK = (4, 2, 2)
"""Frames, rows and columns of a block of the cosine transform."""
CHANNELS = 192
CAPTION_CHANNELS = 64
Z_CHANNELS = 3 * BLOCK[0] * BLOCK[1] * BLOCK[2]
SHIFT = 3.0
"""The schedule's shift: `sigma = SHIFT u / (1 + (SHIFT - 1) u)` for u that falls from 1 to 0 at equal steps."""

TRANSFORMER_CONFIG = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": Z_CHANNELS,
    "out_channels": Z_CHANNELS,
    "text_dim": CAPTION_CHANNELS,
    "freq_dim": 128,
    "ffn_dim": 3 * CHANNELS,
    "num_layers": 6,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}


def build_transformer() -> WanTransformer3DModel:
    """The video model's transformer with fresh weights."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**TRANSFORMER_CONFIG)
