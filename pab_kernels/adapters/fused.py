"""The adapter of models whose blocks are written on the residual stream: a family says how, here is what they share."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..broadcast.attach import Attached, is_of_class
from ..broadcast.broadcaster import Broadcaster
from ..broadcast.call import Call
from ..broadcast.slots import Extrapolation, Slot
from ..broadcast.stopwatch import REST
from ..broadcast.stream import ResidualStream
from ..broadcast.turn import CurrentTurn, Turn
from ..rules.plan import Sublayer
from .generic import GenericAdapter

logger = logging.getLogger("pab_kernels")


class FusedBlock(abc.ABC):
    """One block: self attention, cross attention or none, and an MLP.

    Args:
        module: the block, of any class.
        name: its name in the model, such as "transformer_blocks.3".
        kind: of its self attention.
    """

    PARTS: ClassVar[tuple[str, str, str]]
    """Names of the self attention, the cross attention and the MLP in the block."""
    KEEPS: ClassVar[str | None] = None
    """Name of the module in the cross attention whose output is kept for a generation."""

    def __init__(self, module: nn.Module, name: str, kind: str) -> None:
        layer = int(name.rpartition(".")[2])
        attention, cross, mlp = (f"{name}.{part}" for part in self.PARTS)
        self.module: Any = module
        self.whole = Sublayer(name, "block", layer, "fused")
        self.attention = Sublayer(attention, kind, layer, "fused", block=name)
        self.cross = Sublayer(cross, "cross", layer, "fused", block=name, keeps=self.KEEPS and f"{cross}.{self.KEEPS}")
        self.mlp = Sublayer(mlp, "mlp", layer, "fused", block=name)
        self.decide()

    def decide(self) -> None:
        """Check the current state of the block, for compiled graphs in the next generation."""
        self.stock = self.is_stock()
        parts = {name: getattr(self.module, name, None) for name in self.PARTS}
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
        return [s for s in self.parts if s is not self.cross or self.has_cross]

    @property
    def has_cross(self) -> bool:
        """Whether this block, if it is stock, has cross attention."""
        return getattr(self.module, self.PARTS[1]) is not None

    @abc.abstractmethod
    def is_stock(self) -> bool:
        """Whether the block is exactly what the family's `FusedForward` implements.

        Its `forward` must not be replaced on the object, in a subclass or in the class, and neither must those of the
        classes of its parts. Parts of other classes are called as modules and do not matter here.
        """


class FusedForward(abc.ABC):
    """The `forward` of a block, written on the residual stream:

        x = x + gate * attn(norm1(x) * (1 + scale) + shift)
        x = x + cross_attn(x, text), if there is one
        x = x + gate' * mlp(norm2(x) * (1 + scale') + shift')

    Args:
        block: the block.
        current: the turns of its self attention, its cross attention, its MLP and the block itself.
    """

    def __init__(self, block: FusedBlock, current: Sequence[CurrentTurn]) -> None:
        self.block = block
        self.attention, self.cross, self.mlp, self.whole = current

    @abc.abstractmethod
    def __call__(self, call: Call, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The block's output: `broadcast` of the arguments, or `original` for those that the methods do not support."""

    @abc.abstractmethod
    def modulation(self, x: Tensor, *args: Any) -> Sequence[Tensor]:
        """Shift, scale and gate of the self attention, then of the MLP.

        Of x, the block's input, only shape, dtype and device are used.
        """

    @abc.abstractmethod
    def attend(self, stream: ResidualStream, y: Tensor, gate: Tensor, store: Turn | None, *args: Any) -> None:
        """Add the gated self attention of y, and keep it in the slot of the turn `store`, if given."""

    @abc.abstractmethod
    def attend_text(self, stream: ResidualStream, y: Tensor, store: Turn | None, *args: Any) -> None:
        """Add the cross attention of y, and keep it in the slot of the turn `store`, if given."""

    @abc.abstractmethod
    def feed_forward(self, stream: ResidualStream, y: Tensor, gate: Tensor, store: Turn | None) -> None:
        """Add the gated MLP of y, and keep it in the slot of the turn `store`, if given."""

    def broadcast(self, call: Call, x: Tensor, *args: Any) -> Tensor:
        """The block's output: its sublayers run on the stream, or the change that the block made is added to x."""
        slot, store = taken(self.whole, x)
        stream = ResidualStream(x, call)
        if slot is None:
            self.run(stream, x, *args)
        elif self.whole.turn is None or self.whole.turn.adds:
            stream.reuse(slot)
        out = stream.read()
        if store is not None:
            self.keep(store, x, out)
        call.mark(REST)
        return out

    def keep(self, store: Turn, x: Tensor, out: Tensor) -> None:
        """Keep the change that a block or a sublayer made, or in a span the last one what all made."""
        span = store.span
        begin = x if span is None else span.begin(x)
        if begin is None:
            store.call.generation.split_spans()
            return
        if span is not None:
            span.hand_on([(out, begin)])
        store.put(out - begin if store.adds else ())

    def run(self, stream: ResidualStream, x: Tensor, *args: Any) -> None:
        """Run the sublayers. Of x, the block's input, only shape, dtype and device are used."""
        block = self.block.module
        shift, scale, gate, *of_mlp = self.modulation(x, *args)

        def attend(store: Turn | None) -> None:
            self.attend(stream, stream.norm_modulate(block.norm1, shift, scale), gate, store, *args)

        self.run_sublayer(self.attention, stream, x, attend, gate)
        if self.block.has_cross:
            self.run_sublayer(
                self.cross, stream, x, lambda store: self.attend_text(stream, stream.read(), store, *args)
            )
        self.run_mlp(stream, x, *of_mlp)

    def run_mlp(self, stream: ResidualStream, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> None:
        """Run the last sublayer."""

        def feed_forward(store: Turn | None) -> None:
            self.feed_forward(stream, stream.norm_modulate(self.block.module.norm2, shift, scale), gate, store)

        self.run_sublayer(self.mlp, stream, x, feed_forward, gate)

    def run_sublayer(
        self,
        current: CurrentTurn,
        stream: ResidualStream,
        x: Tensor,
        compute: Callable[[Turn | None], None],
        gate: Tensor | None = None,
    ) -> None:
        """Add a slot, with its gate unless the slot includes it, or what `compute` adds and keeps in the turn it gets.

        In a span the change of the stream is kept, as that of blocks is.
        """
        slot, store = taken(current, x)
        if slot is not None:
            if current.turn is None or current.turn.adds:
                stream.reuse(slot, None if stream.call.generation.config.cache_point == "post_gate" else gate)
        elif store is None or store.span is None:
            compute(store)
        else:
            begin = stream.read()
            compute(None)
            self.keep(store, begin, stream.read())


class FusedAdapter(GenericAdapter):
    """Runs the blocks that are exactly those of a family (`FusedBlock.is_stock`) on the residual stream.

    A reuse skips the whole sublayer: norm, modulate, projections, attention, output projection. Every other block, and
    any sublayer that a subclass of the model has outside of its blocks, is run by the generic adapter. Which blocks are
    stock is decided once a generation.

    Args:
        model: of the family.
    """

    GROUPS: ClassVar[Mapping[str, str]]
    """The kind of the self attention in each list of blocks; the model runs one block of each list after another."""
    BLOCK: ClassVar[type[FusedBlock]]
    FORWARD: ClassVar[type[FusedForward]]
    CACHE_POINTS: ClassVar[tuple[str, ...]] = ("pre_gate", "post_gate")
    """Those of stock blocks; the generic adapter keeps outputs before the gate."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        modules = {s.name: module for s, module in self.found if s.kind == "block"}
        numbered = [[name for name in modules if name.rpartition(".")[0] == group] for group in self.GROUPS]
        self.blocks = {
            name: self.BLOCK(modules[name], name, self.GROUPS[name.rpartition(".")[0]])
            for names in zip_longest(*numbered)
            for name in names
            if name
        }
        self._around = [self.blocks.get(s.name if s.kind == "block" else s.block or "") for s, _ in self.found]
        self._reported: set[FusedBlock] = set()

    @property
    def cache_points(self) -> Sequence[str]:
        """Those of the family if all blocks are stock."""
        return self.CACHE_POINTS if all(block.is_stock() for block in self.blocks.values()) else ("pre_gate",)

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
        if around:
            yield from self.attach_beside(broadcaster)

    def attach_beside(self, broadcaster: Broadcaster) -> Iterator[tuple[str, Attached]]:
        """Yield further stand-ins that the blocks on the stream need."""
        yield from ()

    def stand_in(self, broadcaster: Broadcaster, sublayer: Sublayer) -> Callable[..., Any]:
        """The replacement of a `forward`; that of a sublayer has no effect while its block runs on the stream."""
        generic = super().stand_in(broadcaster, sublayer)
        block = self.blocks.get(sublayer.name if sublayer.kind == "block" else sublayer.block or "")
        if block is None:
            return generic
        fused = (
            self.FORWARD(block, [broadcaster.current(s.name) for s in block.parts])
            if sublayer.kind == "block"
            else _as_it_is
        )
        return _FusedOrGeneric(broadcaster, block, fused, generic, self._report)

    def _report(self, block: FusedBlock, cache_point: str) -> None:
        """Warn once that a block keeps its outputs at another cache point than the config's."""
        if block not in self._reported:
            self._reported.add(block)
            logger.warning(
                "%s was changed after PAB was enabled: it runs unfused, and keeps outputs at cache_point 'pre_gate', "
                "not %r",
                block.whole.name,
                cache_point,
            )


@dataclass(eq=False)
class _FusedOrGeneric:
    """Replaces the `forward` of a block or of a sublayer in it: by `fused` if the block is stock, else by `generic`."""

    broadcaster: Broadcaster
    block: FusedBlock
    fused: Callable[..., Any]
    generic: Callable[..., Any]
    report: Callable[[FusedBlock, str], None]

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, block = self.broadcaster.call, self.block
        if call is None:
            return original(*args, **kwargs)
        if block.stock if torch.compiler.is_compiling() else call.generation.once(type(block).is_stock, block):
            return self.fused(call, original, *args, **kwargs)
        if call.generation.config.cache_point != "pre_gate":
            self.report(block, call.generation.config.cache_point)
        return self.generic(original, *args, **kwargs)


def _as_it_is(call: Call, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Replaces the `forward` of a module that a `FusedForward` calls, which has taken the turn."""
    return original(*args, **kwargs)


def taken(current: CurrentTurn, x: Tensor) -> tuple[Slot | Extrapolation | None, Turn | None]:
    """The slot that a sublayer reuses, or the turn that keeps the output that it computes; None if it does not."""
    turn = current.turn
    if turn is None or turn.call is None:
        return None, None
    slot = turn.take(x)
    return slot, turn.store
