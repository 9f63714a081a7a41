"""The signature of a pytree: what decides the work that a call queues, without the contents of tensors."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..ops.quantized import Quantized

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
"""Types of plain values, which compare by value."""


def tensors_of(nest: Any) -> list[torch.Tensor]:
    """The tensors in a pytree in order, with a `Quantized` as its data and scale."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(nest):
        if isinstance(leaf, Quantized):
            found += (leaf.data, leaf.scale)
        elif isinstance(leaf, torch.Tensor):
            found.append(leaf)
    return found


def with_tensors(nest: Any, tensors: Iterable[torch.Tensor]) -> Any:
    """The same pytree with other tensors, in the order of `tensors_of`."""
    others = iter(tensors)

    def other(leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return replace(leaf, data=next(others), scale=next(others))
        return next(others) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(other, nest)


def like(nest: Any) -> Any:
    """The same pytree with new, uninitialised tensors; they are normal tensors even if made in inference mode."""

    def made(leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return Quantized(torch.empty_like(leaf.data), torch.empty_like(leaf.scale), leaf.group, leaf.channels)
        return torch.empty_like(leaf, requires_grad=False) if isinstance(leaf, torch.Tensor) else leaf

    with torch.inference_mode(False), torch.no_grad():
        return pytree.tree_map(made, nest)


def copy_into(to: Any, nest: Any) -> None:
    """Copy the tensors of a pytree into those of another one like it."""
    for target, given in zip(tensors_of(to), tensors_of(nest), strict=True):
        target.copy_(given)


def signature(nest: Any, what: str) -> Hashable:
    """The pytree with every tensor replaced by its shape, strides, dtype and device.

    Args:
        nest: the pytree.
        what: names it in the error message.

    Raises:
        TypeError: it contains an object that is neither a tensor nor a plain value.
    """
    leaves, structure = pytree.tree_flatten(nest)
    return structure, tuple(_of_leaf(leaf, what) for leaf in leaves)


def _of_leaf(leaf: Any, what: str) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        # The stride of a dimension of size 1 has no meaning.
        strides = tuple(s for n, s in zip(leaf.shape, leaf.stride(), strict=True) if n > 1)
        return type(leaf), tuple(leaf.shape), strides, leaf.dtype, leaf.device
    if isinstance(leaf, Quantized):
        return _of_leaf(leaf.data, what), _of_leaf(leaf.scale, what), leaf.group, leaf.channels
    if isinstance(leaf, PLAIN):
        return type(leaf), leaf  # with the type, as True == 1
    raise TypeError(
        f"got an instance of {type(leaf).__name__} in {what}; with CUDA graphs tensors, numbers, strings, None and "
        "lists, tuples and dicts of them are supported: pass these, or leave cuda_graphs out of pab.enable"
    )
