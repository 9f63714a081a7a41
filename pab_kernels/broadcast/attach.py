"""Methods of single objects, replaced and given back."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn


class Attached:
    """Stands in for the method `name` of `owner`, calling `replacement(original, *args, **kwargs)`.

    Where there is no such method, `original` does nothing. `detach` gives the object back as it was, also where hooks put around it since
    (or taken off) have moved the stand-in elsewhere on `module`. If somebody else has wrapped the method since, the stand-in passes through
    to the original. A deep copy of the owner, and a pickled one, has its own plain method.
    """

    # Slots: functools.update_wrapper, which hooks use, copies a wrapped object's __dict__ into the wrapper, and would keep all this alive.
    __slots__ = ("owner", "name", "original", "replacement", "__wrapped__", "_was_own", "_module")

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any], module: nn.Module | None = None) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name, _nothing)
        self.replacement: Callable[..., Any] | None = replacement
        self.__wrapped__ = self.original  # for inspect.signature
        self._was_own = name in vars(owner)
        self._module = module
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.replacement is None:
            return self._underneath()(*args, **kwargs)
        return self.replacement(self._underneath(), *args, **kwargs)

    def _underneath(self) -> Callable[..., Any]:
        """What it stands in for: the owner's own method, or that of its class as it is now."""
        if self._was_own or torch.compiler.is_compiling():
            return self.original
        method = getattr(type(self.owner), self.name, None)
        return MethodType(method, self.owner) if isinstance(method, FunctionType) else self.original

    def __reduce__(self) -> Any:
        return _as_it_was, (self.original,)

    def detach(self) -> None:
        """Put back what was there."""
        self.replacement = None
        for holder in (self.owner, self._module, *_hooks(self._module)):
            for name in [name for name, held in vars(holder).items() if held is self] if holder is not None else ():
                at_home = holder is self.owner and name == self.name
                of_class = getattr(self.original, "__func__", None) is getattr(type(holder), name, self)
                if (not self._was_own) if at_home else of_class:
                    delattr(holder, name)
                else:
                    setattr(holder, name, self.original)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The method of an object that has none."""


def _as_it_was(original: Any) -> Any:
    return original


def _hooks(module: nn.Module | None) -> list[Any]:
    """What diffusers' hooks on a module hold its `forward` in, the innermost first."""
    return list(getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()))


def innermost(module: nn.Module) -> tuple[Any, str]:
    """Where a module's `forward` is held, inside of the hooks that diffusers and accelerate have put around it: an object and a name."""
    places: list[tuple[Any, str]] = [(h, "forward" if h.original_forward is None else "original_forward") for h in _hooks(module)]
    places += [(module, name) for name in ("_old_forward", "forward") if hasattr(module, name)]
    return next((place for place in places if getattr(getattr(*place), "__self__", None) is module), places[0])


def attach_forward(module: nn.Module, replacement: Callable[..., Any]) -> Attached:
    """Replace a module's `forward`, inside of the hooks that diffusers and accelerate have put around it (offloading, casting)."""
    return Attached(*innermost(module), replacement, module)
