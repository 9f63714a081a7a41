"""Private attributes of diffusers, accelerate and torch; no other module names them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

REGISTRY = "_diffusers_hook"
"""Attribute of a module with the registry of its diffusers hooks."""
PAB_HOOK = "pyramid_attention_broadcast"
"""The name of diffusers' own PAB hooks."""
_OF_ACCELERATE = "_hf_hook"
_CACHE_CONFIG = "_cache_config"


# Hooks


def diffusers_hooks(module: nn.Module) -> dict[str, Any]:
    """diffusers' hooks on a module, by name."""
    return getattr(vars(module).get(REGISTRY), "hooks", {})


def hooks_in_words(module: nn.Module) -> list[str]:
    """The names of the diffusers and accelerate hooks on a module, for messages."""
    found = [f"diffusers' {name!r}" for name in diffusers_hooks(module)]
    return [*found, "accelerate's"] if hasattr(module, _OF_ACCELERATE) else found


def hook_holders(module: nn.Module) -> list[Any]:
    """The objects that hold the diffusers and accelerate hooks of a module."""
    return [vars(module)[name] for name in (REGISTRY, _OF_ACCELERATE) if name in vars(module)]


def forwards_held(module: Any) -> Iterator[tuple[Any, str]]:
    """(object, attribute) pairs that hold a `forward` of the module, the innermost diffusers hook first."""
    for function in function_holders(module):
        yield function, "forward" if function.original_forward is None else "original_forward"
    for name in ("_old_forward", "forward"):  # the first is accelerate's
        if hasattr(module, name):
            yield module, name


def function_holders(module: Any) -> list[Any]:
    """The objects in which diffusers' hooks hold the module's `forward`, the innermost first."""
    return list(getattr(vars(module).get(REGISTRY), "_fn_refs", ()))


def remove_hook(module: nn.Module, name: str) -> None:
    """Remove a diffusers hook that is never called, and its registry if that is then empty."""
    hooks = diffusers_hooks(module)
    del hooks[name]
    if not hooks:
        delattr(module, REGISTRY)


def forget_registries_of_children(model: nn.Module) -> None:
    """Invalidate diffusers' list of the modules that have hooks."""
    if hasattr(model, REGISTRY):
        getattr(model, REGISTRY).invalidate_child_registries_cache()


# diffusers' caches and parallelism


def set_cache_config(model: nn.Module, config: Any) -> None:
    """Set the config that makes `is_cache_enabled` true; None removes it."""
    if config is None:
        vars(model).pop(_CACHE_CONFIG, None)
    else:
        setattr(model, _CACHE_CONFIG, config)


def cache_configs(module: nn.Module) -> list[Any]:
    """The config of the cache enabled on a module, if any."""
    return [vars(module)[_CACHE_CONFIG]] if _CACHE_CONFIG in vars(module) else []


def forget_parallelism(module: nn.Module) -> None:
    """Make an attention module run on one device."""
    processor: Any = getattr(module, "processor", None)
    if hasattr(processor, "_parallel_config"):
        processor._parallel_config = None


# Models and pipelines


def runs_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled by its `compile`, or wraps a compiled one."""
    return module._compiled_call_impl is not None or uncompiled(module) is not module


def forward_compiled(module: nn.Module) -> bool:
    """Whether the `forward` of a module is a result of `torch.compile`."""
    forward: Any = module.forward
    return hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)


def uncompiled(model: Any) -> Any:
    """The model inside the result of `torch.compile`; any other model itself."""
    return getattr(model, "_orig_mod", model)


def is_compiled(candidate: Any, model: nn.Module) -> bool:
    """Whether `candidate` is the result of `torch.compile(model)`."""
    return isinstance(candidate, nn.Module) and candidate is not model and uncompiled(candidate) is model


def float32_modules(model: nn.Module) -> set[str]:
    """Names of modules that diffusers keeps in float32 whatever the model's dtype."""
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def execution_device(pipe: Any) -> torch.device:
    """The device on which a pipeline computes, even if its weights are offloaded."""
    return torch.device(pipe._execution_device)


def cleaned_caption(caption: str) -> str:
    """A caption, cleaned once as for T5 in DeepFloyd IF and models after it; needs ftfy and bs4."""
    from diffusers import LattePipeline

    return LattePipeline._clean_caption(LattePipeline, caption)


def without_dispatch_modes() -> contextlib.AbstractContextManager[Any]:
    """Run without the dispatch modes of the caller, such as its FLOP counters."""
    return _disable_current_modes()
