"""Slots in host memory: an output is copied there behind the sublayer that made it, and back ahead of the one that
reads it.

A block is what is fetched at once: when the first sublayer of a block takes its output, the copies for the next block
that reads any are queued, and those for the block before are dropped. What is sent is on the device until two blocks
later. So a call needs the outputs read by two blocks and those written by two beside the slots on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..compat import forward_compiled, runs_compiled
from ..rules.config import PABConfig
from ..rules.plan import Sublayer
from .attach import Attached, is_stand_in
from .bus import Bus, bus_of
from .costs import place as place_of
from .signature import tensors_of, with_tensors
from .slots import Arena, Extrapolation, Key, Slot, nbytes, pack

if TYPE_CHECKING:
    from torch import nn

    from .call import Call
    from .turn import CurrentTurn, Turn

_COMPILED = "_compiled_call_impl"
"""Name of the attribute of a module that was compiled by its `compile`."""


@dataclass(eq=False)
class _Copy:
    """A value that is copied.

    Args:
        value: that is on the device, and counted there; None after it has left.
        done: what to wait for; None after it has left.
        bus: that copies.
    """

    value: Any
    done: Any
    bus: Bus

    def wait(self) -> None:
        if self.done is not None:
            self.bus.wait(self.done)


class Offload:
    """The slots of one call that are in host memory.

    Args:
        call: the call of the model.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._blocks: list[list[Slot]] = []  # read by each block, in the order in which they run
        self._block_of: dict[Slot, int] = {}
        self._present = -1
        self._coming: dict[int, dict[Slot, _Copy]] = {}  # by block
        self._counted: dict[int, int] = {}  # bytes by block
        self._leaving: dict[str, list[_Copy]] = {}  # by block, the one before last first

    def begin(self) -> None:
        """Fetch the outputs of the first block, after the turns of the call were decided."""
        owner = None
        for sublayer in self._call.plan.sublayers:
            turn = self._call.turns.by_name[sublayer.name]
            slots = [slot for slot in self._slots_of(turn) if slot.on_host]
            if slots and sublayer.owner != owner:
                owner = sublayer.owner
                self._blocks.append([])
            for slot in slots:
                self._blocks[-1].append(slot)
                self._block_of[slot] = len(self._blocks) - 1
        self._fetch(0)

    def take(self, found: Slot | Extrapolation) -> Slot | Extrapolation:
        """What a sublayer reads, on the device, where nothing else reads it."""
        if isinstance(found, Slot):
            return self._arrived(found)
        return replace(found, slots=tuple(map(self._arrived, found.slots)))

    def send(self, turn: Turn, value: Any, device: torch.device) -> tuple[Any, _Copy | None]:
        """An output that a turn keeps: itself, or a copy in host memory and what is on its way there."""
        bus = bus_of(device)
        if bus is None or not self._call.plan.on_host(turn.sublayer.name) or not _is_on(value, device):
            return value, None
        owner = turn.sublayer.owner
        if owner not in self._leaving and len(self._leaving) == 2:
            self._leave(next(iter(self._leaving)))
        copies, done = bus.to_host(tensors_of(value))
        leaving = _Copy(value, done, bus)
        self._leaving.setdefault(owner, []).append(leaving)
        self._call.generation.meter.add(nbytes(value))
        return with_tensors(value, copies), leaving

    def finish(self) -> None:
        """Let all further work wait for what is on its way, and drop it: the call has ended, or failed."""
        for block in tuple(self._coming):
            self._drop(block)
        for owner in tuple(self._leaving):
            self._leave(owner)
        self._blocks.clear()  # an exception that is kept holds this object, and would hold host memory
        self._block_of.clear()

    def _slots_of(self, turn: Turn) -> list[Slot]:
        """All slots that the runs of a sublayer read in the call."""
        found: list[Slot] = []
        name, run = turn.sublayer.name, 0
        while turn.decision.reads and self._call.arena.held(place := place_of(name, run)):
            found += self._call.sources(place, turn.decision)
            run += 1
        return found

    def _arrived(self, slot: Slot) -> Slot:
        if not slot.on_host:
            return slot
        foreseen = self._block_of.pop(slot, None)
        block = self._present if foreseen is None else foreseen
        if block != self._present:
            for other in [other for other in self._coming if other != block]:
                self._drop(other)
            self._present = block
            self._fetch(block)
            self._fetch(block + 1)
        if foreseen is not None:
            self._blocks[block].remove(slot)  # it is read once, and perhaps released from now on
        copy = self._coming.setdefault(block, {}).pop(slot, None) or self._fetched(slot, block)
        copy.wait()
        return replace(slot, value=copy.value, on_host=False, sent=None)

    def _fetch(self, block: int) -> None:
        if block not in self._coming and 0 <= block < len(self._blocks):
            self._coming[block] = {}
            for slot in self._blocks[block]:
                self._coming[block][slot] = self._fetched(slot, block)

    def _fetched(self, slot: Slot, block: int) -> _Copy:
        self._call.generation.meter.add(slot.nbytes)
        self._counted[block] = self._counted.get(block, 0) + slot.nbytes
        return _to_device(slot)

    def _drop(self, block: int) -> None:
        for copy in self._coming.pop(block).values():
            copy.wait()
        self._call.generation.meter.add(-self._counted.pop(block, 0))

    def _leave(self, owner: str) -> None:
        for copy in self._leaving.pop(owner):
            copy.wait()
            self._call.generation.meter.add(-nbytes(copy.value))
            copy.value = copy.done = None


