"""Lending: a slot and the code that gets its output have one tensor, where that code is known not to write to it.

    1. At first each has its own: the slot keeps a copy, or the code gets one. What it got is watched until the call of
       the model ends.
    2. If nobody wrote to it, and nobody keeps it, outputs of this sublayer are lent from then on.
    3. A slot that is written to nevertheless is lost (`Slot.written`): the sublayer computes, and its outputs are
       copied from then on.

A tensor's version counts the writes of torch's operations to it and to its views. Other writes (through `.data`, or by
a kernel that takes an address) show in its values only. These are compared once for all sublayers at the same place of
their blocks, as equal blocks run the same code.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

logger = logging.getLogger("pab_kernels")

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Tensors with what they should be equal to."""


class Comparison:
    """Whether tensors kept their values. The host does not wait for the answer of a device."""

    def __init__(self) -> None:
        self.begun = False
        """Whether tensors were compared."""
        self._equal: bool | None = None
        self._same: torch.Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def compare(self, pairs: Pairs) -> None:
        """Compare the tensors of each pair, on the CPU or on one CUDA device; elsewhere they count as different."""
        self.begun = True
        devices = {t.device for pair in pairs for t in pair}
        kinds = {device.type for device in devices}
        if kinds != {"cuda"} or len(devices) > 1:
            self._equal = kinds == {"cpu"} and all(torch.equal(a, b) for a, b in pairs)
        else:
            # Copied to pinned memory, so the host does not wait.
            self._same = torch.stack([(a == b).all() for a, b in pairs]).all().to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(devices.pop()))

    @property
    def equal(self) -> bool | None:
        """Whether they were equal; None if that is not known yet."""
        event = self._event  # another thread may take it away
        if event is not None and not torch.cuda.is_current_stream_capturing() and event.query():
            self._equal, self._event = bool(self._same), None
        return self._equal


class Receiver:
    """The code that gets the outputs of a sublayer when they are computed, or when they are reused.

    Args:
        comparison: of all receivers at the same place of their blocks.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.lends = False
        """Whether outputs are lent to it."""
        self.refused = False
        """Whether nothing is lent to it for good."""
        self.comparison = comparison

    def refuse(self) -> None:
        """Lend nothing from now on."""
        self.refused, self.lends = True, False

    def judge(self, harmless: bool) -> None:
        """Decide by a tensor that it got.

        Args:
            harmless: whether nobody wrote to the tensor or keeps it.
        """
        equal = self.comparison.equal
        if not harmless or equal is False:
            self.refuse()
        elif equal:
            self.lends = True
            self.lends = not self.refused  # another thread may have refused since


class Watch:
    """Watches what a receiver got in a call of the model, without keeping its memory.

    Args:
        receiver: that got it.
        pairs: each tensor that it got, and one with its values that nobody else has.
        compares: whether values are compared too, for which the tensors are kept until the call ends.
    """

    def __init__(self, receiver: Receiver, pairs: Pairs, compares: bool) -> None:
        self._receiver = receiver
        self._counters = [_counter(got) for got, _ in pairs]
        self._versions = [counter._version for counter in self._counters]
        self._memory = [StorageWeakRef(got.untyped_storage()) for got, _ in pairs]
        self._compared: Pairs = pairs if compares else ()

    def end(self) -> None:
        """Decide what is lent to the receiver, at the end of the call."""
        unwritten = [counter._version for counter in self._counters] == self._versions
        if unwritten and self._compared:
            self._receiver.comparison.compare(self._compared)
        self._compared = ()
        self._receiver.judge(unwritten and all(memory.expired() for memory in self._memory))


def _counter(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor with the version counter of `tensor`."""
    counter = tensor.detach()
    counter.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return counter


class Lending:
    """What is lent of one sublayer.

    Args:
        name: of the sublayer.
        alike: another sublayer at the same place of its block, or None.
    """

    def __init__(self, name: str, alike: Lending | None) -> None:
        self.name = name
        self.computed: Receiver = Receiver(Comparison() if alike is None else alike.computed.comparison)
        """Gets computed outputs; of a block, the block itself, which gets its inputs."""
        self.reused: Receiver = Receiver(Comparison() if alike is None else alike.reused.comparison)
        """Gets reused outputs."""
        self._all: list[Lending] = [] if alike is None else alike._all
        self._all.append(self)

    def refuse(self) -> None:
        """Lend nothing from now on."""
        self.computed.refuse()
        self.reused.refuse()

    def lost(self, what: str) -> None:
        """Lend nothing at this place from now on, as a lent tensor was written to.

        Args:
            what: happened, for the log.
        """
        if not (self.computed.refused and self.reused.refused):
            logger.warning("%s: %s; from now on copies are made", self.name, what)
        for lending in self._all:
            lending.refuse()


class Lendings(dict[str, Lending]):
    """What is lent of each sublayer of an enabled model, by name."""

    def __init__(self) -> None:
        super().__init__()
        self._alike: dict[str, Lending] = {}
        self._lock = threading.Lock()

    def __missing__(self, name: str) -> Lending:
        with self._lock:
            if name not in self:
                place = re.sub(r"\d+", "*", name)
                self[name] = self._alike[place] = Lending(name, self._alike.get(place))
            return self[name]


def lendable(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether an output can be lent: torch counts the writes to its tensors, and they fill memory of torch's.

    Args:
        tensors: of the output.
    """
    if _among_ranks() or _among_graphs():
        return False
    rest: dict[int, int] = {}
    for tensor in tensors:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_inference():
            return False
        memory = tensor.untyped_storage()
        if not memory.resizable():
            return False
        rest[memory._cdata] = rest.get(memory._cdata, memory.nbytes()) - tensor.nbytes
    return not any(rest.values())


def _among_ranks() -> bool:
    """Whether there are several ranks: one that lost a slot would wait for the others, which reuse theirs."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _among_graphs() -> bool:
    """Whether the compiler uses CUDA graphs: a replay writes to the outputs of the one before, which nothing counts."""
    return "torch._inductor.cudagraph_trees" in sys.modules
