"""A snapshot of the host state that decides which work a model queues; a CUDA graph is valid until it changes."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import nn

from ...compat import REGISTRY

State = Mapping[str, Mapping[str, Hashable]]
"""Snapshots of attributes, by module and attribute name."""

_NUMBERS = {NoneType, bool, int, float, complex, str, bytes, torch.dtype, torch.device}

_ELSEWHERE = {REGISTRY}
"""Attributes left out: pipelines put an empty hook registry on a model, and hooks in it are checked elsewhere."""


def host_state(model: nn.Module) -> State:
    """A snapshot of every module's attributes: numbers and strings by value, tensors by address, others by identity.

    It includes the numbers, strings and tensors in attributes of objects that are no modules, such as attention
    processors.
    """
    return {
        name: {key: _of(value) for key, value in vars(m).items() if value is not None and key not in _ELSEWHERE}
        for name, m in model.named_modules()
    }


def difference(a: State, b: State) -> str | None:
    """The first attribute in which two states differ, or None."""
    if a == b:
        return None
    names = ((name, key) for name in {**a, **b} for key in {**a.get(name, {}), **b.get(name, {})})
    return next(
        f"{name}.{key}".lstrip(".") for name, key in names if a.get(name, {}).get(key) != b.get(name, {}).get(key)
    )


def _of(value: Any, deep: bool = True) -> Hashable:
    if type(value) in _NUMBERS or isinstance(value, enum.Enum):
        return value
    if isinstance(value, dict):
        return tuple([(k if type(k) in _NUMBERS else id(k), _of(v, deep)) for k, v in value.items()])
    if isinstance(value, torch.Tensor):
        return _address(value)
    if isinstance(value, (list, tuple)):
        return tuple([_of(v, deep) for v in value])
    if not deep or isinstance(value, (nn.Module, type)) or not hasattr(value, "__dict__"):
        return id(value)
    own = vars(value).items()
    return id(value), tuple(
        [(k, _of(v, False)) for k, v in own if type(v) in _NUMBERS or isinstance(v, (enum.Enum, torch.Tensor))]
    )


def _address(tensor: torch.Tensor) -> Hashable:
    if hasattr(tensor, "__tensor_flatten__"):  # a subclass made of other tensors, such as quantised weights
        return tuple(_address(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
