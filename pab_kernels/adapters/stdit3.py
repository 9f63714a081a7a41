"""STDiT3 (Open-Sora 1.2, `models/stdit3.py`): spatial and temporal blocks, each with cross attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..broadcast.attach import Attached, innermost, is_of_class
from ..broadcast.broadcaster import Broadcaster
from ..broadcast.call import Call
from ..broadcast.fusing import has_hooks, is_original, is_plain
from ..broadcast.stream import ResidualStream
from ..broadcast.turn import CurrentTurn, Turn
from ..models.stdit3 import MLP, CaptionEmbedder, STDiT3, STDiT3Block
from ..nn.attention import SelfAttention
from ..nn.cross_attention import CrossAttention, KeptText, kept_text
from ..nn.parts import PartsModule
from ..ops import Rope
from .fused import FusedAdapter, FusedBlock, FusedForward


def handles(model: nn.Module) -> bool:
    """Whether `model` is the STDiT3 of this package."""
    return isinstance(model, STDiT3)


class Block(FusedBlock):
    """An `STDiT3Block`; the keys and values of the text are kept for a generation."""

    PARTS = ("attn", "cross_attn", "mlp")
    KEEPS = "kv_linear"

    def is_stock(self) -> bool:
        """See `FusedBlock.is_stock`."""
        block = self.module
        return (
            is_of_class(getattr(*innermost(block)), block)
            and all(getattr(type(block), name) is getattr(STDiT3Block, name) for name in ("forward", "modulation"))
            and all(is_original(STDiT3Block, name) for name in ("forward", "modulation"))
            and all(is_original(PartsModule, name) for name in ("forward", "finish", "project"))
            and all(is_original(owner, "attend") for owner in (SelfAttention, CrossAttention))
            and all(is_original(MLP, name) for name in ("forward", "hidden"))
        )


class Forward(FusedForward):
    """The `forward` of an `STDiT3Block`."""

    def __call__(
        self,
        call: Call,
        original: Callable[..., Any],
        x: Tensor,
        m: Tensor,
        text: Tensor,
        lengths: Tensor | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """See `FusedForward`."""
        return self.broadcast(call, x, m, text, lengths, rope)

    def modulation(self, x: Tensor, m: Tensor, *args: Any) -> Sequence[Tensor]:
        """Six of `[B, 1 or T, 1, C]`."""
        modulation: Sequence[Tensor] = self.block.module.modulation(m)
        return modulation

    def attend(
        self,
        stream: ResidualStream,
        y: Tensor,
        gate: Tensor,
        store: Turn | None,
        m: Tensor,
        text: Tensor,
        lengths: Tensor | None,
        rope: Rope | None,
    ) -> None:
        """See `FusedForward.attend`."""
        attn = self.block.module.attn
        if self._replaceable(attn, "attn", SelfAttention):
            out, _ = attn.attend(y, rope)
            stream.project(attn.arrange(out, y).flatten(-2), attn.proj, gate, store)
        else:
            stream.add(attn(y, rope), gate, store)

    def attend_text(
        self,
        stream: ResidualStream,
        y: Tensor,
        store: Turn | None,
        m: Tensor,
        text: Tensor,
        lengths: Tensor | None,
        rope: Rope | None,
    ) -> None:
        """See `FusedForward.attend_text`."""
        attn = self.block.module.cross_attn
        if self._replaceable(attn, "cross_attn", CrossAttention):
            out, _ = attn.attend(y, text, lengths, self._kept(stream.call))
            stream.project(attn.arrange(out, y).flatten(-2), attn.proj, None, store)
        else:
            stream.add(attn(y, text, lengths), None, store)

    def feed_forward(self, stream: ResidualStream, y: Tensor, gate: Tensor, store: Turn | None) -> None:
        """See `FusedForward.feed_forward`."""
        mlp = self.block.module.mlp
        if self._replaceable(mlp, "mlp", MLP):
            stream.project(mlp.hidden(y), mlp.fc2, gate, store)
        else:
            stream.add(mlp(y), gate, store)

    def run(self, stream: ResidualStream, x: Tensor, *args: Any) -> None:
        """See `FusedForward.run`; attention that is kept before its projection is a module that takes its own turn."""
        if stream.call.generation.config.cache_point != "unprojected":
            super().run(stream, x, *args)
            return
        block, (m, text, lengths, rope) = self.block.module, args
        shift, scale, gate, *of_mlp = block.modulation(m)
        y = stream.norm_modulate(block.norm1, shift, scale)
        stream.add(block.attn(y, rope, turn=_turn(self.attention)), gate)
        stream.add(block.cross_attn(stream.read(), text, lengths, self._kept(stream.call), turn=_turn(self.cross)))
        self.run_mlp(stream, x, *of_mlp)

    def _replaceable(self, part: Any, name: str, of: type[nn.Module]) -> bool:
        """Whether fused operations may replace the call of a part of the block."""
        return type(part) is of and not self.block.own_forward[name] and not has_hooks(part)

    def _kept(self, call: Call) -> KeptText | None:
        """Where keys and values are kept in this call."""
        name = self.block.cross.name
        keeps = not torch.compiler.is_compiling() and bool(call.text) and name in call.plan.keeping
        return kept_text(call, name, call.text) if keeps else None


def _turn(current: CurrentTurn) -> Turn | None:
    turn = current.turn
    return None if turn is None or turn.call is None else turn


class STDiT3Adapter(FusedAdapter):
    """The adapter of STDiT3.

    Args:
        model: a model that `handles` accepts.
    """

    GROUPS = {"spatial_blocks": "spatial", "temporal_blocks": "temporal"}
    BLOCK = Block
    FORWARD = Forward
    CACHE_POINTS = ("pre_gate", "post_gate", "unprojected")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._model = model

    def attach_beside(self, broadcaster: Broadcaster) -> Iterator[tuple[str, Attached]]:
        """Yield the stand-in that records which tensors the text is made from."""
        yield "embed_text", Attached(self._model, "embed_text", _EmbedText(broadcaster, self._model))


@dataclass(eq=False)
class _EmbedText:
    """Replaces `STDiT3.embed_text`; of a text that is made in another way nothing is kept."""

    broadcaster: Broadcaster
    model: Any

    def __call__(self, original: Callable[..., Any], y: Tensor, mask: Tensor | None) -> Any:
        call = None if torch.compiler.is_compiling() else self.broadcaster.call
        if call is not None and self._as_written():
            call.text = (y, *(() if mask is None else (mask,)), *self.model.y_embedder.parameters())
        return original(y, mask)

    def _as_written(self) -> bool:
        """Whether the text depends on its arguments and on parameters alone, without hooks or a LoRA."""
        return (
            type(self.model).embed_text is STDiT3.embed_text
            and is_original(STDiT3, "embed_text")
            and is_original(CaptionEmbedder, "forward")
            and all(is_plain(m, CaptionEmbedder, MLP, nn.Linear) for m in self.model.y_embedder.modules())
        )