def offloading(call: Call, model: nn.Module, compute: Callable[[], Any]) -> Callable[[], Any]:
    """`compute`, a call of a model, with slots in host memory.

    Raises:
        RuntimeError: a block was compiled after PAB was enabled.
        ValueError: the device is not supported.
    """
    given = () if call.arguments is None else call.arguments.leaves
    devices = {leaf.device for leaf in given if isinstance(leaf, Key)}
    if devices and not any(bus_of(device) for device in devices):  # a timestep may be on the CPU
        return compute
    moved = [s for s in call.plan.sublayers if call.plan.on_host(s.name)]
    compiled = [name for name in {s.owner for s in moved} if runs_compiled(model.get_submodule(name))]
    call.generation.once(_refuse_compiled, (model, frozenset(s.name for s in moved), frozenset(compiled)))

    def offloaded() -> Any:
        offload = call.offload = Offload(call)
        try:
            return compute()
        finally:
            call.offload = None
            offload.finish()

    return offloaded


def _refuse_compiled(what: tuple[nn.Module, frozenset[str], frozenset[str]]) -> bool:
    """Refuse graphs that would read what nothing fetched, given the model and the sublayers with slots in host memory.

    The third part, the blocks that are compiled, only lets `Generation.once` look again after it has changed.
    """
    model, names, _ = what
    for name in sorted(names):
        compiled = _compiled_around(model, name)
        if compiled is not None:
            raise RuntimeError(
                f"cache_device: {compiled or type(model).__name__} is compiled, and PAB does not know when it begins: "
                "compile blocks by block.compile() before pab.enable, or leave out cache_device"
            )
    return True


def _compiled_around(model: nn.Module, sublayer: str) -> str | None:
    """The outermost module whose graph reads the slots of a sublayer where nothing fetches them; None without one."""
    parts = sublayer.split(".")
    for name in (".".join(parts[:n]) for n in range(len(parts) + 1)):
        module = model.get_submodule(name)
        own = vars(module).get(_COMPILED)
        if own is not None:
            return None if is_stand_in(own) else name
        # The stand-in of a sublayer is around a `forward` that is compiled.
        if name != sublayer and (runs_compiled(module) or forward_compiled(module)):
            return name
    return None


def around_compiled(
    model: nn.Module | None, config: PABConfig, sublayers: Sequence[Sublayer], current: Callable[[str], CurrentTurn]
) -> Iterator[Attached]:
    """Stand-ins around compiled blocks: what a graph reads is there before it runs, and what it keeps is sent after it.

    Args:
        model: with PAB.
        config: of its next generations.
        sublayers: of the model.
        current: returns the holder of a sublayer's turn, by its name.
    """
    if model is None or config.cache_device is None:
        return
    by_block: dict[str, list[CurrentTurn]] = {}
    for sublayer in sublayers:
        by_block.setdefault(sublayer.owner, []).append(current(sublayer.name))
    for name, turns in by_block.items():
        block = model.get_submodule(name)
        if name and vars(block).get(_COMPILED) is not None and not is_stand_in(vars(block)[_COMPILED]):
            yield Attached(block, _COMPILED, functools.partial(_around, turns))


def _around(current: Sequence[CurrentTurn], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    turns = [holder.turn for holder in current if holder.turn is not None and holder.turn.call is not None]
    offload: Offload | None = turns[0].call.offload if turns else None
    if offload is None:
        return original(*args, **kwargs)
    for turn in turns:
        turn.slot = None if turn.slot is None else offload.take(turn.slot)
    out = original(*args, **kwargs)
    for turn in turns:
        turn.collect()
    return out


def refuse_whole(model: str, config: PABConfig) -> None:
    """Refuse slots in host memory for a model that is compiled as a whole.

    Raises:
        RuntimeError: the config asks for them.
    """
    if config.cache_device is not None:
        raise RuntimeError(
            f"{model} is compiled as a whole, and one graph would have all outputs on the device before it runs: "
            "compile its blocks instead, by block.compile() before pab.enable, or leave out cache_device"
        )


def moves_from(device: torch.device) -> bool:
    """Whether slots of a device can be moved to host memory; not from a CPU, whose memory that is.

    Raises:
        ValueError: the device is not supported.
    """
    return bus_of(device) is not None


def place_again(arena: Arena, place: str, dtype: torch.dtype | None, on_host: bool) -> None:
    """Quantise the slots of a place to `dtype`, if it is not None, and move them to host memory or to the device."""

    def changed(slot: Slot) -> tuple[Any, bool]:
        if not (on_host or slot.on_host):
            return pack(slot.value, dtype), False
        bus, value = bus_of(slot.key.device), slot.value
        if slot.on_host:
            copy = _to_device(slot)
            copy.wait()
            value = copy.value
        value = pack(value, dtype)
        if bus is None or not on_host or not _is_on(value, slot.key.device):
            return value, False
        copies, done = bus.to_host(tensors_of(value))
        bus.wait(done)
        return with_tensors(value, copies), True

    arena.change(place, changed)


def _to_device(slot: Slot) -> _Copy:
    bus = bus_of(slot.key.device)
    assert bus is not None, "it was moved from there"
    if slot.sent is not None:
        slot.sent.wait()
    copies, done = bus.to_device(tensors_of(slot.value))
    return _Copy(with_tensors(slot.value, copies), done, bus)


def _is_on(value: Any, device: torch.device) -> bool:
    return all(tensor.device == device for tensor in tensors_of(value))
