"""A whole tiny pipeline that saves itself to a folder and loads from it."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel


def tiny_dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=4,
        patch_size=2,
    )
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())
