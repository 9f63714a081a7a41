"""CUDA graphs of a model: one for each pattern of its turns, context and signature of its arguments.

    1. The key of a call is its context, the signature of its arguments and the turns of all sublayers. It is known
       before the model runs.
    2. For a new key the model runs, which computes the call, and runs again for the capture, which computes nothing.
    3. For a known key, the arguments and the weights of outputs are copied to where the graph reads them, and the graph
       is replayed.

The host's part of a call (counts, slots put and released) is recorded at the capture and repeated at each replay.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._pytree import keystr, tree_flatten_with_path

from ...compat import hooks_in_words
from ...messages import first_line
from ...rules.config import PABConfig
from ...rules.plan import Action
from ...rules.traffic import Sent
from ..call import Call
from ..context import Context
from ..costs import place
from ..generation import Generation
from ..signature import copy_into, like, signature, tensors_of
from ..slots import Arena, Meters
from ..whole import shared
from .capture import Capture, CudaCapture, line_of
from .fixed_arena import Change, FixedArena, Places
from .host_state import State, difference, host_state

Compute = Callable[[Call, tuple[Any, ...], Mapping[str, Any]], Any]
"""Returns the model's output in a call, from its positional and keyword arguments."""


@dataclass(frozen=True)
class Graph:
    """One captured graph.

    Args:
        replay: queues its work.
        out: the output, which every replay writes.
        weights: the weights of all outputs that it reads together, in one tensor.
        changes: the changes to the arena.
        counts: a context with the counts of one call.
        sent: what a rank sends in one call, as `Shared.taken` gives it.
    """

    replay: Callable[[], None]
    out: Any
    weights: torch.Tensor
    changes: Sequence[Change]
    counts: Context
    sent: Sequence[Sent] = ()


