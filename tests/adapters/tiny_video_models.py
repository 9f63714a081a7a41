"""Further tiny random transformers for videos, and inputs for them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tests.adapters.tiny_models import FAMILIES, TEXT, Tiny
from tests.adapters.tiny_parts import HEADS, WAN, Randn, ids, timestep, tiny


def _framepack(r: Randn) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 4, 2, 4, 6),
        "timestep": timestep(),
        "encoder_hidden_states": r(1, TEXT, 6),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "pooled_projections": r(1, 8),
        "guidance": timestep(6000.0),
        "image_embeds": r(1, 3, 8),
        "indices_latents": torch.arange(4, 6),
        "latents_clean": r(1, 4, 1, 4, 6),
        "indices_latents_clean": torch.tensor([3]),
        "latents_history_2x": r(1, 4, 2, 4, 6),
        "indices_latents_history_2x": torch.tensor([1, 2]),
        "latents_history_4x": r(1, 4, 1, 4, 6),
        "indices_latents_history_4x": torch.tensor([0]),
    }


def _cosmos3(r: Randn) -> dict[str, Any]:
    shape, tokens = (2, 2, 3), 2 * 2 * 3
    return {
        "input_ids": torch.arange(TEXT),
        "text_indexes": torch.arange(TEXT),
        "position_ids": torch.arange(TEXT + tokens).expand(3, -1),
        "und_len": TEXT,
        "sequence_length": TEXT + tokens,
        "vision_tokens": [r(1, 4, 2, 4, 6)],
        "vision_token_shapes": [shape],
        "vision_sequence_indexes": torch.arange(TEXT, TEXT + tokens),
        "vision_mse_loss_indexes": torch.arange(TEXT, TEXT + tokens),
        "vision_timesteps": timestep().expand(tokens),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


class Masked(Tiny):
    """Wan-Animate 2, with a mask for flex attention: its own is compiled."""

    def build(self) -> Any:
        def plainly(*args: Any, _compile: bool, **kwargs: Any) -> BlockMask:
            return create_block_mask(*args, **kwargs)

        model = super().build()
        with mock.patch("diffusers.models.transformers.transformer_wan_animate_2.create_block_mask", plainly):
            model.block_masks[2, 6] = model.create_mask(2, 6, "cpu")
        return model


def _reference(r: Randn) -> Any:
    """Keys and values of twelve tokens, as the pass over the reference leaves them."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache  # not in every version

    cache = WanAnimate2KVCache(1)
    cache.get(0).store(r(1, 12, 2, 12), r(1, 12, 2, 12))
    return cache


_LTX2 = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 16,
    "audio_in_channels": 3,
    "audio_out_channels": 3,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "caption_channels": 6,
}


