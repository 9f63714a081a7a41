"""Keeping and reusing the outputs of unfused modules.

An output may be a tensor or any pytree of tensors. If several outputs are reused together, floating-point tensors are
extrapolated (see `Extrapolation`), and everything else comes from the newest output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from ..ops.cached_outputs import extrapolate
from ..ops.dequantize import dequantize
from ..ops.quantized import Quantized
from ..rules.plan import Sublayer
from .fusing import autocasts
from .lending import lendable
from .signature import tensors_of
from .slots import Extrapolation, Slot, is_quantised, unpack
from .turn import CurrentTurn, Turn


@dataclass(eq=False)
class BroadcastForward:
    """Replaces the `forward` of a sublayer: computes or reuses its output, by its turn; plain outside of a call.

    Each block holds its `CurrentTurn` at the same place, so equal blocks share one compiled graph.

    Args:
        current: the turn of the sublayer.
        run: `broadcast_output` or `broadcast_change`.
    """

    current: CurrentTurn
    run: Callable[[Turn, Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]

    def __call__(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        turn = self.current.turn
        if turn is None or turn.call is None:
            return original(*args, **kwargs)
        return self.run(turn, original, args, kwargs)


def broadcast_output(turn: Turn, compute: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The output of `compute(*args, **kwargs)`, computed or reused.

    Raises:
        TypeError: there is no tensor among the inputs.
    """
    call = turn.call
    around = call.measured
    first = args[0] if args and type(args[0]) is torch.Tensor else _first_tensor(turn.sublayer, args, kwargs)
    slot = turn.take(first)
    if slot is not None:
        out = read(slot, turn.lends)
        if turn.receiver is not None:
            _watch(turn, out, slot)
    else:
        out = compute(*args, **kwargs)
        if turn.stores and turn.span is not None:  # on the stream of a block, which has changed since the plan was made
            call.generation.split_spans()
            turn.stores = False
        if isinstance(out, Quantized):  # by another rank, as it is kept
            if turn.stores:
                turn.put((out, [first.dtype]))
            out = dequantize(out, first.dtype)
        elif turn.stores:
            _keep(turn, out)
    if around is not None:
        call.mark(around)
    return out


def _keep(turn: Turn, out: Any) -> None:
    """Keep an output: a copy, or the output itself where nobody writes to it."""
    if turn.dtype is not None:
        turn.put(kept(out, _cloned_unless_quantised))
    elif torch.compiler.is_dynamo_compiling():
        turn.put(kept(out))  # the compiler leaves out the copy
    elif turn.call.arena.fixed:
        turn.put(kept(out, _as_it_is))  # it is copied to its place
    else:
        tensors = [out] if isinstance(out, torch.Tensor) else tensors_of(out)
        receiver = turn.lending.computed if turn.lending is not None and lendable(tensors) else None
        lends = receiver is not None and receiver.lends
        value = kept(out, _as_it_is if lends else None)
        own = tensors if lends else tensors_of(value[0])
        counted = lends or lendable(own)
        turn.put(value, own if counted else ())
        if receiver is not None and counted and not (lends or receiver.refused):
            turn.call.watch(receiver, list(zip(tensors, own, strict=True)))


def _watch(turn: Turn, out: Any, slot: Slot | Extrapolation) -> None:
    """Watch the receiver of a copy of a slot."""
    assert isinstance(slot, Slot) and turn.receiver is not None
    tensors = tensors_of(out)
    if lendable(tensors):
        turn.call.watch(turn.receiver, list(zip(tensors, tensors_of(slot.value), strict=True)))


