"""Allegro and Open-Sora-Plan 1.2 (diffusers' `AllegroTransformer3DModel`): full attention over space and time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..broadcast.attach import innermost, is_of_class
from ..broadcast.call import Call
from ..broadcast.fusing import is_original
from ..broadcast.stream import ResidualStream
from ..broadcast.turn import Turn
from .fused import FusedAdapter, FusedBlock
from .latte import LatteForward


def handles(model: nn.Module) -> bool:
    """Whether `model` is an Allegro transformer."""
    return any(c.__name__ == "AllegroTransformer3DModel" for c in type(model).__mro__)


class AllegroBlock(FusedBlock):
    """diffusers' `AllegroTransformerBlock`."""

    PARTS = ("attn1", "attn2", "ff")

    def is_stock(self) -> bool:
        """See `FusedBlock.is_stock`."""
        from diffusers.models.attention import FeedForward
        from diffusers.models.transformers.transformer_allegro import AllegroTransformerBlock

        block = self.module
        return (
            is_of_class(getattr(*innermost(block)), block)
            and type(block).forward is AllegroTransformerBlock.forward
            and all(is_original(owner, "forward") for owner in (AllegroTransformerBlock, FeedForward))
        )


class AllegroForward(LatteForward):
    """The `forward` of diffusers' block. Its attention, with rotary embedding and masks, is called as modules."""

    def __call__(  # type: ignore[override]
        self,
        call: Call,
        original: Callable[..., Any],
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        temb: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """The block's output; by diffusers' `forward` for arguments that Allegro never passes."""
        texts = (attention_mask, encoder_hidden_states, encoder_attention_mask, image_rotary_emb)
        if temb is None or hidden_states.ndim != 3:
            return original(hidden_states, encoder_hidden_states, temb, attention_mask, *texts[2:])
        return self.broadcast(call, hidden_states, temb, *texts)

    def attend(
        self,
        stream: ResidualStream,
        y: Tensor,
        gate: Tensor,
        store: Turn | None,
        temb: Tensor,
        mask: Tensor | None,
        *args: Any,
    ) -> None:
        """See `FusedForward.attend`."""
        attn = self.block.module.attn1
        out = attn(y, encoder_hidden_states=None, attention_mask=mask, image_rotary_emb=args[-1])
        stream.add(out, gate, store)

    def attend_text(
        self,
        stream: ResidualStream,
        y: Tensor,
        store: Turn | None,
        temb: Tensor,
        mask: Tensor | None,
        text: Tensor | None,
        text_mask: Tensor | None,
        rope: Any = None,
    ) -> None:
        """See `FusedForward.attend_text`."""
        attn = self.block.module.attn2
        stream.add(attn(y, encoder_hidden_states=text, attention_mask=text_mask, image_rotary_emb=None), None, store)


class AllegroAdapter(FusedAdapter):
    """The adapter of Allegro.

    Args:
        model: a model that `handles` accepts.
    """

    GROUPS = {"transformer_blocks": "spatial"}
    BLOCK = AllegroBlock
    FORWARD = AllegroForward
