"""Latte (diffusers' `LatteTransformer3DModel`): spatial blocks with cross attention alternate with temporal blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..broadcast.attach import Attached, attach_forward, innermost, is_of_class
from ..broadcast.broadcaster import Broadcaster
from ..broadcast.call import Call
from ..broadcast.fusing import has_hooks, is_original, is_plain
from ..broadcast.slots import Extrapolation, Slot
from ..broadcast.stopwatch import REST
from ..broadcast.stream import ResidualStream
from ..broadcast.turn import CurrentTurn, Turn
from ..ops.short_attention import MAX_TOKENS
from ..rules.plan import Sublayer
from .generic import GenericAdapter

logger = logging.getLogger("pab_kernels")

_GROUPS = {"transformer_blocks": "spatial", "temporal_transformer_blocks": "temporal"}
"""The kind of the self attention in each list of blocks."""


def handles(model: nn.Module) -> bool:
    """Whether `model` is a Latte transformer."""
    return any(c.__name__ == "LatteTransformer3DModel" for c in type(model).__mro__)


class LatteAdapter(GenericAdapter):
    """Runs the blocks that are exactly diffusers' (`LatteBlock.is_stock`) on the residual stream.

    A reuse skips the whole sublayer: norm, modulate, projections, attention, output projection. Every other block, and
    any sublayer that a subclass of the model has outside of its blocks, is run by the generic adapter. Which blocks are
    stock is decided once a generation.

    Args:
        model: a model that `handles` accepts.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        blocks = {
            s.name: module for s, module in self.found if s.kind == "block" and s.name.rpartition(".")[0] in _GROUPS
        }
        numbered = [[name for name in blocks if name.startswith(f"{group}.")] for group in _GROUPS]
        self.blocks = {name: LatteBlock(blocks[name], name) for pair in zip_longest(*numbered) for name in pair if name}
        self._embedding = getattr(model, "pos_embed", None)
        self._around = [self.blocks.get(s.name if s.kind == "block" else s.block or "") for s, _ in self.found]
        self._reported: set[LatteBlock] = set()

    @property
    def cache_points(self) -> Sequence[str]:
        """Also "post_gate" if all blocks are stock; the generic adapter keeps outputs before the gate."""
        return ("pre_gate", "post_gate") if all(block.is_stock() for block in self.blocks.values()) else ("pre_gate",)

    @property
    def sublayers(self) -> Sequence[Sublayer]:
        """The sublayers of every block in its current state, in the order in which they run."""
        found = list(zip(self._around, super().sublayers, strict=True))
        within = {}
        for block in self.blocks.values():
            block.decide()
            within[block] = block.sublayers if block.stock else [s for b, s in found if b is block]
        return [*(s for sublayers in within.values() for s in sublayers), *(s for b, s in found if b is None)]

    def attach(self, broadcaster: Broadcaster, names: Collection[str]) -> Iterator[tuple[str, Attached]]:
        """Yield stand-ins for the `forward` of modules; those of sublayers take their turns in that of their block."""
        around = [block.whole.name for block in self.blocks.values() if any(s.name in names for s in block.parts)]
        yield from super().attach(broadcaster, {*names, *around})
        if around and isinstance(self._embedding, nn.Module):
            yield "pos_embed", attach_forward(self._embedding, _Embedded(broadcaster))

    def stand_in(self, broadcaster: Broadcaster, sublayer: Sublayer) -> Callable[..., Any]:
        """The replacement of a `forward`; that of a sublayer has no effect while its block runs on the stream."""
        generic = super().stand_in(broadcaster, sublayer)
        block = self.blocks.get(sublayer.name if sublayer.kind == "block" else sublayer.block or "")
        if block is None:
            return generic
        fused = (
            FusedBlock(block, [broadcaster.current(s.name) for s in block.parts])
            if sublayer.kind == "block"
            else _as_it_is
        )
        return _FusedOrGeneric(broadcaster, block, fused, generic, self._report)

    def _report(self, block: LatteBlock) -> None:
        """Warn once that a block keeps its outputs at another cache point than the config's."""
        if block not in self._reported:
            self._reported.add(block)
            logger.warning(
                "%s was changed after PAB was enabled: it runs unfused, and keeps outputs at cache_point 'pre_gate', "
                "not 'post_gate'",
                block.whole.name,
            )