class Unprojected(Protocol):
    """An attention module in two parts: `finish(attend(x, ...)[0], x)` is its output."""

    def attend(self, x: torch.Tensor, *args: Any, store: Turn | None = None, **kwargs: Any) -> tuple[torch.Tensor, Any]:
        """Attention before the output projection, and the copy to keep if there is a turn `store`."""

    def finish(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The output projection of `out`, for the input `x`."""


def broadcast_unprojected(
    turn: Turn, module: Unprojected, x: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """The output of an attention module; all but its output projection is computed or reused.

    The pass that computes attention also writes the slot.
    """
    around = turn.call.measured
    slot = turn.take(x)
    if slot is not None:
        # A projection may write to its input, or return it.
        out: torch.Tensor = _read(slot, _as_it_is if turn.lends else _cloned)
        if turn.receiver is not None:
            _watch(turn, out, slot)
        if out.dtype != x.dtype and not autocasts(x):  # it was kept under autocast
            out = out.to(x.dtype)
    else:
        out, stored = module.attend(x, *args, store=turn.store, **kwargs)
        if turn.stores:
            counted = not torch.compiler.is_dynamo_compiling() and lendable([stored])
            turn.put((stored, [out.dtype]), [stored] if counted else ())
    if around is not None:
        turn.call.mark(around)
    return module.finish(out, x)


def broadcast_change(turn: Turn, compute: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The output of a whole block: computed, or its inputs plus the change that it made when it was computed.

        1. computed: out_j = block(...); for each tensor out_j that continues the input in_k, change_j = out_j - in_k
        2. reused:   out_j = in_k + change_j; an output that is no tensor is returned unchanged

    In a span, the change of the last block is from the input of the first one, and the others return in_k.

    An output continues the only input of its shape. If the block has one output and several inputs have its shape, it
    continues the first input, which must be among them.

    Raises:
        TypeError: there is no tensor among the inputs, or an output does not continue exactly one input.
    """
    around = turn.call.measured
    inputs = _tensors(turn.sublayer, args, kwargs)
    slot = turn.take(inputs[0])
    if slot is not None:
        pairs, changed = _read(slot, _as_it_is)  # no copy, as the additions make new tensors
        leaves, nest = pytree.tree_flatten(changed)
        out = pytree.tree_unflatten(
            [c if k is None else inputs[k] if c is None else inputs[k] + c for k, c in zip(pairs, leaves, strict=True)],
            nest,
        )
    else:
        before, versions = _before(turn, inputs) if turn.stores else (inputs, None)
        out = compute(*args, **kwargs)
        if turn.stores and (versions is None or _is_known(turn, inputs, before, versions)):
            leaves, nest = pytree.tree_flatten(out)
            pairs = _continued(turn.sublayer, inputs, leaves)
            changes = _changes(turn, leaves, [None if k is None else before[k] for k in pairs], pairs)
            if changes is not None:  # no copy: nothing else has them
                turn.put(kept((pairs, pytree.tree_unflatten(changes, nest)), _as_it_is))
    if around is not None:
        turn.call.mark(around)
    return out


def _before(turn: Turn, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor | None], Sequence[int] | None]:
    """What a change is from, for each input of a block; None if that is not known.

    Also the versions of the inputs if writes to them are watched: a block may write to its stream in place.
    """
    if turn.span is not None and turn.span.before is not None:
        return [turn.span.begin(x) for x in inputs], None
    versions = _versions(turn, inputs)
    if versions is not None and turn.lending is not None and turn.lending.computed.lends:
        return inputs, versions
    return [x.clone() if x.is_floating_point() else x for x in inputs], versions


def _versions(turn: Turn, inputs: Sequence[torch.Tensor]) -> Sequence[int] | None:
    """The versions of the inputs of a block; None if they stay copies, or if the compiler leaves out the copies."""
    if torch.compiler.is_dynamo_compiling() or turn.span is not None or turn.call.arena.fixed:
        return None
    if turn.lending is None or turn.lending.computed.refused:
        return None
    if any(type(x) is not torch.Tensor or x.is_inference() for x in inputs):
        return None
    return [x._version for x in inputs]


def _is_known(
    turn: Turn, inputs: Sequence[torch.Tensor], before: Sequence[torch.Tensor | None], versions: Sequence[int]
) -> bool:
    """Whether `before` is still what a block got; where it is copies, decide whether the next call needs them."""
    assert turn.lending is not None
    receiver, unwritten = turn.lending.computed, [x._version for x in inputs] == versions
    if before is inputs:
        if not unwritten:
            turn.lending.lost("the block wrote to its input, so the change that it made is not known")
        return unwritten
    if unwritten and not receiver.comparison.begun:
        receiver.comparison.compare(
            [(x, copy) for x, copy in zip(inputs, before, strict=True) if copy is not None and copy is not x]
        )
    receiver.judge(unwritten)
    return True


def _changes(
    turn: Turn, leaves: Sequence[Any], begins: Sequence[torch.Tensor | None], pairs: Sequence[int | None]
) -> list[Any] | None:
    """The changes that a block keeps of its outputs, from what they are from; None if that is not known."""
    if any(k is not None and begin is None for k, begin in zip(pairs, begins, strict=True)):
        turn.call.generation.split_spans()
        return None
    both = list(zip(leaves, begins, strict=True))
    if turn.span is not None:
        turn.span.hand_on([(leaf, begin) for leaf, begin in both if begin is not None])
    return [leaf if begin is None else leaf - begin if turn.adds else None for leaf, begin in both]


