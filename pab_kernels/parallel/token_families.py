"""Where the tokens of models with attention over all tokens are split and gathered.

It is written like the plans of diffusers (`_cp_plan`), and differs from them in two things. The stream is split before
the first block, not by it, so that rules for whole blocks see the same tokens before and after a block, and compiled
blocks share their graphs. Text is split only where it takes part in self attention; cross attention has all of it on
each rank, and sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .tokens import Tokens

STREAM, TEXT = "stream", "text"


@dataclass(frozen=True)
class TokenFamily:
    """How a family of models is split.

    Args:
        names: of the classes, or of ones that they inherit from.
        order: of what self attention is over.
        arguments: of the model, by their names; each function returns this rank's part.
        modules: replacements of their `forward`, by names; each is called with the layout, the original, and the
            arguments.
        refusal: what of a model cannot be split; None if all can.
    """

    names: tuple[str, ...]
    order: tuple[str, ...]
    arguments: Mapping[str, Callable[[Tokens, Any], Any]] = field(default_factory=dict)
    modules: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    refusal: Callable[[nn.Module], str | None] = lambda model: None


def token_family_of(model: nn.Module) -> TokenFamily | None:
    """The family of a model; None if it is none of these."""
    names = {c.__name__ for c in type(model).__mro__}
    return next((family for family in TOKEN_FAMILIES if names & set(family.names)), None)


def _along(dim: int, of: str | None = None, ndim: int | None = None) -> Callable[[Tokens, Any], Any]:
    """Splits a value in a dimension; `ndim` only if it is a tensor of so many dimensions."""

    def split(tokens: Tokens, value: Any) -> Any:
        other = value is None or (ndim is not None and getattr(value, "ndim", None) != ndim)
        return value if other else tokens.cut(value, dim, of)

    return split


def _output(dim: int, of: str | None = None) -> Callable[..., Any]:
    """Splits what a module returns."""

    def split(tokens: Tokens, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return tokens.cut(original(*args, **kwargs), dim, of)

    return split


def _gathered(tokens: Tokens, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Gathers what a module returns."""
    return tokens.gather(original(*args, **kwargs))


# Wan


def _wan_patches(tokens: Tokens, original: Callable[..., Any], x: Tensor) -> Tensor:
    """The patches `[B, C, T, H, W]` as `[B, C, N]`, which the model would flatten to that."""
    found: Tensor = tokens.cut(original(x).flatten(2), -1, STREAM)
    return found


# Allegro


def _allegro_patches(tokens: Tokens, original: Callable[..., Any], x: Tensor) -> Tensor:
    """The patches `[B T, H W, C]` as `[B, N, C]`, which the model would unflatten to that."""
    batch = tokens.whole["hidden_states"].shape[0]
    found: Tensor = tokens.cut(original(x).unflatten(0, (batch, -1)).flatten(1, 2), 1, STREAM)
    return found


def _allegro_places(tokens: Tokens, value: Any) -> Any:
    """Frequencies by place, and the places `[1, N]` of the tokens."""
    if value is None:
        return None
    frequencies, places = value
    return frequencies, tokens.cut(places, -1)


# CogVideoX


def _cogvideox_patches(tokens: Tokens, original: Callable[..., Any], text: Tensor, video: Tensor) -> Tensor:
    """Text and patches `[B, L + N, C]`, from the whole text: positions are added to both."""
    whole = tokens.whole["encoder_hidden_states"]
    text, stream = original(whole, video).tensor_split([whole.shape[1]], 1)
    return torch.cat([tokens.cut(text, 1), tokens.cut(stream, 1, STREAM)], 1)


# HunyuanVideo


def _hunyuan_text(tokens: Tokens, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    """The text, which is refined as a whole."""
    found: Tensor = tokens.cut(original(*args, **kwargs), 1, TEXT)
    mask = tokens.whole["encoder_attention_mask"]
    seen = mask.sum(1, dtype=torch.int)[:, None]
    tokens.mask_text(torch.arange(mask.shape[1], device=mask.device) < seen)
    return found


def _hunyuan_refusal(model: nn.Module) -> str | None:
    condition = getattr(model.config, "image_condition_type", None)
    return "image_condition_type='token_replace'" if condition == "token_replace" else None


# Qwen-Image


def _qwen_positions(tokens: Tokens, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Positions of the stream and of the text, as many as there are on all ranks."""
    text, mask = tokens.whole["encoder_hidden_states"], tokens.whole.get("encoder_hidden_states_mask")
    if mask is not None:
        tokens.mask_text(mask.bool())
    if "max_txt_seq_len" in kwargs:
        kwargs |= {"max_txt_seq_len": text.shape[1]}
    return tokens.cut(original(*args, **kwargs), 0)


def _qwen_block(
    tokens: Tokens, original: Callable[..., Any], *args: Any, modulate_index: Tensor | None = None, **kwargs: Any
) -> Any:
    """A block; `modulate_index` `[B, N]` is the whole stream's."""
    if modulate_index is not None:
        modulate_index = tokens.cut(modulate_index, 1)
    return original(*args, modulate_index=modulate_index, **kwargs)


_FULL, _TEXT_FIRST, _TEXT_LAST = (STREAM,), (TEXT, STREAM), (STREAM, TEXT)

TOKEN_FAMILIES = (
    TokenFamily(
        ("WanTransformer3DModel", "ChronoEditTransformer3DModel"),
        _FULL,
        {"timestep": _along(1, ndim=2)},
        {"rope": _output(1), "patch_embedding": _wan_patches, "proj_out": _gathered},
    ),
    TokenFamily(
        ("AllegroTransformer3DModel",),
        _FULL,
        {"image_rotary_emb": _allegro_places},
        {"pos_embed": _allegro_patches, "proj_out": _gathered},
    ),
    TokenFamily(
        ("LTXVideoTransformer3DModel",),
        _FULL,
        {"hidden_states": _along(1, STREAM), "timestep": _along(1, ndim=2)},
        {"rope": _output(1), "proj_out": _gathered},
    ),
    TokenFamily(
        ("CogVideoXTransformer3DModel",),
        _TEXT_FIRST,
        {"encoder_hidden_states": _along(1, TEXT), "image_rotary_emb": _along(0)},
        {"patch_embed": _cogvideox_patches, "proj_out": _gathered},
    ),
    TokenFamily(
        ("HunyuanVideoTransformer3DModel",),
        _TEXT_LAST,
        {},
        {
            "rope": _output(0),
            "x_embedder": _output(1, STREAM),
            "context_embedder": _hunyuan_text,
            "proj_out": _gathered,
        },
        _hunyuan_refusal,
    ),
    TokenFamily(
        ("FluxTransformer2DModel",),
        _TEXT_FIRST,
        {
            "hidden_states": _along(1, STREAM),
            "encoder_hidden_states": _along(1, TEXT),
            "img_ids": _along(-2),
            "txt_ids": _along(-2),
            "controlnet_block_samples": _along(1),
            "controlnet_single_block_samples": _along(1),
        },
        {"proj_out": _gathered},
    ),
    TokenFamily(
        ("QwenImageTransformer2DModel",),
        _TEXT_FIRST,
        {
            "hidden_states": _along(1, STREAM),
            "encoder_hidden_states": _along(1, TEXT),
            "encoder_hidden_states_mask": _along(1),
            "controlnet_block_samples": _along(1),
        },
        {"pos_embed": _qwen_positions, "transformer_blocks.*": _qwen_block, "proj_out": _gathered},
    ),
)
