"""What config.json names in the autoencoders of Open-Sora-Plan."""

from __future__ import annotations

from typing import Any

_FROM_1_1: dict[str, Any] = {
    "encoder_conv_in": "Conv2d",
    "encoder_attention": "AttnBlock3DFix",
    "encoder_resnet_blocks": ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"],
    "decoder_attention": "AttnBlock3DFix",
}
VERSIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "1.1": {
        **_FROM_1_1,
        "encoder_spatial_downsample": ["Downsample", "Downsample", "Downsample", ""],
        "encoder_temporal_downsample": ["", "TimeDownsampleRes2x", "TimeDownsampleRes2x", ""],
        "decoder_temporal_upsample": ["", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"],
    },
    "1.2": {
        **_FROM_1_1,
        "encoder_spatial_downsample": [
            "Downsample",
            "Spatial2xTime2x3DDownsample",
            "Spatial2xTime2x3DDownsample",
            "",
        ],
        "encoder_temporal_downsample": ["", "", "", ""],
        "decoder_spatial_upsample": [
            "",
            "SpatialUpsample2x",
            "Spatial2xTime2x3DUpsample",
            "Spatial2xTime2x3DUpsample",
        ],
        "decoder_temporal_upsample": ["", "", "", ""],
    },
}
"""By version: 1.1 from docs/Train_And_Eval_CausalVideoVAE.md of Open-Sora-Plan v1.1.0, 1.2 from a public printout of
the loaded model, and the defaults of the original class."""
