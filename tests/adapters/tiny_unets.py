"""Tiny real pipelines of diffusers around tiny UNets."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from tests.adapters.tiny_pipes import Pipe, embedding, prompts

_UNET = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "cross_attention_dim": 6,
    "norm_num_groups": 2,
    "sample_size": 8,
}


def _blocks(kind: str) -> dict[str, tuple[str, str]]:
    return {
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
    }


def unet(name: str) -> Any:
    """A tiny UNet of the class `name`, all of whose parts matter: some start as zeros."""
    config: dict[str, Any] = {
        "UNet2DConditionModel": _UNET | _blocks("2D") | {"attention_head_dim": 2},
        "UNetMotionModel": _UNET
        | _blocks("Motion")
        | {"num_attention_heads": 2, "motion_num_attention_heads": 2, "motion_max_seq_length": 8},
        "UNet3DConditionModel": _UNET | _blocks("3D") | {"attention_head_dim": 4},
        "I2VGenXLUNet": _UNET | _blocks("3D") | {"block_out_channels": (64, 64), "num_attention_heads": 8},
        "UNetSpatioTemporalConditionModel": _UNET
        | _blocks("SpatioTemporal")
        | {
            "block_out_channels": (32, 32),
            "num_attention_heads": 2,
            "num_frames": 3,
            "in_channels": 8,
            "out_channels": 4,
        }
        | {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24},
    }[name]
    config.pop("norm_num_groups" if name == "UNetSpatioTemporalConditionModel" else "", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(diffusers, name)(**config)
        for p in model.parameters():
            if p.ndim > 1 and p.numel():
                nn.init.normal_(p, std=0.15)
    return model.eval().requires_grad_(False)


def vae(kind: Any = diffusers.AutoencoderKL, **config: Any) -> Any:
    """A tiny VAE, for pipelines that ask it for its scale or encode their first frame."""
    return (
        kind(block_out_channels=(32,) * 4, layers_per_block=1, latent_channels=4, **config).eval().requires_grad_(False)
    )


def image_encoder() -> Any:
    """CLIP's, as wide as the UNet's cross attention."""
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=6,
    )
    return transformers.CLIPVisionModelWithProjection(config).eval().requires_grad_(False)


def _stable_video() -> dict[str, Any]:
    kinds = ("DownEncoderBlock2D",) * 4
    return {
        "unet": unet("UNetSpatioTemporalConditionModel"),
        "vae": vae(diffusers.AutoencoderKLTemporalDecoder, down_block_types=kinds),
        "image_encoder": image_encoder(),
        "feature_extractor": transformers.CLIPImageProcessor(),
        "scheduler": diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
    }


UNETS = [
    Pipe(
        "StableDiffusionPipeline",
        lambda: {
            "unet": unet("UNet2DConditionModel"),
            "vae": vae(),
            "scheduler": diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        },
        prompts(6) | {"height": 64, "width": 64, "guidance_scale": 4.0},
        ("#0",),
        {"width": 96},
        denoiser="unet",
    ),
    Pipe(
        "AnimateDiffPipeline",
        lambda: {"unet": unet("UNetMotionModel"), "vae": vae(), "scheduler": diffusers.DDIMScheduler()},
        prompts(6) | {"height": 64, "width": 64, "num_frames": 3, "guidance_scale": 4.0},
        ("#0",),
        {"num_frames": 4},
        denoiser="unet",
    ),
    Pipe(
        "TextToVideoSDPipeline",
        lambda: {"unet": unet("UNet3DConditionModel"), "vae": vae(), "scheduler": diffusers.DDIMScheduler()},
        prompts(6) | {"height": 64, "width": 64, "num_frames": 3, "guidance_scale": 4.0},
        ("#0",),
        {"num_frames": 4},
        denoiser="unet",
    ),
    Pipe(
        "StableVideoDiffusionPipeline",
        _stable_video,
        {
            "image": embedding(0, 3, 16, 16).sigmoid(),
            "height": 64,
            "width": 64,
            "num_frames": 3,
            "decode_chunk_size": 1,
        },
        ("#0",),
        {"num_frames": 4},
        denoiser="unet",
    ),
]
"""Images and videos; attention over frames in motion modules, in temporal transformers and in blocks of both."""
