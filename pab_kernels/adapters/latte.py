"""Latte (diffusers' `LatteTransformer3DModel`): spatial blocks with cross attention alternate with temporal blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..broadcast.attach import Attached, attach_forward, innermost, is_of_class
from ..broadcast.broadcaster import Broadcaster
from ..broadcast.call import Call
from ..broadcast.fusing import has_hooks, is_original, is_plain
from ..broadcast.stream import ResidualStream
from ..broadcast.turn import Turn
from ..ops.short_attention import MAX_TOKENS
from .fused import FusedAdapter, FusedBlock, FusedForward


def handles(model: nn.Module) -> bool:
    """Whether `model` is a Latte transformer."""
    return any(c.__name__ == "LatteTransformer3DModel" for c in type(model).__mro__)


class LatteBlock(FusedBlock):
    """diffusers' `BasicTransformerBlock` with adaLN-single."""

    PARTS = ("attn1", "attn2", "ff")

    def is_stock(self) -> bool:
        """See `FusedBlock.is_stock`."""
        from diffusers.models.attention import BasicTransformerBlock, FeedForward
        from diffusers.models.attention_processor import Attention, AttnProcessor2_0

        block = self.module
        return (
            is_of_class(getattr(*innermost(block)), block)
            and type(block).forward is BasicTransformerBlock.forward
            and block.norm_type == "ada_norm_single"
            and block.pos_embed is None
            and not block.only_cross_attention
            and all(is_original(owner, "forward") for owner in (BasicTransformerBlock, Attention, FeedForward))
            and is_original(AttnProcessor2_0, "__call__")
            and F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention
        )


@dataclass(eq=False)
class _Embedded:
    """Replaces the `forward` of the patch embedding: its output has the strides with which later blocks see the stream.

    Compiled blocks have a graph for each, and without this the first block has one of its own for every pattern.
    """

    broadcaster: Broadcaster

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = original(*args, **kwargs)  # [batch * frames, tokens, C]
        if torch.compiler.is_compiling() or self.broadcaster.call is None or not isinstance(x, torch.Tensor):
            return x
        # Between two blocks the model exchanges frames and tokens: a view of one clip, a copy of several.
        view = self.broadcaster.call.shape[:1] == (1,) and x.ndim == 3 and x.shape[0] > 1
        return x.transpose(0, 1).contiguous().transpose(0, 1) if view else x.contiguous()


class LatteForward(FusedForward):
    """The `forward` of diffusers' block."""

    def __call__(
        self,
        call: Call,
        original: Callable[..., Any],
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The block's output; by diffusers' `forward` for arguments that Latte never passes."""
        if timestep is None or cross_attention_kwargs or hidden_states.ndim != 3:
            return original(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                *args,
                **kwargs,
            )
        texts = (attention_mask, encoder_hidden_states, encoder_attention_mask)
        return self.broadcast(call, hidden_states, timestep, *texts)

    def modulation(self, x: torch.Tensor, timestep: torch.Tensor, *args: Any) -> Sequence[torch.Tensor]:
        """Six of `[rows, 1, C]`."""
        table = self.block.module.scale_shift_table
        return (table[None] + timestep.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)

    def attend(
        self,
        stream: ResidualStream,
        y: torch.Tensor,
        gate: torch.Tensor,
        store: Turn | None,
        timestep: torch.Tensor,
        mask: torch.Tensor | None,
        *args: Any,
    ) -> None:
        """See `FusedForward.attend`."""
        _attend(stream, self.block.module.attn1, self.block.own_forward["attn1"], y, None, mask, gate, store)

    def attend_text(
        self,
        stream: ResidualStream,
        y: torch.Tensor,
        store: Turn | None,
        timestep: torch.Tensor,
        mask: torch.Tensor | None,
        text: torch.Tensor | None,
        text_mask: torch.Tensor | None,
    ) -> None:
        """See `FusedForward.attend_text`."""
        _attend(stream, self.block.module.attn2, self.block.own_forward["attn2"], y, text, text_mask, None, store)

    def feed_forward(self, stream: ResidualStream, y: torch.Tensor, gate: torch.Tensor, store: Turn | None) -> None:
        """See `FusedForward.feed_forward`."""
        _feed_forward(stream, self.block.module, self.block.own_forward["ff"], y, gate, store)


class LatteAdapter(FusedAdapter):
    """The adapter of Latte.

    Args:
        model: a model that `handles` accepts.
    """

    GROUPS = {"transformer_blocks": "spatial", "temporal_transformer_blocks": "temporal"}
    BLOCK = LatteBlock
    FORWARD = LatteForward

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._embedding = getattr(model, "pos_embed", None)

    def attach_beside(self, broadcaster: Broadcaster) -> Iterator[tuple[str, Attached]]:
        """Yield the stand-in of the patch embedding."""
        if isinstance(self._embedding, nn.Module):
            yield "pos_embed", attach_forward(self._embedding, _Embedded(broadcaster))


def _attend(
    stream: ResidualStream,
    attn: Any,
    own_forward: bool,
    y: torch.Tensor,
    text: torch.Tensor | None,
    mask: torch.Tensor | None,
    gate: torch.Tensor | None,
    store: Turn | None,
) -> None:
    """Add attention of `y` to itself or to `text`; a module that is not stock is called."""
    if mask is not None or own_forward or has_hooks(attn) or not stream.call.generation.once(_stock_attention, attn):
        stream.add(attn(y, encoder_hidden_states=text, attention_mask=mask), gate, store)
        return
    q, k, v = attn.to_q(y), *(projection(y if text is None else text) for projection in (attn.to_k, attn.to_v))
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))  # [rows, tokens, H, D]
    operation = ops.short_attention if text is None and y.shape[1] <= MAX_TOKENS else ops.attention
    out, _ = operation(q, k, v)
    stream.project(out.flatten(-2), attn.to_out[0], gate, store)


def _stock_attention(attn: Any) -> bool:
    """Whether the module is diffusers' plain `Attention`: q, k, v, scaled dot product, output projection."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    return (
        type(attn) is Attention
        and type(attn.processor) is AttnProcessor2_0
        and all(getattr(attn, n) is None for n in ("norm_q", "norm_k", "spatial_norm", "group_norm"))
        and not attn.norm_cross
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and 32 <= attn.inner_dim // attn.heads <= 128
        and _inactive(attn.to_out[1])
    )


def _feed_forward(
    stream: ResidualStream, block: Any, own_forward: bool, y: torch.Tensor, gate: torch.Tensor, store: Turn | None
) -> None:
    """Add the MLP of `y`, with its last linear layer as the projection."""
    if getattr(block, "_chunk_size", None) is not None:
        from diffusers.models.attention import _chunked_feed_forward

        stream.add(_chunked_feed_forward(block.ff, y, block._chunk_dim, block._chunk_size), gate, store)
        return
    ff = block.ff
    if own_forward or has_hooks(ff) or not stream.call.generation.once(_stock_mlp, ff):
        stream.add(ff(y), gate, store)
        return
    stream.project(ff.net[0](y), ff.net[2], gate, store)


def _stock_mlp(ff: Any) -> bool:
    """Whether the module is diffusers' plain `FeedForward`: a layer with its activation, dropout, a linear layer."""
    from diffusers.models.attention import FeedForward

    return type(ff) is FeedForward and len(ff.net) == 3 and _inactive(ff.net[1])


def _inactive(dropout: Any) -> bool:
    return is_plain(dropout, nn.Dropout) and (not dropout.training or dropout.p == 0)
