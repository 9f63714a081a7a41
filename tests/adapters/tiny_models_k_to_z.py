"""Further tiny random transformers: those of diffusers from Kandinsky 6 on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from tests.adapters.expected_models import kinds
from tests.adapters.tiny_models import TEXT, Tiny

Randn = Callable[..., Tensor]


class Masked(Tiny):
    """Wan-Animate 2, with a mask for flex attention: its own is compiled."""

    def build(self) -> Any:
        def plainly(*args: Any, _compile: bool, **kwargs: Any) -> BlockMask:
            return create_block_mask(*args, **kwargs)

        model = super().build()
        with mock.patch("diffusers.models.transformers.transformer_wan_animate_2.create_block_mask", plainly):
            model.block_masks[2, 6] = model.create_mask(2, 6, "cpu")
        return model


class Bare(Tiny):
    """One whose `forward` has no `return_dict`."""

    def __call__(self, seed: int) -> dict[str, Any]:
        given = super().__call__(seed)
        del given["return_dict"]
        return given


def _tiny(
    name: str,
    config: dict[str, Any],
    inputs: Callable[[Randn], dict[str, Any]],
    streams: bool = True,
    of: type[Tiny] = Tiny,
) -> Tiny:
    return of(name, config, inputs, kinds(name), streams)


def _t(value: float = 500.0) -> Tensor:
    return torch.tensor([value])


def _reference(r: Randn) -> Any:
    """Keys and values of twelve tokens, as the pass over the reference leaves them."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache  # not in every version

    cache = WanAnimate2KVCache(1)
    cache.get(0).store(r(1, 12, 2, 12), r(1, 12, 2, 12))
    return cache


def _ids(tokens: int) -> Tensor:
    """Places of tokens, text included, on three axes."""
    return torch.stack([torch.zeros(tokens), torch.arange(tokens), torch.arange(tokens) % 3], dim=-1).float()


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
_FLUX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "in_channels": 4,
    "joint_attention_dim": 6,
    "axes_dims_rope": [4, 4, 8],
}
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


def _flux(r: Randn) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 15, 4),
        "encoder_hidden_states": r(1, TEXT, 6),
        "timestep": _t(0.5),
        "img_ids": _ids(15),
        "txt_ids": _ids(TEXT),
    }


