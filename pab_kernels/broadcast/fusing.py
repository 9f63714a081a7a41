"""Deciding which modules a fused operation may replace."""

from __future__ import annotations

import sys

import torch
from torch import nn


def fuses(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether `module` is a plain linear layer or norm with weights of the dtype of `x` on its device."""
    return (
        is_plain(module, nn.Linear, nn.LayerNorm, nn.RMSNorm)
        and is_original(type(module), "forward")
        and all(
            type(p) is nn.Parameter and p.device == x.device and p.dtype == x.dtype and p.stride(-1) == 1
            for p in module.parameters()
        )
    )


def is_plain(module: nn.Module, *classes: type) -> bool:
    """Whether the class of `module` is exactly one of `classes`, with no hook and no `forward` on the instance."""
    return has_no_hooks(module, *classes) and "forward" not in vars(module)


def has_no_hooks(module: nn.Module, *classes: type) -> bool:
    """Whether the class of `module` is exactly one of `classes`, with no hook of torch."""
    return (
        type(module) in classes
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
    )


def is_original(owner: type, name: str) -> bool:
    """Whether a class's method is the one that its source defines, not a patched one."""
    method = getattr(owner, name)
    in_source = getattr(method, "__globals__", None) is vars(sys.modules[owner.__module__])
    return in_source and method.__qualname__ == f"{owner.__qualname__}.{name}"


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is active on the device of `x`."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)