VIDEOS = [
    tiny(
        "AnyFlowFARTransformer3DModel",
        {**WAN, "num_layers": 1, "chunk_partition": (1, 2)},
        lambda r: {
            "hidden_states": r(1, 3, 4, 4, 8),
            "timestep": timestep().expand(1, 3),
            "r_timestep": timestep(250.0).expand(1, 3),
            "encoder_hidden_states": r(1, TEXT, 6),
            "chunk_partition": [1, 2],
        },
    ),
    tiny(
        "AnyFlowTransformer3DModel",
        WAN,
        lambda r: {
            "hidden_states": r(1, 3, 4, 4, 6),
            "timestep": timestep().expand(1, 3),
            "r_timestep": timestep(250.0).expand(1, 3),
            "encoder_hidden_states": r(1, TEXT, 6),
        },
    ),
    tiny(
        "ChronoEditTransformer3DModel",
        WAN,
        lambda r: {"hidden_states": r(1, 4, 3, 4, 6), "encoder_hidden_states": r(1, TEXT, 6), "timestep": timestep()},
    ),
    tiny(
        "ConsisIDTransformer3DModel",
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 4,
            "text_embed_dim": 6,
            "sample_width": 6,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
            "is_train_face": True,
            "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 4,
            "LFE_vit_dim": 6,
            "LFE_depth": 1,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 3,
            "LFE_output_dim": 10,
            "LFE_ff_mult": 1,
            "LFE_num_scale": 1,
        },
        lambda r: {
            "hidden_states": r(1, 2, 4, 8, 6),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": timestep(),
            "id_cond": r(1, 4),
            "id_vit_hidden": [r(1, 2, 6)],
        },
    ),
    tiny(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 8,
            "hidden_size": 16,
            "intermediate_size": 24,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "vocab_size": 8,
            "rope_axes_dim": (2, 1, 1),
        },
        _cosmos3,
    ),
    tiny(
        "EasyAnimateTransformer3DModel",
        {
            **HEADS,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 8,
            "text_embed_dim": 6,
        },
        lambda r: {"hidden_states": r(1, 4, 3, 4, 6), "timestep": timestep(), "encoder_hidden_states": r(1, TEXT, 6)},
    ),
    tiny(
        "HeliosTransformer3DModel",
        {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        lambda r: {
            "hidden_states": r(1, 4, 2, 4, 6),
            "timestep": timestep(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "indices_hidden_states": torch.arange(7, 9)[None],
            "indices_latents_history_short": torch.tensor([[6]]),
            "indices_latents_history_mid": torch.tensor([[4, 5]]),
            "indices_latents_history_long": torch.arange(4)[None],
            "latents_history_short": r(1, 4, 1, 4, 6),
            "latents_history_mid": r(1, 4, 2, 4, 6),
            "latents_history_long": r(1, 4, 4, 4, 6),
        },
    ),
    tiny(
        "HunyuanVideo15Transformer3DModel",
        {
            "in_channels": 9,  # the pipeline's latents of 4 channels, those of an image, and a mask
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 2.0,
            "text_embed_dim": 6,
            "text_embed_2_dim": 4,
            "image_embed_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 9, 2, 3, 4),
            "timestep": timestep(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_attention_mask": torch.ones(1, TEXT),
            "encoder_hidden_states_2": r(1, 2, 4),
            "encoder_attention_mask_2": torch.ones(1, 2),
            "image_embeds": torch.zeros(1, 3, 8),
        },
    ),
    tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        next(t.config for t in FAMILIES if t.name == "HunyuanVideoTransformer3DModel")
        | {
            "guidance_embeds": True,
            "has_image_proj": True,
            "image_proj_dim": 8,
            "has_clean_x_embedder": True,
            "patch_size": 2,
        },
        _framepack,
    ),
    tiny(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4,
            "in_text_dim": 6,
            "in_text_dim2": 8,
            "time_dim": 8,
            "out_visual_dim": 4,
            "model_dim": 24,
            "ff_dim": 20,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 2, 4, 6, 4),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": timestep(),
            "pooled_projections": r(1, 8),
            "visual_rope_pos": tuple(torch.arange(n) for n in (2, 2, 3)),
            "text_rope_pos": torch.arange(TEXT),
        },
    ),
    tiny(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 8,
            "model_dim": 32,
            "ff_dim": 20,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 8),
        },
        lambda r: {"hidden_states": r(1, 2, 8, 8, 9), "timestep": timestep()},
    ),
    tiny(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 2,
            "out_visual_dim": 2,
            "in_text_dim": 6,
            "in_text_dim2": 4,
            "time_dim": 8,
            "model_dim": 16,
            "ff_dim": 24,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": (4, 2, 2),
            "in_audio_dim": 3,
            "out_audio_dim": 3,
            "model_dim_a": 8,
            "ff_dim_a": 12,
        },
        lambda r: {
            "hidden_states": r(1, 2, 4, 6, 5),
            "encoder_hidden_states": r(1, TEXT, 6),
            "pooled_projections": r(1, 4),
            "timestep": timestep(),
            "audio_hidden_states": r(1, 7, 3),
        },
    ),
    tiny(
        "LTX2VideoTransformer3DModel",
        {
            **_LTX2,
            # as published; the other one has the shape of the video, and rules for blocks are refused
            "rope_type": "split",
        },
        lambda r: {
            "hidden_states": r(1, 24, 4),
            "audio_hidden_states": r(1, 7, 3),
            "encoder_hidden_states": r(1, TEXT, 6),
            "audio_encoder_hidden_states": r(1, TEXT, 6),
            "timestep": timestep(),
            "num_frames": 3,
            "height": 2,
            "width": 4,
            "audio_num_frames": 7,
        },
    ),
    tiny(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "hidden_size": 12,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 16,
            "in_channels": 2,
            "audio_in_channels": 3,
            "text_dim": 6,
            "freq_dim": 8,
            "time_embed_hidden_dim": 8,
            "time_embed_dim": 4,
            "rope_freq_dim": 1,
        },
        lambda r: {
            "hidden_states": r(1, 12, 8),
            "audio_hidden_states": r(1, 7, 3),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": timestep(),
            "timestep_indices": torch.zeros(TEXT + 12 + 7, dtype=torch.long),
            "token_tags": torch.tensor([0] * TEXT + [1] * 12 + [2] * 7),
            "position_ids": ids(TEXT + 12 + 7),
            "text_indices": torch.arange(TEXT),
            "video_indices": torch.arange(TEXT, TEXT + 12),
            "audio_indices": torch.arange(TEXT + 12, TEXT + 12 + 7),
        },
    ),
    tiny(
        "MotifVideoTransformer3DModel",
        {
            **HEADS,
            "num_layers": 1,
            "num_single_layers": 2,
            "mlp_ratio": 2.0,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 6,
            "rope_axes_dim": (4, 2, 2),
        },
        lambda r: {"hidden_states": r(1, 4, 2, 4, 6), "timestep": timestep(), "encoder_hidden_states": r(1, TEXT, 6)},
    ),
    tiny(
        "SanaWMLTX2RefinerTransformer3DModel",
        _LTX2,
        lambda r: {
            "hidden_states": r(1, 24, 4),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": timestep(),
            "video_rotary_emb": (torch.ones(1, 24, 16), torch.zeros(1, 24, 16)),
        },
    ),
    tiny(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "caption_channels": 6,
            "mlp_ratio": 2.0,
            "chunk_plucker_channels": 3,
            "chunk_plucker_post_attn_blocks": 1,
        },
        lambda r: {
            "hidden_states": r(1, 4, 3, 4, 2),
            "timestep": torch.full((1, 1, 3), 500.0),
            "encoder_hidden_states": r(1, 1, TEXT, 6),
            "encoder_attention_mask": torch.ones(1, TEXT),
            "camera_conditions": torch.cat([torch.eye(4).flatten(), torch.tensor([4.0, 4.0, 1.0, 2.0])]).expand(
                1, 3, 20
            ),
            "chunk_plucker": r(1, 3, 3, 4, 2),
        },
    ),
    tiny(
        "TransformerTemporalModel",
        {**HEADS, "in_channels": 4, "norm_num_groups": 2},
        lambda r: {"hidden_states": r(3, 4, 5, 3), "timestep": timestep(), "num_frames": 3},
    ),
    tiny(
        "WanAnimate2Transformer3DModel",
        {
            "text_len": TEXT,
            "in_dim": 6,
            "dim": 24,
            "ffn_dim": 32,
            "freq_dim": 16,
            "text_dim": 6,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 1,
            "use_img_emb": False,  # of 1280 channels
        },
        lambda r: {
            "hidden_states": [r(4, 3, 4, 6)],
            "timestep": timestep(),
            "encoder_hidden_states": [r(TEXT, 6)],
            "condition_latents": [r(2, 3, 4, 6)],
            "kv_cache": _reference(r),
            "kv_cache_mode": "cached",
            "seq_len": 18,
            "reference_grid_sizes": torch.tensor([[2, 2, 3]]),
            "origin_len": 5,
            "origin_area": [48, 32],
        },
        of=Masked,
    ),
    tiny(
        "WanAnimateTransformer3DModel",
        {
            **WAN,
            "num_layers": 1,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 6,
            "added_kv_proj_dim": 24,
            "motion_encoder_channel_sizes": {"4": 2, "8": 2},
            "motion_encoder_size": 8,
            "motion_style_dim": 4,
            "motion_dim": 2,
            "motion_encoder_dim": 4,
            "face_encoder_hidden_dim": 4,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1,
        },
        lambda r: {
            "hidden_states": r(1, 12, 3, 4, 6),
            "timestep": timestep(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_hidden_states_image": r(1, 3, 6),
            "pose_hidden_states": r(1, 4, 2, 4, 6),
            "face_pixel_values": r(1, 3, 5, 8, 8),
        },
    ),
    tiny(
        "WanVACETransformer3DModel",
        {**WAN, "vace_layers": [0], "vace_in_channels": 5},
        lambda r: {
            "hidden_states": r(1, 4, 3, 4, 6),
            "timestep": timestep(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "control_hidden_states": r(1, 5, 3, 4, 6),
        },
        streams=False,  # a block for control returns two streams of one shape
    ),
]
