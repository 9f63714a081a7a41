"""Tiny random transformers of further families, from A to K, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.adapters.expected_models import kinds
from tests.adapters.tiny_models import FAMILIES, TEXT, Tiny

Randn = Callable[..., Tensor]


def _t(value: float = 500.0) -> Tensor:
    return torch.tensor([value])


def _tiny(name: str, config: dict[str, Any], inputs: Callable[[Randn], dict[str, Any]]) -> Tiny:
    return Tiny(name, config, inputs, kinds(name))


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
_WAN = {
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
_FLUX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "in_channels": 4,
    "joint_attention_dim": 6,
    "axes_dims_rope": [4, 4, 8],
}
_JOY = {
    "in_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "text_dim": 6,
    "num_layers": 2,
    "rope_dim_list": [4, 4, 4],
}


def _flux(r: Randn, axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 15, 4),
        "encoder_hidden_states": r(1, TEXT, 6),
        "timestep": _t(0.5),
        "img_ids": torch.zeros(15, axes),
        "txt_ids": torch.zeros(TEXT, axes),
    }


def _framepack(r: Randn) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 4, 2, 4, 6),
        "timestep": _t(),
        "encoder_hidden_states": r(1, TEXT, 6),
        "encoder_attention_mask": torch.ones(1, TEXT),
        "pooled_projections": r(1, 8),
        "guidance": _t(6000.0),
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
        "vision_timesteps": _t().expand(tokens),
        "vision_noisy_frame_indexes": [torch.arange(2)],
    }


MORE = [
    _tiny(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 9,  # the latents' 4 and 5 of their context
            "audio_acoustic_hidden_dim": 4,
            "sliding_window": 2,
            "encoder_hidden_size": 6,
        },
        lambda r: {
            "hidden_states": r(1, 13, 4),
            "timestep": _t(0.5),
            "timestep_r": _t(0.25),
            "encoder_hidden_states": r(1, TEXT, 6),
            "context_latents": r(1, 13, 5),
        },
    ),
    _tiny(
        "AnyFlowFARTransformer3DModel",
        {**_WAN, "num_layers": 1, "chunk_partition": (1, 2)},
        lambda r: {
            "hidden_states": r(1, 3, 4, 4, 8),
            "timestep": _t().expand(1, 3),
            "r_timestep": _t(250.0).expand(1, 3),
            "encoder_hidden_states": r(1, TEXT, 6),
            "chunk_partition": [1, 2],
        },
    ),
    _tiny(
        "AnyFlowTransformer3DModel",
        _WAN,
        lambda r: {
            "hidden_states": r(1, 3, 4, 4, 6),
            "timestep": _t().expand(1, 3),
            "r_timestep": _t(250.0).expand(1, 3),
            "encoder_hidden_states": r(1, TEXT, 6),
        },
    ),
    _tiny(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 24,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "cap_feat_dim": 6,
            "injection_layer_ids": (1,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 2,
            "max_num_gist_tokens": 4,
            "gist_step": 1,
            "gist_min_text_len": 2,
            "gist_max_text_len": 8,
            "axes_dims": (4, 4, 4),
            "axes_lens": (16, 8, 8),
        },
        lambda r: {"hidden_states": r(1, 4, 8, 6), "timestep": _t(0.5), "encoder_hidden_states": r(1, 2, TEXT, 6)},
    ),
    _tiny(
        "BriaFiboTransformer2DModel",
        _FLUX | {"text_encoder_dim": 6},
        lambda r: _flux(r) | {"text_encoder_layers": [r(1, TEXT, 6) for _ in range(2)]},
    ),
    _tiny("BriaTransformer2DModel", _FLUX, _flux),
    _tiny(
        "ChronoEditTransformer3DModel",
        _WAN,
        lambda r: {"hidden_states": r(1, 4, 3, 4, 6), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t()},
    ),
    _tiny(
        "CogView3PlusTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 6,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 8,
            "sample_size": 8,
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 6),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": _t(),
            "original_size": torch.tensor([[64, 48]]),
            "target_size": torch.tensor([[64, 48]]),
            "crop_coords": torch.tensor([[0, 0]]),
        },
    ),
    _tiny(
        "ConsisIDTransformer3DModel",
        {
            **_HEADS,
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
            "timestep": _t(),
            "id_cond": r(1, 4),
            "id_vit_hidden": [r(1, 2, 6)],
        },
    ),
    _tiny(
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
    _tiny(
        "DreamLiteTransformer2DModel",
        {**_HEADS, "in_channels": 4, "norm_num_groups": 2, "cross_attention_dim": 6},
        lambda r: {"hidden_states": r(1, 4, 4, 3), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t()},
    ),
    _tiny(
        "DualTransformer2DModel",
        {**_HEADS, "num_layers": 1, "in_channels": 4, "norm_num_groups": 2, "cross_attention_dim": 6},
        lambda r: {
            "hidden_states": r(1, 4, 4, 3),
            "encoder_hidden_states": r(1, 77 + TEXT, 6),
            "timestep": _t(),
        },  # 77 to the first
    ),
    _tiny(
        "EasyAnimateTransformer3DModel",
        {
            **_HEADS,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 8,
            "text_embed_dim": 6,
        },
        lambda r: {"hidden_states": r(1, 4, 3, 4, 6), "timestep": _t(), "encoder_hidden_states": r(1, TEXT, 6)},
    ),
    _tiny(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 24,
            "num_attention_heads": 2,
            "num_layers": 2,
            "ffn_hidden_size": 20,
            "in_channels": 4,
            "out_channels": 4,
            "text_in_dim": 6,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 4, 4, 3),
            "timestep": _t(),
            "text_bth": r(1, TEXT, 6),
            "text_lens": torch.tensor([TEXT]),
        },
    ),
    _tiny(
        "Flux2Transformer2DModel",
        _FLUX | {"axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
        lambda r: _flux(r, 4) | {"guidance": _t(4.0)},
    ),
    _tiny(
        "Flux3Transformer2DModel",
        _FLUX | {"axes_dims_rope": (4, 4, 4, 4), "cond_in_channels": 4, "timestep_channels": 16},
        lambda r: _flux(r, 4) | {"image_cond_hidden_states": r(1, 7, 4), "image_cond_ids": torch.zeros(7, 4)},
    ),
    _tiny(
        "GlmImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 6,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "prior_vq_quantizer_codebook_size": 8,
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 6),
            "encoder_hidden_states": r(1, TEXT, 6),
            "prior_token_id": torch.arange(12)[None] % 8,
            "prior_token_drop": torch.tensor([False]),
            "timestep": _t(),
            "target_size": torch.tensor([[64, 48]]),
            "crop_coords": torch.tensor([[0, 0]]),
        },
    ),
    _tiny(
        "HeliosTransformer3DModel",
        {k: v for k, v in _WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
        lambda r: {
            "hidden_states": r(1, 4, 2, 4, 6),
            "timestep": _t(),
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
    _tiny(
        "HiDreamImageTransformer2DModel",
        {
            **_HEADS,
            "num_layers": 1,
            "num_single_layers": 1,
            "patch_size": 2,
            "in_channels": 4,
            "caption_channels": [6, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2),
            "max_resolution": (8, 8),
            "llama_layers": (0, 1),
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 8),
            "timesteps": _t(),
            "encoder_hidden_states_t5": r(1, TEXT, 6),
            "encoder_hidden_states_llama3": r(2, 1, TEXT, 4),
            "pooled_embeds": r(1, 8),
        },
    ),
    _tiny(
        "HunyuanImageTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 6,
            "rope_axes_dim": (4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 4, 4, 3),
            "timestep": _t(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_attention_mask": torch.ones(1, TEXT),
        },
    ),
    _tiny(
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
            "timestep": _t(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_attention_mask": torch.ones(1, TEXT),
            "encoder_hidden_states_2": r(1, 2, 4),
            "encoder_attention_mask_2": torch.ones(1, 2),
            "image_embeds": torch.zeros(1, 3, 8),
        },
    ),
    _tiny(
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
    _tiny(
        "Ideogram4Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "intermediate_size": 20,
            "adaln_dim": 8,
            "llm_features_dim": 6,
            "mrope_section": (2, 1, 1),
        },
        lambda r: {
            "hidden_states": r(1, TEXT + 12, 4),
            "timestep": _t(0.5),
            "encoder_hidden_states": r(1, TEXT + 12, 6),
            "position_ids": torch.arange(TEXT + 12)[None, :, None].expand(-1, -1, 3),
            "segment_ids": torch.zeros(1, TEXT + 12, dtype=torch.long),
            "indicator": torch.tensor([[3] * TEXT + [2] * 12]),  # text, image
        },
    ),
    _tiny(
        "JoyImageEditPlusTransformer3DModel",
        _JOY,
        lambda r: {
            "hidden_states": r(1, 18, 4, 1, 2, 2),
            "timestep": _t(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_hidden_states_mask": torch.ones(1, TEXT),
            "shape_list": [[(1, 4, 3), (1, 2, 3)]],
        },
    ),
    _tiny(
        "JoyImageEditTransformer3DModel",
        _JOY,
        lambda r: {"hidden_states": r(1, 4, 2, 4, 6), "timestep": _t(), "encoder_hidden_states": r(1, TEXT, 6)},
    ),
    _tiny(
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
            "timestep": _t(),
            "pooled_projections": r(1, 8),
            "visual_rope_pos": tuple(torch.arange(n) for n in (2, 2, 3)),
            "text_rope_pos": torch.arange(TEXT),
        },
    ),
    _tiny(
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
        lambda r: {"hidden_states": r(1, 2, 8, 8, 9), "timestep": _t()},
    ),
]

UNKNOWN_FLOPS = {
    "AnyFlowFARTransformer3DModel",  # flex attention
    "Cosmos3OmniTransformer",  # autocast
    "ErnieImageTransformer2DModel",  # autocast
    "GlmImageTransformer2DModel",  # indexing by a mask
    "HeliosTransformer3DModel",  # autocast
    "HiDreamImageTransformer2DModel",  # tokens of each expert are counted
    "HunyuanVideo15Transformer3DModel",  # whether there is an image is read from it
    "HunyuanVideoFramepackTransformer3DModel",  # the text is cut to its mask
    "Ideogram4Transformer2DModel",  # autocast
    "Kandinsky6SRTransformer3DModel",  # flex attention
}
"""What does not run on the meta device, and what of it."""
