"""What diffusers, accelerate and torch keep on modules and pipelines under private names: the one place that knows
them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

REGISTRY = "_diffusers_hook"
"""Attribute of a module for the registry of diffusers' hooks on it."""
PAB_HOOK = "pyramid_attention_broadcast"
"""The name under which diffusers registers its own hooks of PAB."""
_OF_ACCELERATE = "_hf_hook"
_CACHE_CONFIG = "_cache_config"


# Hooks


def diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    """diffusers' hooks on a module, by name."""
    return getattr(vars(module).get(REGISTRY), "hooks", {})


def hooks_in_words(module: nn.Module) -> list[str]:
    """All hooks of diffusers and accelerate on a module, for messages."""
    found = [f"diffusers' {name!r}" for name in diffusers_hooks(module)]
    return [*found, "accelerate's"] if hasattr(module, _OF_ACCELERATE) else found


def hook_holders(module: nn.Module) -> list[Any]:
    """The objects in which diffusers and accelerate hold their hooks on a module."""
    return [vars(module)[name] for name in (REGISTRY, _OF_ACCELERATE) if name in vars(module)]


def forwards_held(module: Any) -> Iterator[tuple[Any, str]]:
    """Where hooks, and the module itself, hold a `forward` of a module, the innermost of diffusers' hooks first."""
    for function in function_holders(module):
        yield function, "forward" if function.original_forward is None else "original_forward"
    for name in ("_old_forward", "forward"):  # the first is accelerate's
        if hasattr(module, name):
            yield module, name


def function_holders(module: Any) -> list[Any]:
    """What diffusers' hooks on a module hold its `forward` in, the innermost first."""
    return list(getattr(vars(module).get(REGISTRY), "_fn_refs", ()))


def remove_hook(module: nn.Module, name: str) -> None:
    """Forget one of diffusers' hooks that is never called, and a registry that is empty then."""
    hooks = diffusers_hooks(module)
    del hooks[name]
    if not hooks:
        delattr(module, REGISTRY)


def forget_registries_of_children(model: nn.Module) -> None:
    """Let diffusers look again at which modules of a model have hooks."""
    if hasattr(model, REGISTRY):
        getattr(model, REGISTRY).invalidate_child_registries_cache()


# diffusers' caches and parallelism


def set_cache_config(model: nn.Module, config: Any) -> None:
    """Let `is_cache_enabled` be true, or with None what it was."""
    if config is None:
        vars(model).pop(_CACHE_CONFIG, None)
    else:
        setattr(model, _CACHE_CONFIG, config)


def cache_configs(module: nn.Module) -> list[Any]:
    """The config of the cache that is enabled on a module, if there is one."""
    return [vars(module)[_CACHE_CONFIG]] if _CACHE_CONFIG in vars(module) else []


def forget_parallelism(module: nn.Module) -> None:
    """Let an attention module run on one device, whatever its processor was told."""
    processor: Any = getattr(module, "processor", None)
    if hasattr(processor, "_parallel_config"):
        processor._parallel_config = None


# Models and pipelines


def uncompiled(model: Any) -> Any:
    """The model in what `torch.compile` made of it; any other model itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled(candidate: Any, model: nn.Module) -> bool:
    """Whether `candidate` is what `torch.compile` made of `model`."""
    return isinstance(candidate, nn.Module) and candidate is not model and uncompiled(candidate) is model


def float32_modules(model: nn.Module) -> set[str]:
    """Names of modules that diffusers keeps in float32 in a model of any dtype."""
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def execution_device(pipe: Any) -> torch.device:
    """Where a pipeline computes, also where its weights are elsewhere."""
    return torch.device(pipe._execution_device)
