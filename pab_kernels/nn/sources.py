"""Reads attention modules of diffusers, torch and timm as parts, and refuses unsupported options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isclose
from typing import Any

from torch import nn

from ..broadcast.fusing import is_plain
from .parts import Layer, Parts, Rows

_INSTEAD = "wrap the module in BroadcastModule instead"
_WITHOUT_EFFECT = (nn.Identity, nn.Dropout)

SELF_PROJECTIONS = {("qkv",): (3,), ("q", "k", "v"): (1, 1, 1)}
"""Names of the projections of timm-like self attention, and how many of q, k and v each computes."""

CROSS_PROJECTIONS = {("q", "kv"): (1, 2), ("q_linear", "kv_linear"): (1, 2), ("q", "k", "v"): (1, 1, 1)}
"""The same for attention to the text."""


def read_parts(module: nn.Module, cross: bool) -> Parts:
    """The parts of an attention module.

    Args:
        module: diffusers' `Attention`, `nn.MultiheadAttention`, or timm-like: projections of the names above, `proj`,
            `num_heads`, and perhaps `q_norm`, `k_norm`, `attn_drop`, `proj_drop`, `scale`.
        cross: whether it attends to the text.

    Raises:
        TypeError: the class of the module is not supported.
        ValueError: an option of the module is not supported.
    """
    if not is_plain(module, type(module)):
        given = f"{type(module).__name__} has hooks or a replaced forward"
        raise ValueError(f"{given}; plain modules are supported: remove them, or {_INSTEAD}")
    parts = _reader(module, cross)(module, cross)
    _refuse_rest(module, parts)
    if not cross and parts.text_channels != parts.channels:
        given = f"{type(module).__name__} takes K and V from {parts.text_channels} channels and Q from {parts.channels}"
        raise ValueError(f"{given}; self attention with one input is supported: use PABCrossAttention")
    return parts


def _reader(module: nn.Module, cross: bool) -> Callable[[Any, bool], Parts]:
    if type(module) is nn.MultiheadAttention:
        return _torch_parts
    if (type(module).__module__, type(module).__name__) == ("diffusers.models.attention_processor", "Attention"):
        return _diffusers_parts
    has_heads = isinstance(getattr(module, "num_heads", None), int)
    if has_heads and _projections(module, cross) and _modules(module, "proj"):
        return _timm_parts
    known = " or ".join(", ".join(names) for names in (CROSS_PROJECTIONS if cross else SELF_PROJECTIONS))
    supported = f"diffusers' Attention, nn.MultiheadAttention, and modules with num_heads, proj and {known}"
    raise TypeError(f"got {type(module).__name__}; {supported} are supported: {_INSTEAD}")


def _diffusers_parts(module: Any, cross: bool) -> Parts:
    inner = module.inner_dim
    processor = type(module.processor).__name__
    unsupported = {
        f"processor {processor}": processor not in ("AttnProcessor2_0", "AttnProcessor"),
        f"qk_norm with {processor}, which ignores it": processor == "AttnProcessor" and module.norm_q is not None,
        "residual_connection": module.residual_connection,
        f"rescale_output_factor {module.rescale_output_factor}": module.rescale_output_factor != 1,
        "is_causal": module.is_causal,
        f"kv_heads, {module.inner_kv_dim} channels of K and V to {inner} of Q": module.inner_kv_dim != inner,
        "pre_only, no output projection": module.to_out is None,
    }
    for option, given in unsupported.items():
        if given:
            raise ValueError(f"got diffusers' Attention with {option}; plain attention is supported: {_INSTEAD}")
    return Parts(
        channels=module.query_dim,
        text_channels=module.cross_attention_dim,
        heads=module.heads,
        head_dim=inner // module.heads,
        projections=tuple(map(Layer, ("to_q", "to_k", "to_v"))),
        out=tuple(f"to_out.{i}" for i in range(len(module.to_out))),
        q_norm=None if module.norm_q is None else "norm_q",
        k_norm=None if module.norm_k is None else "norm_k",
        softmax_scale=_scale(module.scale, inner // module.heads) if processor == "AttnProcessor" else None,
    )


def _torch_parts(module: nn.MultiheadAttention, cross: bool) -> Parts:
    inner = module.embed_dim
    if module.add_zero_attn or module.kdim != module.vdim:
        option = "add_zero_attn" if module.add_zero_attn else f"kdim {module.kdim} and vdim {module.vdim}"
        supported = "plain attention to one tensor is supported"
        raise ValueError(f"got nn.MultiheadAttention with {option}; {supported}: {_INSTEAD}")

    def rows(i: int, count: int) -> Rows:
        """The rows of `count` of q, k and v, from the i-th on."""
        here = (i * inner, (i + count) * inner)
        if module.in_proj_weight is not None:
            return Rows("in_proj_weight", "in_proj_bias", here, here, count)
        return Rows(f"{'qkv'[i]}_proj_weight", "in_proj_bias", (0, inner), here)

    packed = module.in_proj_weight is not None
    counts = ((1, 2) if cross else (3,)) if packed else (1, 1, 1)
    return Parts(
        channels=inner,
        text_channels=module.kdim,
        heads=module.num_heads,
        head_dim=module.head_dim,
        projections=tuple(rows(sum(counts[:i]), n) for i, n in enumerate(counts)),
        out=("out_proj",),
        dropout=module.dropout,
    )


def _timm_parts(module: Any, cross: bool) -> Parts:
    names, counts = _projections(module, cross)[0]
    for name in names:
        layer = getattr(module, name)
        if not all(isinstance(getattr(layer, width, None), int) for width in ("in_features", "out_features")):
            raise ValueError(f"{name} is a {type(layer).__name__}; a linear layer is supported: {_INSTEAD}")
    q, last = getattr(module, names[0]), getattr(module, names[-1])
    head_dim = q.out_features // counts[0] // module.num_heads
    for name, count in zip(names, counts, strict=True):
        given, wanted = getattr(module, name).out_features, count * module.num_heads * head_dim
        if given != wanted:
            supported = f"{wanted} are supported, as many heads of K and V as of Q"
            raise ValueError(f"{name} has {given} output channels; {supported}: {_INSTEAD}")
    scale = getattr(module, "scale", None)
    fused = getattr(module, "fused_attn", False)  # timm then calls F.scaled_dot_product_attention without the scale
    dropout = getattr(module, "attn_drop", None)
    return Parts(
        channels=q.in_features,
        text_channels=last.in_features,
        heads=module.num_heads,
        head_dim=head_dim,
        projections=tuple(map(Layer, names, counts)),
        out=("proj", *_modules(module, "proj_drop")),
        q_norm=next(iter(_modules(module, "q_norm")), None),
        k_norm=next(iter(_modules(module, "k_norm")), None),
        softmax_scale=None if scale is None or fused else _scale(float(scale), head_dim),
        dropout=dropout.p if isinstance(dropout, nn.Dropout) else 0.0,
    )


def _projections(module: nn.Module, cross: bool) -> list[tuple[tuple[str, ...], tuple[int, ...]]]:
    known = CROSS_PROJECTIONS if cross else SELF_PROJECTIONS
    return [(names, counts) for names, counts in known.items() if len(_modules(module, *names)) == len(names)]


def _modules(module: nn.Module, *names: str) -> Sequence[str]:
    """The names that are child modules."""
    return [name for name in names if isinstance(getattr(module, name, None), nn.Module)]


def _scale(scale: float, head_dim: int) -> float | None:
    return None if isclose(scale, head_dim**-0.5) else scale


def _refuse_rest(module: nn.Module, parts: Parts) -> None:
    """Raise if children or tensors are not among the parts, since their effect would be lost."""
    children = [(name, child) for name, child in module.named_children() if not isinstance(child, _WITHOUT_EFFECT)]
    tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    kinds = {name: type(child).__name__ for name, child in children} | {name: "tensor" for name, _ in tensors}
    rest = ", ".join(f"{name} ({kind})" for name, kind in kinds.items() if name not in parts.roots)
    if rest:
        supported = "projections and norms of Q and K are supported"
        raise ValueError(f"got {type(module).__name__} with {rest}; {supported}: {_INSTEAD}")
