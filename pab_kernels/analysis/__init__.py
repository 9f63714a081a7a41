"""What broadcasting rests on, what it costs in quality, measured and shown, and what it will cost in work and memory, forecast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison import compare
    from .forecasting import forecast
    from .pipelines import load_pipeline
    from .study import Analysis, analyze

_HOMES = {"Analysis": "study", "analyze": "study", "compare": "comparison", "forecast": "forecasting", "load_pipeline": "pipelines"}

__all__ = ["Analysis", "analyze", "compare", "forecast", "load_pipeline"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
