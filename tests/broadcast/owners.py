"""Objects whose methods are replaced."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Counter:
    """Something with a method and a state."""

    def __init__(self) -> None:
        self.total = 0

    def add(self, amount: int, times: int = 1) -> int:
        """Add to the total."""
        self.total += amount * times
        return self.total


class Inc(nn.Module):
    def forward(self, x: Tensor, by: int = 1) -> Tensor:
        return x + by


def doubled(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return 2 * original(*args, **kwargs)


class Owner:
    """As the broadcaster: its bound method is the replacement."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # which cannot be copied

    def run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return doubled(original, *args, **kwargs)


def out(module: nn.Module) -> float:
    return module(torch.zeros(1)).item()


def accelerate_hook(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


def accelerate_unhook(module: nn.Module) -> None:
    pytest.importorskip("accelerate.hooks").remove_hook_from_module(module)


def diffusers_hooks(module: nn.Module, *kinds: str) -> Any:
    hooks = pytest.importorskip("diffusers.hooks.hooks")

    class Replacing(hooks.ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.fn_ref.original_forward(*args, **kwargs)

    registry = hooks.HookRegistry.check_if_exists_or_initialize(module)
    for kind in kinds:
        registry.register_hook(Replacing() if kind == "replacing" else hooks.ModelHook(), kind)
    return registry
