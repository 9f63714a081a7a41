"""Tiny random transformers of many families, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models import transformers
from torch import Tensor, nn

TEXT = 5
"""Tokens of the prompt: a number that no model below has of anything else."""


@dataclass(frozen=True)
class Tiny:
    """One family.

    Args:
        name: of its class in diffusers.
        config: of the class.
        inputs: what a call takes, by the seed.
        kinds: the kind of every sublayer but blocks, by its name with * for numbers, or without numbers.
        streams: whether a block returns its streams, so that rules for blocks can be used.
    """

    name: str
    config: dict[str, Any]
    inputs: Callable[[Callable[..., Tensor]], dict[str, Any]]
    kinds: dict[str, str]
    streams: bool = True

    def build(self) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.name)(**self.config)
            for p in model.parameters():  # some start as zeros, and would hide what is computed
                if p.ndim:
                    nn.init.normal_(p, std=0.2)
        return model.eval().requires_grad_(False)

    def __call__(self, seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        return self.inputs(lambda *shape: torch.randn(*shape, generator=g)) | {"return_dict": False}


def _t(value: float = 500.0) -> Tensor:
    return torch.tensor([value])


_DIFFUSERS = {"attn1": "spatial", "attn2": "cross", "ff": "mlp"}


def _in(blocks: str, **kinds: str) -> dict[str, str]:
    return {f"{blocks}.*.{name}": kind for name, kind in kinds.items()}


_JOINT = _in("transformer_blocks", attn="spatial", ff="mlp", ff_context="mlp")
_SINGLE = _in("single_transformer_blocks", attn="spatial")
_WAN = _in("blocks", attn1="spatial", attn2="cross", ffn="mlp")
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}

FAMILIES = [
    Tiny(
        "CogVideoXTransformer3DModel",
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
        },
        lambda r: {"hidden_states": r(1, 2, 4, 8, 6), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t()},
        _in("transformer_blocks", attn1="spatial", ff="mlp"),
    ),
    Tiny(
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 6,
            "freq_dim": 16,
            "ffn_dim": 20,
            "rope_max_seq_len": 16,
        },
        lambda r: {"hidden_states": r(1, 4, 3, 4, 6), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t()},
        _WAN,
    ),
    Tiny(
        "SkyReelsV2Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 6,
            "freq_dim": 16,
            "ffn_dim": 20,
            "rope_max_seq_len": 16,
        },
        lambda r: {"hidden_states": r(1, 4, 3, 4, 6), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t()},
        _WAN,
    ),
    Tiny(
        "HunyuanVideoTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 10,
            "num_layers": 1,
            "num_single_layers": 2,
            "num_refiner_layers": 1,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 1,
            "guidance_embeds": False,
            "text_embed_dim": 6,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 4, 2, 3, 4),
            "timestep": _t(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "pooled_projections": r(1, 8),
            "encoder_attention_mask": torch.ones(1, TEXT),
        },
        _JOINT | _SINGLE,
    ),
    Tiny(
        "LTXVideoTransformer3DModel",
        {**_HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 16, "caption_channels": 6},
        lambda r: {
            "hidden_states": r(1, 3 * 2 * 4, 4),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": _t(),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
            "num_frames": 3,
            "height": 2,
            "width": 4,
        },
        _in("transformer_blocks", **_DIFFUSERS),
    ),
    Tiny(
        "FluxTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "in_channels": 4,
            "joint_attention_dim": 6,
            "pooled_projection_dim": 8,
            "axes_dims_rope": [4, 4, 8],
        },
        lambda r: {
            "hidden_states": r(1, 15, 4),
            "encoder_hidden_states": r(1, TEXT, 6),
            "pooled_projections": r(1, 8),
            "timestep": _t(0.5),
            "img_ids": torch.zeros(15, 3),
            "txt_ids": torch.zeros(TEXT, 3),
        },
        _JOINT | _SINGLE,
    ),
    Tiny(
        "ChromaTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "in_channels": 4,
            "joint_attention_dim": 6,
            "axes_dims_rope": [4, 4, 8],
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        lambda r: {
            "hidden_states": r(1, 15, 4),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": _t(0.5),
            "img_ids": torch.zeros(15, 3),
            "txt_ids": torch.zeros(TEXT, 3),
        },
        _JOINT | _SINGLE,
    ),
    Tiny(
        "SD3Transformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 3,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "caption_projection_dim": 16,
            "joint_attention_dim": 6,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 8,
            "dual_attention_layers": (0,),
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 6),
            "encoder_hidden_states": r(1, TEXT, 6),
            "pooled_projections": r(1, 8),
            "timestep": _t(),
        },
        _JOINT | _in("transformer_blocks", attn2="spatial"),
    ),
    Tiny(
        "PixArtTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 16,
            "caption_channels": 6,
            "use_additional_conditions": False,
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 8),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": _t(),
            "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
        },
        _in("transformer_blocks", **_DIFFUSERS),
    ),
    Tiny(
        "MochiTransformer3DModel",
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "pooled_projection_dim": 8,
            "text_embed_dim": 16,  # eight heads pool it
            "time_embed_dim": 4,
            "max_sequence_length": TEXT,
        },
        lambda r: {
            "hidden_states": r(1, 4, 3, 4, 6),
            "encoder_hidden_states": r(1, TEXT, 16),
            "timestep": _t(),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
        },
        _in("transformer_blocks", attn1="spatial", ff="mlp", ff_context="mlp"),
    ),
    Tiny(
        "AllegroTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 16,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 3,
            "caption_channels": 6,
        },
        lambda r: {"hidden_states": r(1, 4, 3, 8, 8), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t()},
        _in("transformer_blocks", **_DIFFUSERS),
    ),
    Tiny(
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 4,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "cross_attention_dim": 6,
            "cross_attention_dim_t5": 8,
            "pooled_projection_dim": 4,
            "hidden_size": 16,
            "text_len": 2,
            "text_len_t5": 3,
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 8),
            "timestep": _t(),
            "encoder_hidden_states": r(1, 2, 6),
            "text_embedding_mask": torch.ones(1, 2),
            "encoder_hidden_states_t5": r(1, 3, 8),
            "text_embedding_mask_t5": torch.ones(1, 3),
            "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]),
            "style": torch.zeros(1, dtype=torch.long),
            "image_rotary_emb": [torch.ones(1, 8), torch.zeros(1, 8)],
        },
        _in("blocks", **_DIFFUSERS),
    ),
    Tiny(
        "AuraFlowTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "caption_projection_dim": 16,
            "joint_attention_dim": 6,
            "pos_embed_max_size": 16,
        },
        lambda r: {"hidden_states": r(1, 4, 8, 8), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t(0.5)},
        _in("joint_transformer_blocks", attn="spatial", ff="mlp", ff_context="mlp")
        | _in("single_transformer_blocks", attn="spatial", ff="mlp"),
    ),
    Tiny(
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "patch_size": 1,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 6,
            "sample_size": 4,
        },
        lambda r: {"hidden_states": r(1, 4, 4, 3), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t()},
        _in("transformer_blocks", **_DIFFUSERS),
    ),
    Tiny(
        "SanaVideoTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 6,
            "sample_size": 4,
            "rope_max_seq_len": 16,
        },
        lambda r: {"hidden_states": r(1, 4, 3, 4, 6), "encoder_hidden_states": r(1, TEXT, 6), "timestep": _t()},
        _in("transformer_blocks", **_DIFFUSERS),
    ),
    Tiny(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 6,
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 6),
            "timestep": _t(0.5),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_attention_mask": torch.ones(1, TEXT).bool(),
        },
        _in("layers", attn="spatial", feed_forward="mlp"),
    ),
    Tiny(
        "CogView4Transformer2DModel",
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 6,
            "time_embed_dim": 8,
            "condition_dim": 4,
        },
        lambda r: {
            "hidden_states": r(1, 4, 8, 6),
            "encoder_hidden_states": r(1, TEXT, 6),
            "timestep": _t(),
            "original_size": torch.tensor([[64, 48]]),
            "target_size": torch.tensor([[64, 48]]),
            "crop_coords": torch.tensor([[0, 0]]),
        },
        _in("transformer_blocks", attn1="spatial", ff="mlp"),
    ),
    Tiny(
        "QwenImageTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "in_channels": 16,
            "out_channels": 4,
            "joint_attention_dim": 6,
            "axes_dims_rope": (8, 4, 4),
        },
        lambda r: {
            "hidden_states": r(1, 12, 16),
            "encoder_hidden_states": r(1, TEXT, 6),
            "encoder_hidden_states_mask": torch.ones(1, TEXT, dtype=torch.bool),
            "timestep": _t(0.5),
            "img_shapes": [(1, 3, 4)],
        },
        _in("transformer_blocks", attn="spatial", img_mlp="mlp", txt_mlp="mlp"),
    ),
    Tiny(
        "CosmosTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "mlp_ratio": 2,
            "text_embed_dim": 6,
            "adaln_lora_dim": 4,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,  # resizing it needs torchvision
        },
        lambda r: {
            "hidden_states": r(1, 4, 3, 4, 6),
            "timestep": _t(),
            "encoder_hidden_states": r(1, TEXT, 6),
            "attention_mask": torch.ones(1, TEXT),
            "fps": 30,
        },
        _in("transformer_blocks", **_DIFFUSERS),
    ),
    Tiny(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 1,
            "n_kv_heads": 1,
            "cap_feat_dim": 6,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        lambda r: {"x": [r(4, 1, 8, 6)], "t": _t(0.5), "cap_feats": [r(TEXT, 6)]},
        _in("layers", attention="spatial", feed_forward="mlp"),
    ),
    Tiny(
        "DiTTransformer2DModel",
        {**_HEADS, "in_channels": 4, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 8},
        lambda r: {"hidden_states": r(1, 4, 8, 8), "timestep": torch.tensor([5]), "class_labels": torch.tensor([3])},
        _in("transformer_blocks", attn1="spatial", ff="mlp"),
    ),
]
