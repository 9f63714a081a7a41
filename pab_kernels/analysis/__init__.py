"""What broadcasting costs: in quality, measured and shown; in work and memory, forecast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import compare
    from .forecast import forecast

_HOMES = {"compare": "comparison", "forecast": "forecast"}

__all__ = ["compare", "forecast"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value  # instead of the module of the same name
    return value