MORE = [
    _tiny(
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
            "timestep": _t(),
            "audio_hidden_states": r(1, 7, 3),
        },
    ),
    _tiny(
        "Krea2Transformer2DModel",
        {
            **_HEADS,
            "num_key_value_heads": 1,
            "in_channels": 4,
            "intermediate_size": 24,
            "timestep_embed_dim": 8,
            "text_hidden_dim": 6,
            "num_text_layers": 2,
            "text_num_attention_heads": 1,
            "text_num_key_value_heads": 1,
            "text_intermediate_size": 8,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (4, 2, 2),
        },
        lambda r: {
            "hidden_states": r(1, 12, 4),
            "encoder_hidden_states": r(1, TEXT, 2, 6),
            "timestep": _t(0.5),
            "position_ids": _ids(TEXT + 12),
        },
    ),
    _tiny(
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
            "timestep": _t(),
            "num_frames": 3,
            "height": 2,
            "width": 4,
            "audio_num_frames": 7,
        },
    ),
    _tiny(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 16, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": 6, "latent_dim": 4},
        lambda r: {
            "hidden_states": r(1, 7, 4),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
            "timestep": _t(0.5),
            "latent_cond": r(1, 7, 4),
        },
    ),
    _tiny("LongCatImageTransformer2DModel", _FLUX, _flux),
    _tiny(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "cross_attention_dim": 6,
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 6),
            "timestep": _t(0.5),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_mask": torch.ones(1, TEXT),
            "image_rotary_emb": torch.polar(torch.ones(4, 4, 4), torch.arange(64.0).reshape(4, 4, 4)),
            "cross_attention_kwargs": {},
        },
    ),
    _tiny(
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
            "timestep": _t(),
            "timestep_indices": torch.zeros(TEXT + 12 + 7, dtype=torch.long),
            "token_tags": torch.tensor([0] * TEXT + [1] * 12 + [2] * 7),
            "position_ids": _ids(TEXT + 12 + 7),
            "text_indices": torch.arange(TEXT),
            "video_indices": torch.arange(TEXT, TEXT + 12),
            "audio_indices": torch.arange(TEXT + 12, TEXT + 12 + 7),
        },
    ),
    _tiny(
        "MiniMaxMusic3RVQDepthDecoder",
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "audio_vocab_size": 8,
            "num_codebooks": 3,
        },
        lambda r: {"inputs_embeds": r(1, 3, 16)},
        of=Bare,
    ),
    _tiny(
        "MiniMaxMusic3Transformer1DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "condition_dim": 6,
            "ff_inner_dim": 24,
            "rotary_dim": 4,
            "fourier_embedding_dim": 8,
        },
        lambda r: {"hidden_states": r(1, 4, 7), "timestep": _t(0.5), "encoder_hidden_states": r(1, 7, 6)},
    ),
    _tiny(
        "MotifVideoTransformer3DModel",
        {
            **_HEADS,
            "num_layers": 1,
            "num_single_layers": 2,
            "mlp_ratio": 2.0,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 6,
            "rope_axes_dim": (4, 2, 2),
        },
        lambda r: {"hidden_states": r(1, 4, 2, 4, 6), "timestep": _t(), "encoder_hidden_states": r(1, TEXT, 6)},
    ),
    _tiny(
        "NucleusMoEImageTransformer2DModel",
        {
            **_HEADS,
            "attention_head_dim": 16,
            "num_key_value_heads": 1,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 6,
            "axes_dims_rope": (8, 4, 4),
            "mlp_ratio": 6.0,
            "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 3,
            "moe_intermediate_dim": 8,
            "capacity_factors": 1.0,
        },
        lambda r: {
            "hidden_states": r(1, 12, 16),
            "img_shapes": [(1, 3, 4)],
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
            "timestep": _t(0.5),
        },
    ),
    _tiny(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "num_layers": 2,
            "pad_token_id": 0,
            "vocab_size": 8,
            "rope_scaling": {"long_factor": [1, 1, 1, 1], "short_factor": [1, 1, 1, 1]},
            "pos_embed_max_size": 4,
            "time_step_dim": 8,
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 6),
            "timestep": _t(0.5),
            "input_ids": torch.arange(TEXT)[None],
            "input_img_latents": [],
            "input_image_sizes": {},
            "attention_mask": torch.ones(1, TEXT + 13, TEXT + 13),
            "position_ids": torch.arange(TEXT + 13)[None],
        },
    ),
    _tiny("OvisImageTransformer2DModel", _FLUX | {"out_channels": 4}, _flux),
    _tiny(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 6,
            "hidden_size": 16,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 2,
            "axes_dim": [4, 4],
        },
        lambda r: {"hidden_states": r(1, 4, 8, 6), "timestep": _t(0.5), "encoder_hidden_states": r(1, TEXT, 6)},
    ),
    _tiny(
        "PriorTransformer",
        {**_HEADS, "embedding_dim": 6, "num_embeddings": TEXT},
        lambda r: {
            "hidden_states": r(1, 6),
            "timestep": _t(),
            "proj_embedding": r(1, 6),
            "encoder_hidden_states": r(1, TEXT, 6),
            "attention_mask": torch.ones(1, TEXT).bool(),
        },
    ),
    _tiny(
        "QwenImage21Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "context_in_dim": 6,
            "mlp_ratio": 2,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 24, 4),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
            "timestep": _t(0.5),
            "img_shapes": [[(1, 4, 6)]],
            "img_mask": torch.tensor([[False] * TEXT + [True] * 6]),  # a slot for four tokens
        },
    ),
    _tiny(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 1,
            "token_dim": 16,
            "nheads": 2,
            "dim_cond": 8,
            "pair_repr_dim": 4,
            "latent_dim": 2,
            "token_type_emb_dim": 2,
            "t_emb_dim": 4,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists", "bond_mask"),
            "tri_mult_c": 4,
            "num_sequence_classes": 3,
        },
        lambda r: {
            "bb_ca": r(1, 7, 3),
            "local_latents": r(1, 7, 2),
            "bb_ca_time": _t(0.5),
            "local_latents_time": _t(0.5),
            "padding_mask": torch.ones(1, 7).bool(),
            "token_type": torch.arange(7)[None],
            "conditioning": {
                "is_in_context_conditioning": torch.zeros(1, 7).bool(),
                "supports_local_latent": torch.ones(1, 7).bool(),
            },
            "recycle_depth": 2,  # every layer runs twice
        },
    ),
    _tiny(
        "SanaWMLTX2RefinerTransformer3DModel",
        _LTX2,
        lambda r: {
            "hidden_states": r(1, 24, 4),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": _t(),
            "video_rotary_emb": (torch.ones(1, 24, 16), torch.zeros(1, 24, 16)),
        },
    ),
    _tiny(
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
    _tiny(
        "StableAudio3DiTModel",
        {
            "io_channels": 4,
            "embed_dim": 32,
            "depth": 2,
            "num_heads": 2,
            "cond_token_dim": 6,
            "global_cond_dim": 6,
            "local_add_cond_dim": 3,
            "timestep_features_dim": 8,
            "ff_mult": 2.0,
            "num_memory_tokens": 2,
        },
        lambda r: {
            "hidden_states": r(1, 4, 7),
            "timestep": _t(0.5),
            "encoder_hidden_states": r(1, TEXT, 6),
            "global_hidden_states": r(1, 6),
            "local_add_cond": r(1, 3, 7),
        },
    ),
    _tiny(
        "StableAudioDiTModel",
        {
            **_HEADS,
            "num_key_value_attention_heads": 1,
            "sample_size": 7,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 6,
            "cross_attention_input_dim": 6,
        },
        lambda r: {
            "hidden_states": r(1, 4, 7),
            "timestep": _t(0.5),
            "encoder_hidden_states": r(1, TEXT, 6),
            "global_hidden_states": r(1, 1, 6),
            "rotary_embedding": (torch.ones(8, 4), torch.zeros(8, 4)),
        },
    ),
    Bare(
        "T5FilmDecoder",
        {"input_dims": 4, "targets_length": 7, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24},
        lambda r: {
            "encodings_and_masks": [(r(1, TEXT, 16), torch.ones(1, TEXT)), (r(1, 3, 16), torch.ones(1, 3))],
            "decoder_input_tokens": r(1, 7, 4),
            "decoder_noise_time": _t(0.5),
        },
        {"decoders.*.layer.0.attention": "spatial", "decoders.*.layer.1.attention": "cross"},
    ),
    _tiny(
        "Transformer2DModel",
        {**_HEADS, "in_channels": 4, "norm_num_groups": 2, "cross_attention_dim": 6},
        lambda r: {"hidden_states": r(1, 4, 5, 3), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t()},
    ),
    _tiny(
        "TransformerTemporalModel",
        {**_HEADS, "in_channels": 4, "norm_num_groups": 2},
        lambda r: {"hidden_states": r(3, 4, 5, 3), "timestep": _t(), "num_frames": 3},
    ),
    _tiny(
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
            "timestep": _t(),
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
    _tiny(
        "WanAnimateTransformer3DModel",
        {
            **_WAN,
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
            "timestep": _t(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_hidden_states_image": r(1, 3, 6),
            "pose_hidden_states": r(1, 4, 2, 4, 6),
            "face_pixel_values": r(1, 3, 5, 8, 8),
        },
    ),
    _tiny(
        "WanVACETransformer3DModel",
        {**_WAN, "vace_layers": [0], "vace_in_channels": 5},
        lambda r: {
            "hidden_states": r(1, 4, 3, 4, 6),
            "timestep": _t(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "control_hidden_states": r(1, 5, 3, 4, 6),
        },
        streams=False,  # a block for control returns two streams of one shape
    ),
]

UNKNOWN_FLOPS = {
    "NucleusMoEImageTransformer2DModel",  # tokens of each expert are counted
    "OmniGenTransformer2DModel",  # the highest position is read
    "QwenImage21Transformer2DModel",  # a mask tells how often tokens are repeated
    "SanaWMTransformer3DModel",  # autocast
    "WanAnimate2Transformer3DModel",  # a cache of keys is an argument; flex attention
}
"""What does not run on the meta device, and what of it."""