class Graphs:
    """The graphs of one model under one config, for one generation at a time.

    Args:
        model: the model.
        config: the rules.
    """

    def __init__(self, model: nn.Module, config: PABConfig) -> None:
        self.config = config
        self._name = type(model).__name__
        self.running = False
        """Whether a call uses them."""
        self._user: weakref.ref[Generation] | None = None
        self.clear()

    def clear(self) -> None:
        """Drop all graphs and their memory."""
        self._graphs: dict[Hashable, Graph] = {}
        self._inputs: dict[Hashable, Any] = {}
        self._places: dict[str, Places] = {}
        self._capture: Capture | None = None
        self._state: State | None = None
        self._seen: weakref.ref[Generation] | None = None

    @property
    def user(self) -> Generation | None:
        """The generation that uses the places."""
        return None if self._user is None else self._user()

    @property
    def free(self) -> bool:
        """Whether no generation holds slots in the places, and no call is running that may put some there."""
        return not self.running and (self.user is None or self.user.meter.now == 0)

    def take(self, generation: Generation) -> None:
        """Assign the graphs to `generation`, which holds no slots yet."""
        self._user = weakref.ref(generation)
        for context in generation.contexts.values():
            context.arena = Arena(generation.meter)

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held: places of slots, inputs, weights, and the pool that the graphs share."""
        kept = [list(self._inputs.values()), [graph.weights for graph in self._graphs.values()]]
        captured = self._capture.nbytes if self._capture else 0
        return self.place_bytes + sum(t.nbytes for t in tensors_of(kept)) + captured

    @property
    def place_bytes(self) -> int:
        """Bytes of the places of slots."""
        places = [p.values for of_context in self._places.values() for p in of_context.values()]
        return sum(t.nbytes for t in tensors_of(places))

    def run(
        self,
        call: Call,
        model: nn.Module,
        compute: Compute,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        timestep: Any = None,
    ) -> Any:
        """The model's output in `call`, in new tensors.

        Args:
            call: the call.
            model: the model.
            compute: runs it.
            args, kwargs: its arguments.
            timestep: the timestep among them.

        Raises:
            TypeError: an argument or an output is not supported in a graph.
            RuntimeError: the arguments or the model are not on one CUDA device, or the model cannot be captured.
        """
        if isinstance(timestep, (int, float)):
            raise TypeError(
                f"{self._name} was called with the number {timestep!r} as timestep, and each number would need another "
                "graph: pass a tensor on the device, or leave cuda_graphs out of pab.enable"
            )
        given = (args, dict(kwargs))
        looks = signature(given, f"the arguments of {self._name}")
        device = self._device(given)
        # Once a generation, as checking a whole model takes too long for every step.
        if self._seen is None or self._seen() is not call.generation:
            self._check(model, device)
            self._seen = weakref.ref(call.generation)
        if self._capture is None:
            self._capture = CudaCapture(device)
        arena = self._arena(call)
        turns, read = _turns(call)
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (call.context.name, looks, turns, autocast, call.plan.given_up)
        graph = self._graphs.get(key)
        if looks not in self._inputs:
            self._inputs[looks] = like(given)
        inputs = self._inputs[looks]
        copy_into(inputs, given)
        weights = graph.weights if graph else _fixed_numbers(sum(map(len, read.values())), device)
        if read:
            host = torch.tensor(
                [w for of_place in read.values() for w in of_place],
                dtype=torch.float32,
                pin_memory=device.type == "cuda",
            )
            weights.copy_(host, non_blocking=True)
        if graph is None:
            numbers = iter(weights)
            arena.weights = {place: tuple(itertools.islice(numbers, len(of_place))) for place, of_place in read.items()}
            graph, out = self._first(call, arena, model, lambda call: compute(call, *inputs), weights)
            self._count_sent(model, graph)
            self._graphs[key] = graph
            return _copied(out)
        graph.replay()
        self._count_sent(model, graph)
        call.context.add(graph.counts)
        arena.repeat(graph.changes, call.step, lambda name: call.plan.decision(name, call.step).held)
        return _copied(graph.out)

    def _first(
        self, call: Call, arena: FixedArena, model: nn.Module, run: Callable[[Call], Any], weights: torch.Tensor
    ) -> tuple[Graph, Any]:
        """Run the model for the call, and capture the same work; return the graph and the output."""
        assert self._capture is not None
        before, again, dry = host_state(model), arena.rehearsal(writes=True), arena.rehearsal(writes=False)
        arena.changes.clear()
        if self._state is not None and difference(self._state, before) is not None:  # changed since the last check
            self._graphs.clear()
        with _autocast_without_memory():
            call.prepare()
            out = self._capture.warm_up(lambda: run(call))
            changes = tuple(arena.changes)
            ranks = shared(model)
            sent = () if ranks is None else ranks.taken()
            signature(out, f"the output of {self._name}")
            after = host_state(model)
            if difference(before, after) is not None:  # lazy initialisation, or a change at every call
                self._graphs.clear()
                self._capture.warm_up(lambda: run(_repeated(call, dry)))
                other = difference(after, host_state(model))
                if other is not None:
                    raise self._refused(f"{other} changes with every call")
            self._state = after
            repeated, failed = _repeated(call, again), []

            def captured() -> Any:
                try:
                    return run(repeated)
                except Exception as error:  # kept, as ending a failed capture raises another error
                    failed.append(error)
                    raise

            try:
                replay, captured_out = self._capture.capture(captured)
            except Exception as error:
                if failed and isinstance(failed[0], torch.OutOfMemoryError):
                    raise failed[0] from None
                raise self._refused(_reason((*failed, error)[0])) from error
        if ranks is not None:
            ranks.taken()  # nothing was sent while it was captured
        if tuple(again.changes) != changes:
            raise self._refused("a second call with the same inputs did something else")
        return Graph(replay, captured_out, weights, changes, repeated.context, sent), out

    def _count_sent(self, model: nn.Module, graph: Graph) -> None:
        ranks = shared(model)
        if ranks is not None:
            ranks.give(graph.sent)

    def _refused(self, reason: str) -> RuntimeError:
        return RuntimeError(
            f"{self._name} cannot be captured as a CUDA graph: {reason}. Its forward may only queue work on the "
            "device, the same for the same shapes: change the model, or leave cuda_graphs out of pab.enable"
        )

    def _check(self, model: nn.Module, device: torch.device) -> None:
        """Drop every graph if the model has changed.

        Raises:
            RuntimeError: a weight is not on `device`, or a module inside the model has a hook.
        """
        for name, module in model.named_modules():
            hooks = hooks_in_words(module)
            if name and hooks:  # hooks on the whole model run outside its graphs
                raise self._refused(f"{name} has a hook, {hooks[0]} (offloading, casting or another cache)")
        for name, p in model.named_parameters():
            if p.device != device:
                raise self._refused(f"{name} is on {p.device} and the inputs on {device} (as with offloading)")
        if self._state is not None and difference(self._state, host_state(model)) is not None:
            self.clear()

    def _arena(self, call: Call) -> FixedArena:
        arena = call.arena
        if not isinstance(arena, FixedArena):
            places = self._places.setdefault(call.context.name, {})
            arena = call.context.arena = FixedArena(call.generation.meter, places, call.plan.outputs)
        return arena

    def _device(self, given: Any) -> torch.device:
        """The device of all arguments."""
        devices = {
            leaf.device: keystr(path)
            for path, leaf in tree_flatten_with_path(given)[0]
            if isinstance(leaf, torch.Tensor)
        }
        if len(devices) == 1:
            return next(iter(devices))
        found = ", ".join(f"{where} on {device}" for device, where in devices.items()) or "no tensor"
        raise RuntimeError(
            f"{self._name} was called with {found}; with CUDA graphs all inputs must be on one CUDA device: move "
            "them, or leave cuda_graphs out of pab.enable"
        )


def _turns(call: Call) -> tuple[Hashable, dict[str, tuple[float, ...]]]:
    """The key of a call's turns, and the weights of extrapolations by place.

    Slots are identified by the ids of their values, which stay in their places.

    A planned reuse whose slots are missing has another key than a planned computation, as it is counted as forced.
    """
    turns: list[Hashable] = []
    weights: dict[str, tuple[float, ...]] = {}
    for sublayer, decision in zip(call.plan.sublayers, call.plan.decisions(call.step), strict=True):
        name = where = sublayer.name
        if sublayer.kind == "model":  # its outputs are kept outside of graphs
            continue
        if decision.action is not Action.REUSE:
            turns.append(decision.action)
            continue
        read: list[Hashable] = []
        while not read or call.arena.get(where) is not None:  # once for each run of the sublayer in a call
            slots = call.sources(where, decision)
            read.append(tuple((id(slot.value), slot.key) for slot in slots))
            if len(slots) > 1:
                weights[where] = call.weights(name, slots)
            where = place(name, len(read))
        forced = None if all(read) else decision.held > 0
        turns.append((*read, forced))
    return tuple(turns), weights


def _repeated(call: Call, arena: FixedArena) -> Call:
    """A copy of the call for repeating it, with new counts and with the slots of `arena`."""
    context = Context(call.context.name, Meters())
    context.arena = arena
    repeated = Call(call.generation, context, call.step)
    repeated.arguments, repeated.shape = call.arguments, call.shape
    repeated.prepare()
    return repeated


def _fixed_numbers(count: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.empty(count, dtype=torch.float32, device=device)


def _copied(out: Any) -> Any:
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, out)


def _reason(error: Exception) -> str:
    return f"{first_line(error)} (at {line_of(error)})"


@contextlib.contextmanager
def _autocast_without_memory() -> Iterator[None]:
    """Disable autocast's cache of cast weights, which would be freed before a graph that reads them is replayed."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
