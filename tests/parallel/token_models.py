"""Tiny models with attention over all tokens, whose stream and text two ranks cannot share evenly.

A matrix product of fewer rows than about sixteen, and an activation of a number of elements that vector instructions do
not divide, round otherwise than in a larger one: each rank has more tokens, so that results are equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.adapters.tiny_models import FAMILIES, Tiny
from tests.adapters.tiny_video_models import VIDEOS

STREAM, TEXT = 45, 33
"""Tokens: 3 x 3 x 5 of the stream."""
HEADS = 2

Randn = Callable[..., Tensor]


def tiny(name: str, inputs: Callable[[Randn], dict[str, Any]], **config: Any) -> Tiny:
    family = next(t for t in (*FAMILIES, *VIDEOS) if t.name == f"{name}Model")
    return replace(family, config=family.config | config, inputs=inputs)


def _text_mask(dtype: torch.dtype) -> Tensor:
    return (torch.arange(TEXT) < TEXT - 6)[None].to(dtype)


def _wan(r: Randn) -> dict[str, Any]:
    return {
        "hidden_states": r(2, 4, 3, 6, 10),
        "encoder_hidden_states": r(2, 5, 6),
        "timestep": torch.tensor([500.0, 250.0]),
    }


def _allegro(r: Randn) -> dict[str, Any]:
    frames, rows, columns = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(5)).T[:, None]
    frequencies = tuple((r(places, 8).cos(), r(places, 8).sin()) for places in (3, 3, 5))
    return {
        "hidden_states": r(2, 4, 3, 6, 10),
        "encoder_hidden_states": r(2, 5, 6),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        "image_rotary_emb": (frequencies, (frames, rows, columns)),
    }


def _ltx(r: Randn) -> dict[str, Any]:
    return {
        "hidden_states": r(2, STREAM, 4),
        "encoder_hidden_states": r(2, 5, 6),
        "timestep": torch.tensor([500.0, 500.0]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]),
        "num_frames": 3,
        "height": 3,
        "width": 5,
    }


def _cogvideox(r: Randn) -> dict[str, Any]:
    return {
        "hidden_states": r(2, 3, 4, 6, 10),
        "encoder_hidden_states": r(2, TEXT, 6),
        "timestep": torch.tensor([500, 500]),
    }


def _hunyuan(r: Randn) -> dict[str, Any]:
    return {
        "hidden_states": r(1, 4, 3, 3, 5),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": r(1, TEXT, 6),
        "pooled_projections": r(1, 8),
        "encoder_attention_mask": _text_mask(torch.float32),
    }


def _flux(r: Randn) -> dict[str, Any]:
    return {
        "hidden_states": r(2, STREAM, 4),
        "encoder_hidden_states": r(2, TEXT, 6),
        "pooled_projections": r(2, 8),
        "timestep": torch.tensor([0.5, 0.5]),
        "img_ids": torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, 5, 9))),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _qwen(r: Randn) -> dict[str, Any]:
    return {
        "hidden_states": r(1, STREAM, 16),
        "encoder_hidden_states": r(1, TEXT, 6),
        "encoder_hidden_states_mask": _text_mask(torch.bool),
        "timestep": torch.tensor([0.5]),
        "img_shapes": [(1, 5, 9)],
    }


def _per_token(inputs: Callable[[Randn], dict[str, Any]]) -> Callable[[Randn], dict[str, Any]]:
    """With a timestep for each token, as where the first frame is given."""
    return lambda r: inputs(r) | {"timestep": torch.where(torch.arange(STREAM) < STREAM // 3, 0.0, 500.0).expand(2, -1)}


def _samples(inputs: Callable[[Randn], dict[str, Any]]) -> Callable[[Randn], dict[str, Any]]:
    """With the residuals of a control network."""
    return lambda r: inputs(r) | {"controlnet_block_samples": [r(2, STREAM, 32)]}


MODELS = {
    "Wan": tiny("WanTransformer3D", _wan),
    "Wan, timesteps of tokens": tiny("WanTransformer3D", _per_token(_wan)),
    "Wan, image": tiny(
        "WanTransformer3D",
        lambda r: _wan(r) | {"encoder_hidden_states": r(2, 512, 6), "encoder_hidden_states_image": r(2, 3, 6)},
        image_dim=6,
        added_kv_proj_dim=24,
    ),
    "ChronoEdit": tiny("ChronoEditTransformer3D", _wan),
    "Allegro": tiny("AllegroTransformer3D", _allegro, attention_head_dim=24, cross_attention_dim=48),
    "LTX": tiny("LTXVideoTransformer3D", _ltx),
    "LTX, timesteps of tokens": tiny("LTXVideoTransformer3D", _per_token(_ltx)),
    "CogVideoX": tiny("CogVideoXTransformer3D", _cogvideox, max_text_seq_length=TEXT),
    "CogVideoX, rotary": tiny(
        "CogVideoXTransformer3D",
        lambda r: _cogvideox(r) | {"image_rotary_emb": (r(STREAM, 8).cos(), r(STREAM, 8).sin())},
        max_text_seq_length=TEXT,
        use_rotary_positional_embeddings=True,
    ),
    "HunyuanVideo": tiny("HunyuanVideoTransformer3D", _hunyuan),
    "Flux": tiny("FluxTransformer2D", _flux),
    "Flux, controlled": tiny("FluxTransformer2D", _samples(_flux)),
    "Qwen-Image": tiny("QwenImageTransformer2D", _qwen),
    "Qwen-Image, edited": tiny(
        "QwenImageTransformer2D",
        lambda r: _qwen(r) | {"img_shapes": [[(1, 5, 5), (1, 4, 5)]], "encoder_hidden_states_mask": None},
        zero_cond_t=True,
    ),
}
JOINT = ("CogVideoX", "HunyuanVideo", "Flux", "Qwen-Image")
"""The first words of those whose self attention is over text too."""


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    return MODELS[name].build().to(dtype)


def arguments(name: str, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    given: dict[str, Any] = pytree.tree_map(cast, MODELS[name](seed))
    return given
