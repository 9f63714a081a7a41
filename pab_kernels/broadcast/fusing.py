"""Deciding which modules a fused operation may replace."""

from __future__ import annotations

import sys

import torch
from torch import nn

from ..ops.checks import LARGEST
from ..ops.norm import Norm


def fuses(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether `module` is a plain linear layer or norm of the channels of `x`, with weights of its dtype and device."""
    return (
        is_plain(module, nn.Linear, nn.LayerNorm, nn.RMSNorm)
        and is_original(type(module), "forward")
        and all(
            type(p) is nn.Parameter and p.device == x.device and p.dtype == x.dtype and p.stride(-1) == 1
            for p in module.parameters()
        )
        and (_is_linear_of(module, x) if isinstance(module, nn.Linear) else _is_norm_of(module, x))
    )


def _is_linear_of(linear: nn.Linear, x: torch.Tensor) -> bool:
    out, channels = linear.weight.shape
    return channels == x.shape[-1] and (linear.bias is None or linear.bias.shape == (out,))


def _is_norm_of(norm: nn.Module, x: torch.Tensor) -> bool:
    assert isinstance(norm, (nn.LayerNorm, nn.RMSNorm))
    channels = (x.shape[-1],)
    sized = tuple(norm.normalized_shape) == channels and all(p.shape == channels for p in norm.parameters())
    return sized and (norm.eps is None or 0 <= norm.eps <= LARGEST)


def norm_of(module: nn.Module, x: torch.Tensor) -> Norm:
    """The norm of the operations that a module which `fuses` on `x` is; without an eps it has torch's default, that of
    the dtype in which it computes."""
    assert isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    eps = module.eps
    if eps is None:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    if isinstance(module, nn.LayerNorm):
        return Norm("layer", module.weight, module.bias, eps)
    return Norm("rms", module.weight, None, eps)


def is_plain(module: nn.Module, *classes: type) -> bool:
    """Whether the class of `module` is exactly one of `classes`, with no hook and no `forward` on the instance."""
    return type(module) in classes and not has_hooks(module) and "forward" not in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether `module` has a hook of torch."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
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
