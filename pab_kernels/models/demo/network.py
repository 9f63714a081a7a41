"""The demo model's network: a small `LatteTransformer3DModel`, and its noise schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .shapes import FRAMES, SIZE

if TYPE_CHECKING:
    from diffusers import LatteTransformer3DModel

CHANNELS = 144
CAPTION_CHANNELS = 72

TRANSFORMER_CONFIG = {
    "num_attention_heads": 2,
    "attention_head_dim": 72,
    "in_channels": 3,
    "out_channels": 6,  # LattePipeline uses the first half; the other half would be a variance
    "num_layers": 4,
    "cross_attention_dim": CHANNELS,
    "attention_bias": True,
    "sample_size": SIZE,
    "patch_size": 4,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": CAPTION_CHANNELS,
    "video_length": FRAMES,
}
"""Heads have 72 channels, as in Latte and Open-Sora."""

SCHEDULER_CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
"""The noise schedule of training: Latte's own. The model predicts `v = sqrt(a) noise - sqrt(1 - a) x`."""


def build_transformer() -> LatteTransformer3DModel:
    """The demo's transformer with fresh weights."""
    from diffusers import LatteTransformer3DModel

    return LatteTransformer3DModel(**TRANSFORMER_CONFIG)
