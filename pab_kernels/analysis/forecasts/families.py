"""Published transformers: the configs of their checkpoints, sizes and steps."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .model_calls import Size


@dataclass(frozen=True)
class Family:
    """A published transformer.

    Args:
        checkpoint: hub id.
        config: of the transformer, with its class as `_class_name`; missing arguments have the class's defaults.
        sizes: published frames x height x width, the usual one first.
        steps: of the sampling, its pipeline's default.
    """

    checkpoint: str
    config: Mapping[str, Any]
    sizes: tuple[Size, ...]
    steps: int


def _cogvideox(**config: Any) -> dict[str, Any]:
    sample = {"sample_height": 60, "sample_width": 90, "sample_frames": 49}
    return {"_class_name": "CogVideoXTransformer3DModel"} | sample | config


def _wan(**config: Any) -> dict[str, Any]:
    sizes = {"attention_head_dim": 128, "text_dim": 4096, "patch_size": (1, 2, 2)}
    return {"_class_name": "WanTransformer3DModel"} | sizes | config


_PIXART = {
    "attention_bias": True,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
}


def _open_sora_plan_11(frames: int) -> Family:
    return Family(
        f"LanguageBind/Open-Sora-Plan-v1.1.0/{frames}x512x512",
        {
            "_class_name": "LatteT2V",
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "sample_size": (64, 64),
            "video_length": 1 + (frames - 1) // 4,
            **_PIXART,
        },
        (Size(frames, 512, 512),),
        150,
    )


FAMILIES = {
    # VideoSys and Latte's repository: 16 frames, 512 x 512
    "latte": Family(
        "maxin-cn/Latte-1",
        {
            "_class_name": "LatteTransformer3DModel",
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "attention_bias": True,
            "sample_size": 64,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 4096,
            "video_length": 16,
        },
        (Size(16, 512, 512),),
        50,
    ),
    # CogVideoX's paper (arXiv 2408.06072), table 1 of models, and diffusers' scripts/convert_cogvideox_to_diffusers.py
    "cogvideox-2b": Family(
        "THUDM/CogVideoX-2b",
        _cogvideox(num_attention_heads=30, num_layers=30, use_rotary_positional_embeddings=False),
        (Size(49, 480, 720),),
        50,
    ),
    "cogvideox-5b": Family(
        "THUDM/CogVideoX-5b",
        _cogvideox(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True),
        (Size(49, 480, 720),),
        50,
    ),
    # Wan 2.1's wan/configs/wan_t2v_1_3B.py and wan_t2v_14B.py
    "wan2.1-1.3b": Family(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        _wan(num_attention_heads=12, num_layers=30, ffn_dim=8960),
        (Size(81, 480, 832),),
        50,
    ),
    "wan2.1-14b": Family(
        "Wan-AI/Wan2.1-T2V-14B-Diffusers",
        _wan(num_attention_heads=40, num_layers=40, ffn_dim=13824),
        (Size(81, 480, 832), Size(81, 720, 1280)),
        50,
    ),
    # the class's defaults are the checkpoint's
    "hunyuanvideo": Family(
        "hunyuanvideo-community/HunyuanVideo",
        {"_class_name": "HunyuanVideoTransformer3DModel"},
        (Size(129, 720, 1280), Size(129, 544, 960)),
        50,
    ),
    "ltx-video": Family(
        "Lightricks/LTX-Video", {"_class_name": "LTXVideoTransformer3DModel"}, (Size(161, 512, 704),), 50
    ),
    "flux.1-dev": Family(
        "black-forest-labs/FLUX.1-dev",
        {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True},
        (Size(1, 1024, 1024),),
        28,
    ),
    # Open-Sora v1.2.0, opensora/models/stdit/stdit3.py; 2, 4 and 8 s at 480p, 2 and 4 s at 720p
    "open-sora-1.2": Family(
        "hpcai-tech/OpenSora-STDiT-v3",
        {"_class_name": "STDiT3"},
        (Size(51, 480, 854), Size(102, 480, 854), Size(204, 480, 854), Size(51, 720, 1280), Size(102, 720, 1280)),
        30,
    ),
    # Open-Sora-Plan v1.1.0 and v1.2.0: the models LatteT2V-XL/122 and OpenSoraT2V-ROPE-L/122
    "open-sora-plan-1.1": _open_sora_plan_11(65),
    "open-sora-plan-1.1-221": _open_sora_plan_11(221),
    "open-sora-plan-1.2": Family(
        "LanguageBind/Open-Sora-Plan-v1.2.0",
        {
            "_class_name": "OpenSoraT2V",
            "num_attention_heads": 24,
            "attention_head_dim": 96,
            "in_channels": 4,
            "num_layers": 32,
            "cross_attention_dim": 2304,
            "caption_channels": 4096,
            "sample_size": (60, 80),
            "sample_size_t": 24,
            "use_rope": True,
            **_PIXART,
        },
        (Size(93, 480, 640), Size(29, 480, 640), Size(93, 720, 1280), Size(29, 720, 1280)),
        100,
    ),
}
"""By name."""


def family(name: str) -> Family | None:
    """The family with a name or hub id, or None."""
    return next((found for key, found in FAMILIES.items() if name.lower() in (key, found.checkpoint.lower())), None)


def unknown_family(name: str) -> ValueError:
    """The error for an unknown name, with similar names."""
    near = difflib.get_close_matches(name.lower(), FAMILIES, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    known = ", ".join(FAMILIES)
    return ValueError(f"there is no model {name!r}{hint} Supported are {known}, a hub id or the path of a config.json")
