"""Latte (diffusers' `LatteTransformer3DModel`): spatial blocks with cross attention, alternating with temporal blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .. import ops
from ..broadcast.attach import Attached, attach_forward
from ..broadcast.broadcaster import Broadcaster
from ..broadcast.fusing import is_plain
from ..broadcast.generation import Call, Store
from ..broadcast.plan import Sublayer
from ..broadcast.stopwatch import REST
from ..broadcast.stream import ResidualStream
from ..ops.short_attention import MAX_TOKENS


def handles(model: nn.Module) -> bool:
    """Whether `model` is a Latte transformer whose blocks have adaLN-single."""
    return any(c.__name__ == "LatteTransformer3DModel" for c in type(model).__mro__)


class LatteAdapter:
    """Latte's blocks on the residual stream.

    On a reuse the whole sublayer is skipped: norm, modulate, projections, attention, output projection.

    Raises:
        ValueError: the model's norms are not adaLN-single.
    """

    cache_points = ("pre_gate", "post_gate")

    def __init__(self, model: Any) -> None:
        if model.config.norm_type != "ada_norm_single":
            raise ValueError(f"LatteTransformer3DModel with norm_type={model.config.norm_type!r}; supported is 'ada_norm_single'")
        self.model = model
        self.blocks = [
            LatteBlock(block, f"{group}.{i}", i, kind)
            for i, pair in enumerate(zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True))
            for group, kind, block in zip(("transformer_blocks", "temporal_transformer_blocks"), ("spatial", "temporal"), pair, strict=True)
        ]

    @property
    def sublayers(self) -> Sequence[Sublayer]:
        """All sublayers, in the order in which they run."""
        return [s for block in self.blocks for s in block.sublayers]

    def attach(self, broadcaster: Broadcaster) -> Iterator[Attached]:
        """Replace the blocks' `forward`."""
        for block in self.blocks:
            yield attach_forward(block.module, block.forward(broadcaster))


class LatteBlock:
    """One block: its sublayers, and its `forward` under PAB."""

    def __init__(self, module: Any, name: str, layer: int, kind: str) -> None:
        self.module = module
        self.kind = kind
        self.whole = Sublayer(name, "block", layer, "fused")
        self.attention = Sublayer(f"{name}.attn1", kind, layer, "fused", block=name)
        self.cross = None if module.attn2 is None else Sublayer(f"{name}.attn2", "cross", layer, "fused", block=name)
        self.mlp = Sublayer(f"{name}.ff", "mlp", layer, "fused", block=name)
        self.sublayers = [s for s in (self.attention, self.cross, self.mlp, self.whole) if s is not None]

    def forward(self, broadcaster: Broadcaster) -> Any:
        """The stand-in for the block's `forward`; plain where the model is not called under PAB."""

        def forward(
            original: Any,
            hidden_states: torch.Tensor,
            attention_mask: torch.Tensor | None = None,
            encoder_hidden_states: torch.Tensor | None = None,
            encoder_attention_mask: torch.Tensor | None = None,
            timestep: torch.Tensor | None = None,
            cross_attention_kwargs: dict[str, Any] | None = None,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            call = broadcaster.call
            if call is None or timestep is None or cross_attention_kwargs:
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
            turn = call.turn(self.whole, hidden_states)
            stream = ResidualStream(hidden_states, call)
            if turn.slot is not None:
                stream.reuse(turn.slot)
            else:
                self._run(call, stream, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep)
            out = stream.read()
            if turn.store is not None:
                turn.store.put(out - hidden_states)
            call.mark(REST)
            return out

        return forward

    def _run(
        self,
        call: Call,
        stream: ResidualStream,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        text: torch.Tensor | None,
        text_mask: torch.Tensor | None,
        timestep: torch.Tensor,
    ) -> None:
        """Self attention, cross attention, MLP. `x` is the block's input; only its shape, dtype and device are used."""
        block = self.module
        chunks = timestep.reshape(x.shape[0], 6, -1)
        gated_at_reuse = call.generation.config.cache_point == "pre_gate"

        def modulation(i: int) -> torch.Tensor:  # [rows, 1, C]
            return block.scale_shift_table[None, i : i + 1] + chunks[:, i : i + 1]

        turn = call.turn(self.attention, x)
        if turn.slot is not None:
            stream.reuse(turn.slot, modulation(2) if gated_at_reuse else None)
        else:
            y = stream.norm_modulate(block.norm1, modulation(0), modulation(1))
            _attend(stream, block.attn1, y, None, mask, modulation(2), turn.store)

        if self.cross is not None:
            turn = call.turn(self.cross, x)
            if turn.slot is not None:
                stream.reuse(turn.slot)
            else:
                _attend(stream, block.attn2, stream.read(), text, text_mask, None, turn.store)

        turn = call.turn(self.mlp, x)
        if turn.slot is not None:
            stream.reuse(turn.slot, modulation(5) if gated_at_reuse else None)
        else:
            y = stream.norm_modulate(block.norm2, modulation(3), modulation(4))
            _feed_forward(stream, block, y, modulation(5), turn.store)


def _attend(
    stream: ResidualStream,
    attn: Any,
    y: torch.Tensor,
    text: torch.Tensor | None,
    mask: torch.Tensor | None,
    gate: torch.Tensor | None,
    store: Store | None,
) -> None:
    """Add attention of `y` to itself or to `text`; the module is called as it is where anybody has changed it."""
    if mask is not None or not _stock_attention(attn):
        stream.add(attn(y, encoder_hidden_states=text, attention_mask=mask), gate, store)
        return
    q, k, v = attn.to_q(y), *(projection(y if text is None else text) for projection in (attn.to_k, attn.to_v))
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (q, k, v))  # [rows, tokens, H, D]
    operation = ops.short_attention if text is None and y.shape[1] <= MAX_TOKENS else ops.attention
    out, _ = operation(q, k, v)
    stream.project(out.flatten(-2), attn.to_out[0], gate, store)


def _stock_attention(attn: Any) -> bool:
    """Whether the module is diffusers' plain `Attention`: q, k, v projections, scaled dot product, output projection."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    return (
        is_plain(attn, Attention)
        and type(attn.processor) is AttnProcessor2_0
        and all(getattr(attn, n) is None for n in ("norm_q", "norm_k", "spatial_norm", "group_norm"))
        and not attn.norm_cross
        and not attn.residual_connection
        and attn.rescale_output_factor == 1
        and 32 <= attn.inner_dim // attn.heads <= 128
        and _inactive(attn.to_out[1])
    )


def _feed_forward(stream: ResidualStream, block: Any, y: torch.Tensor, gate: torch.Tensor, store: Store | None) -> None:
    """Add the MLP of `y`; its last linear layer is the projection."""
    from diffusers.models.attention import FeedForward, _chunked_feed_forward

    if block._chunk_size is not None:
        stream.add(_chunked_feed_forward(block.ff, y, block._chunk_dim, block._chunk_size), gate, store)
        return
    ff = block.ff
    if not is_plain(ff, FeedForward) or len(ff.net) != 3 or not _inactive(ff.net[1]):
        stream.add(ff(y), gate, store)
        return
    stream.project(ff.net[0](y), ff.net[2], gate, store)


def _inactive(dropout: Any) -> bool:
    return is_plain(dropout, nn.Dropout) and (not dropout.training or dropout.p == 0)