def _first_tensor(sublayer: Sublayer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value
    return _tensors(sublayer, args, kwargs)[0]  # in a list or a dict


def _tensors(sublayer: Sublayer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    if not found:
        raise TypeError(f"{sublayer.name}: no tensor among the inputs; a module under PAB needs at least one")
    return found


def _continued(sublayer: Sublayer, inputs: Sequence[torch.Tensor], outputs: Sequence[Any]) -> tuple[int | None, ...]:
    """The index of the input that each output continues; None for an output that is no tensor."""
    several = sum(isinstance(out, torch.Tensor) for out in outputs) != 1
    pairs: list[int | None] = []
    for number, out in enumerate(outputs):
        if not isinstance(out, torch.Tensor):
            pairs.append(None)
            continue
        alike = [k for k, x in enumerate(inputs) if x.shape == out.shape and x.is_floating_point()]
        if not alike or (len(alike) > 1 and (several or alike[0] != 0)):
            shape = tuple(out.shape)
            raise TypeError(
                f"{sublayer.name}: output {number} of shape {shape} continues {len(alike) or 'none'} of its inputs, "
                "and a stream continues exactly one; leave out the rule for blocks, or this block: "
                f"enable(model, kinds={{{sublayer.name!r}: None}})"
            )
        pairs.append(alike[0])
    return tuple(pairs)


def read(slot: Slot | Extrapolation, last: bool = False) -> Any:
    """The output that a slot stands for, in tensors that may be written to; the slot's own where it is read last."""
    if last and isinstance(slot, Slot) and isinstance(slot.value[0], torch.Tensor):  # the common case
        return slot.value[0]
    return _read(slot, _as_it_is if last else _cloned)


def _read(slot: Slot | Extrapolation, own: Callable[[Any], Any]) -> Any:
    if isinstance(slot, Extrapolation):
        return extrapolated(slot)
    value, dtypes = slot.value
    return handed_out(value, dtypes, own)


def kept(out: Any, own: Callable[[Any], Any] | None = None) -> tuple[Any, list[torch.dtype | None]]:
    """The value that a slot keeps of an output, and the dtypes of its tensors.

    Args:
        out: the output.
        own: makes the kept tensor from the output's, which its receiver may write to; default a copy.
    """
    own = own or _cloned
    if isinstance(out, torch.Tensor):
        return own(out), [out.dtype]
    if _is_tensors(out):
        return tuple([own(v) for v in out]), [v.dtype for v in out]
    leaves, nest = pytree.tree_flatten(out)
    return pytree.tree_unflatten(list(map(own, leaves)), nest), [
        v.dtype if isinstance(v, torch.Tensor) else None for v in leaves
    ]


def handed_out(kept: Any, dtypes: list[torch.dtype | None], own: Callable[[Any], Any] | None = None) -> Any:
    """The output from its kept value; `own` makes tensors that may be written to, by default copies."""
    own = own or _cloned
    if isinstance(kept, torch.Tensor):
        return own(kept)
    if _is_tensors(kept):
        return tuple([own(v) for v in kept])
    leaves, nest = pytree.tree_flatten(kept)
    return pytree.tree_unflatten([_unpacked(v, dtype, own) for v, dtype in zip(leaves, dtypes, strict=True)], nest)


def _is_tensors(out: Any) -> bool:
    """Whether it is a plain tuple of tensors, the common case of several outputs."""
    return type(out) is tuple and all(isinstance(v, torch.Tensor) for v in out)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _cloned_unless_quantised(value: Any) -> Any:
    """A copy, unless quantising makes a new tensor anyway."""
    return value if isinstance(value, torch.Tensor) and is_quantised(value) else _cloned(value)


def _as_it_is(value: Any) -> Any:
    return value


def _unpacked(value: Any, dtype: torch.dtype | None, own: Callable[[Any], Any]) -> Any:
    return unpack(value, dtype) if dtype and isinstance(value, Quantized) else own(value)


def extrapolated(several: Extrapolation) -> Any:
    """The output extrapolated from several kept ones; the newest one if an older one has another structure."""
    newest, dtypes = several.slots[0].value
    leaves, nest = pytree.tree_flatten(newest)
    older = []
    for slot in several.slots[1:]:
        leaves_before, nest_before = pytree.tree_flatten(slot.value[0])
        if nest_before != nest:
            return handed_out(newest, dtypes)
        older.append(list(zip(leaves_before, slot.value[1], strict=True)))

    def value(c: Any, dtype: torch.dtype | None, *before: tuple[Any, torch.dtype | None]) -> Any:
        if dtype is None or not dtype.is_floating_point or any(d != dtype or c_k.shape != c.shape for c_k, d in before):
            return _unpacked(c, dtype, _cloned)
        return extrapolate(c, [c_k for c_k, _ in before], several.weights, dtype)

    return pytree.tree_unflatten([value(*leaf) for leaf in zip(leaves, dtypes, *older, strict=True)], nest)
