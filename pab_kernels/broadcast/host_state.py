"""What of a model, its numbers aside, decides which work a call queues on the device: a CUDA graph holds for as long as it stays."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import nn

State = Mapping[str, Mapping[str, Hashable]]
"""By module and attribute."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device)


def host_state(model: nn.Module) -> State:
    """The attributes of all modules: numbers and strings as they are, tensors by their addresses, other objects by which they are.

    Of objects that are no modules, such as attention processors, their own numbers, strings and tensors are part of it.
    """
    return {name: {key: _of(value) for key, value in vars(m).items()} for name, m in model.named_modules()}


def difference(a: State, b: State) -> str | None:
    """The first attribute in which two states differ, or None."""
    if a == b:
        return None
    for name in [*a, *b]:
        old, new = a.get(name, {}), b.get(name, {})
        for key in [*old, *new]:
            if old.get(key, key) != new.get(key, key):
                return f"{name}.{key}".lstrip(".")
    return None


def _of(value: Any, deep: bool = True) -> Hashable:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return _address(value)
    if isinstance(value, (list, tuple)):
        return tuple(_of(v, deep) for v in value)
    if isinstance(value, dict):
        return tuple((k if isinstance(k, _PLAIN) else id(k), _of(v, deep)) for k, v in value.items())
    if not deep or isinstance(value, nn.Module) or not hasattr(value, "__dict__") or isinstance(value, type):
        return id(value)
    return id(value), tuple((k, _of(v, False)) for k, v in vars(value).items() if isinstance(v, (*_PLAIN, torch.Tensor)))


def _address(tensor: torch.Tensor) -> Hashable:
    if hasattr(tensor, "__tensor_flatten__"):  # quantised weights and the like are made of others
        return tuple(_address(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device
