"""Outputs of modules that are called as they are: what a slot keeps of them, and how they are given back.

An output may be a tensor or any nest of tensors, and is kept whole. A linear reuse gives its floating-point tensors as
`c + w (c - c_prev)`, in float32 (float64 where they are) and rounded once to their dtype; everything else is that of the newest output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..ops.cached_outputs import line_value
from ..ops.quantize import Quantized
from .call import Call, Turn
from .plan import Sublayer
from .slots import Line, unpack


def broadcast_output(call: Call, sublayer: Sublayer, compute: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The output of `compute(*args, **kwargs)`, computed or given back as the plan says.

    Raises:
        TypeError: there is no tensor among the inputs.
    """
    around = call.measured
    turn = call.turn(sublayer, args[0] if args and isinstance(args[0], torch.Tensor) else _tensors(sublayer, args, kwargs)[0])
    if turn.slot is not None:
        out = _read(turn)
    else:
        out = compute(*args, **kwargs)
        if turn.store is not None:
            turn.store.put(kept(out))
    call.mark(around)
    return out


def broadcast_change(call: Call, sublayer: Sublayer, compute: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The output of a whole block: computed, or its inputs and the change that it made to them when it was computed.

        1. computed: out_j = block(...), and for each tensor out_j that continues the input in_k, change_j = out_j - in_k
        2. reused:   out_j = in_k + change_j; what is no tensor is given back as it was

    An output continues the input that has its shape; the first one, where the block has one output and it is the block's first input.

    Raises:
        TypeError: there is no tensor among the inputs, or an output does not continue exactly one input.
    """
    inputs, around = _tensors(sublayer, args, kwargs), call.measured
    turn = call.turn(sublayer, inputs[0])
    if turn.slot is not None:
        pairs, changed = _read(turn)
        leaves, nest = pytree.tree_flatten(changed)
        out = pytree.tree_unflatten([c if k is None else inputs[k] + c for k, c in zip(pairs, leaves, strict=True)], nest)
        call.mark(around)
        return out
    # The inputs by now: a block may write to its stream in place.
    before = [x.clone() if x.is_floating_point() else x for x in inputs] if turn.store is not None else inputs
    out = compute(*args, **kwargs)
    if turn.store is not None:
        leaves, nest = pytree.tree_flatten(out)
        pairs = _continued(sublayer, inputs, leaves)
        changes = [leaf if k is None else leaf - before[k] for k, leaf in zip(pairs, leaves, strict=True)]
        turn.store.put(kept((pairs, pytree.tree_unflatten(changes, nest))))
    call.mark(around)
    return out


def _tensors(sublayer: Sublayer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
    if not found:
        raise TypeError(f"{sublayer.name}: no tensor among the inputs; a module under PAB needs at least one")
    return found


def _continued(sublayer: Sublayer, inputs: Sequence[torch.Tensor], outputs: Sequence[Any]) -> tuple[int | None, ...]:
    """For each output the index of the input that it continues; None for what is no tensor."""
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
                f"{sublayer.name}: output {number} of shape {shape} continues {len(alike) or 'none'} of its inputs, and a stream "
                f"continues exactly one; leave out the rule for blocks, or this block: enable(model, kinds={{{sublayer.name!r}: None}})"
            )
        pairs.append(alike[0])
    return tuple(pairs)


def _read(turn: Turn) -> Any:
    assert turn.slot is not None
    return extended(turn.slot) if isinstance(turn.slot, Line) else handed_out(*turn.slot.value)


def kept(out: Any) -> tuple[Any, list[torch.dtype | None]]:
    """What a slot keeps of an output: tensors of its own, as whoever gets the output may write to it, and their dtypes."""
    if isinstance(out, torch.Tensor):
        return out.clone(), [out.dtype]
    leaves, nest = pytree.tree_flatten(out)
    return pytree.tree_unflatten(list(map(_cloned, leaves)), nest), [v.dtype if isinstance(v, torch.Tensor) else None for v in leaves]


def handed_out(kept: Any, dtypes: list[torch.dtype | None]) -> Any:
    """The output again, in tensors that may be written to."""
    if isinstance(kept, torch.Tensor):
        return kept.clone()
    leaves, nest = pytree.tree_flatten(kept)
    return pytree.tree_unflatten(list(map(_leaf, leaves, dtypes)), nest)


def _leaf(value: Any, dtype: torch.dtype | None) -> Any:
    return unpack(value, dtype) if dtype and isinstance(value, Quantized) else _cloned(value)


def extended(line: Line) -> Any:
    """The output on the line through the two that were kept; the newest one where the other is another nest."""
    (newest, dtypes), (before, dtypes_before) = line.newest.value, line.before.value
    leaves, nest = pytree.tree_flatten(newest)
    leaves_before, nest_before = pytree.tree_flatten(before)
    if nest != nest_before:
        return handed_out(newest, dtypes)

    def extended(c: Any, dtype: torch.dtype | None, c_prev: Any, dtype_prev: torch.dtype | None) -> Any:
        if dtype is None or not dtype.is_floating_point or dtype != dtype_prev or c.shape != c_prev.shape:
            return _leaf(c, dtype)
        return line_value(c, c_prev, line.weight, dtype)

    return pytree.tree_unflatten(list(map(extended, leaves, dtypes, leaves_before, dtypes_before)), nest)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
