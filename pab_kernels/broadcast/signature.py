"""What of a nest of values decides which work a call queues: everything but the numbers in its tensors."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..ops.quantized import Quantized

PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)
"""Values that are what they show."""


def tensors_of(nest: Any) -> list[torch.Tensor]:
    """The tensors in a nest in their order, an 8-bit tensor as data and scale."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(nest):
        found += (
            (leaf.data, leaf.scale)
            if isinstance(leaf, Quantized)
            else (leaf,)
            if isinstance(leaf, torch.Tensor)
            else ()
        )
    return found


def like(nest: Any) -> Any:
    """The same nest with tensors of its own, nothing in them yet. They outlive the mode in which they are made."""

    def made(leaf: Any) -> Any:
        if isinstance(leaf, Quantized):
            return Quantized(torch.empty_like(leaf.data), torch.empty_like(leaf.scale), leaf.group)
        return torch.empty_like(leaf, requires_grad=False) if isinstance(leaf, torch.Tensor) else leaf

    with torch.inference_mode(False), torch.no_grad():
        return pytree.tree_map(made, nest)


def copy_into(to: Any, nest: Any) -> None:
    """Write the tensors of a nest into those of another one like it."""
    for target, given in zip(tensors_of(to), tensors_of(nest), strict=True):
        target.copy_(given)


def signature(nest: Any, what: str) -> Hashable:
    """The nest with every tensor replaced by its shape, strides, dtype and device.

    Raises:
        TypeError: there is something in it whose contents cannot be told. It says that it is in `what`.
    """
    leaves, structure = pytree.tree_flatten(nest)
    return structure, tuple(_of_leaf(leaf, what) for leaf in leaves)


def _of_leaf(leaf: Any, what: str) -> Hashable:
    if isinstance(leaf, torch.Tensor):
        strides = tuple(s for n, s in zip(leaf.shape, leaf.stride(), strict=True) if n > 1)  # the others mean nothing
        return type(leaf), tuple(leaf.shape), strides, leaf.dtype, leaf.device
    if isinstance(leaf, Quantized):
        return _of_leaf(leaf.data, what), _of_leaf(leaf.scale, what), leaf.group
    if isinstance(leaf, PLAIN):
        return type(leaf), leaf  # True, 1 and 1.0 are equal
    raise TypeError(
        f"there is a {type(leaf).__name__} in {what}; with CUDA graphs tensors, numbers, strings, None and lists, "
        "tuples and dicts of them "
        "are supported: pass these, or leave cuda_graphs out of pab.enable"
    )
