"""What of a model, the values in its tensors aside, decides which work a call queues: a CUDA graph holds for as long as
it stays."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from types import NoneType
from typing import Any

import torch
from torch import nn

from ...compat import REGISTRY

State = Mapping[str, Mapping[str, Hashable]]
"""By module and attribute."""

_NUMBERS = {NoneType, bool, int, float, complex, str, bytes, torch.dtype, torch.device}

_ELSEWHERE = {REGISTRY}
"""Pipelines put an empty registry on a model; hooks in one are looked for where graphs are captured."""


def host_state(model: nn.Module) -> State:
    """The attributes of all modules: numbers and strings as they are, tensors by their addresses, other objects by
    which they are.

    Of objects that are no modules, such as attention processors, their own numbers, strings and tensors are part of it.
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
    if hasattr(tensor, "__tensor_flatten__"):  # quantised weights and the like are made of others
        return tuple(_address(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
