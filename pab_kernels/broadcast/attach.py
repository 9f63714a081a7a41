"""Methods of single objects, replaced and given back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Attached:
    """Stands in for the method `name` of `owner`, calling `replacement(original, *args, **kwargs)`.

    `detach` gives the object back as it was. If somebody else has wrapped the method since, the stand-in passes through to the original.
    A deep copy of the owner has its own plain method.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self.owner, self.name = owner, name
        self.original = getattr(owner, name)
        self.replacement: Callable[..., Any] | None = replacement
        self.__wrapped__ = self.original  # for inspect.signature
        self._was_own = name in vars(owner)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.replacement is None:
            return self.original(*args, **kwargs)
        return self.replacement(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copy = memo[id(self.owner)]
        return getattr(type(copy), self.name).__get__(copy)

    def detach(self) -> None:
        """Put back what was there."""
        self.replacement = None
        if vars(self.owner).get(self.name) is self:
            if self._was_own:
                setattr(self.owner, self.name, self.original)
            else:
                delattr(self.owner, self.name)


def attach_forward(module: nn.Module, replacement: Callable[..., Any]) -> Attached:
    """Replace a module's `forward`, inside of the hooks that diffusers and accelerate have put around it (offloading, casting)."""
    owner: Any = module
    name = "forward"
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and registry._fn_refs:
        owner = registry._fn_refs[0]
        name = "forward" if owner.original_forward is None else "original_forward"
    elif "_old_forward" in vars(module):
        name = "_old_forward"
    return Attached(owner, name, replacement)