@dataclass(eq=False)
class _FusedOrGeneric:
    """Replaces the `forward` of a block or of a sublayer in it: by `fused` if the block is stock, else by `generic`."""

    broadcaster: Broadcaster
    block: LatteBlock
    fused: Callable[..., Any]
    generic: Callable[..., Any]
    report: Callable[[LatteBlock], None]

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, block = self.broadcaster.call, self.block
        if call is None:
            return original(*args, **kwargs)
        if block.stock if torch.compiler.is_compiling() else call.generation.once(LatteBlock.is_stock, block):
            return self.fused(call, original, *args, **kwargs)
        if call.generation.config.cache_point == "post_gate":
            self.report(block)
        return self.generic(original, *args, **kwargs)


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


def _as_it_is(call: Call, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replaces the `forward` of a module that `FusedBlock` calls, which has taken the turn."""
    return original(*args, **kwargs)


class LatteBlock:
    """One block, and its sublayers.

    Args:
        module: the block, of any class.
        name: its name in the model, such as "transformer_blocks.3".
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        group, _, number = name.rpartition(".")
        layer = int(number)
        self.module: Any = module
        self.whole = Sublayer(name, "block", layer, "fused")
        self.attention = Sublayer(f"{name}.attn1", _GROUPS[group], layer, "fused", block=name)
        self.cross = Sublayer(f"{name}.attn2", "cross", layer, "fused", block=name)
        self.mlp = Sublayer(f"{name}.ff", "mlp", layer, "fused", block=name)
        self.decide()

    def decide(self) -> None:
        """Check the current state of the block, for compiled graphs in the next generation."""
        self.stock = self.is_stock()
        parts = {name: getattr(self.module, name, None) for name in ("attn1", "attn2", "ff")}
        self.own_forward = {
            name: part is not None and not is_of_class(part.forward, part) for name, part in parts.items()
        }

    @property
    def parts(self) -> list[Sublayer]:
        """All sublayers that such a block can have."""
        return [self.attention, self.cross, self.mlp, self.whole]

    @property
    def sublayers(self) -> list[Sublayer]:
        """The sublayers of this block, if it is stock."""
        return [s for s in self.parts if s is not self.cross or self.module.attn2 is not None]

    def is_stock(self) -> bool:
        """Whether the block is what `FusedBlock._run` implements: diffusers' `BasicTransformerBlock` with adaLN-single.

        Its `forward` must not be replaced on the object, in a subclass or in the class, and neither must those of the
        classes of its parts. Parts of other classes are called as modules and do not matter here.
        """
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


class FusedBlock:
    """The `forward` of diffusers' block, written on the residual stream.

    Args:
        block: the block.
        current: the turns of its self attention, its cross attention, its MLP and the block itself.
    """

    def __init__(self, block: LatteBlock, current: Sequence[CurrentTurn]) -> None:
        self.block = block
        self.attention, self.cross, self.mlp, self.whole = current

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
        slot, store = _taken(self.whole, hidden_states)
        stream = ResidualStream(hidden_states, call)
        if slot is not None:
            stream.reuse(slot)
        else:
            self._run(
                call, stream, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep
            )
        out = stream.read()
        if store is not None:
            store.put(out - hidden_states)
        call.mark(REST)
        return out

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
        """Run the sublayers. `x` is the block's input; only its shape, dtype and device are used."""
        block, own_forward = self.block.module, self.block.own_forward
        gated = call.generation.config.cache_point == "post_gate"
        # Six of [rows, 1, C]: shift, scale, gate of the self attention, then of the MLP.
        modulation = (block.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)
        slot, store = _taken(self.attention, x)
        if slot is not None:
            stream.reuse(slot, None if gated else modulation[2])
        else:
            y = stream.norm_modulate(block.norm1, modulation[0], modulation[1])
            _attend(stream, block.attn1, own_forward["attn1"], y, None, mask, modulation[2], store)

        if block.attn2 is not None:
            slot, store = _taken(self.cross, x)
            if slot is not None:
                stream.reuse(slot)
            else:
                _attend(stream, block.attn2, own_forward["attn2"], stream.read(), text, text_mask, None, store)

        slot, store = _taken(self.mlp, x)
        if slot is not None:
            stream.reuse(slot, None if gated else modulation[5])
        else:
            y = stream.norm_modulate(block.norm2, modulation[3], modulation[4])
            _feed_forward(stream, block, own_forward["ff"], y, modulation[5], store)


def _taken(current: CurrentTurn, x: torch.Tensor) -> tuple[Slot | Extrapolation | None, Turn | None]:
    """The slot that a sublayer reuses, or the turn that keeps the output that it computes; None if it does not."""
    turn = current.turn
    if turn is None or turn.call is None:
        return None, None
    slot = turn.take(x)
    return slot, turn.store


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
    if block._chunk_size is not None:
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
