"""What broadcasting rests on, what it costs in quality, measured and shown, and what it will cost in work and memory,
forecast.

A folder for each question: `differences`, `quality` and `forecasts`. The modules beside them load, call and measure
pipelines.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .differences import study
    from .differences.study import Analysis, analyze
    from .forecasts.forecasting import forecast
    from .pipelines import load_pipeline
    from .quality.comparison import compare

_HOMES = {
    "Analysis": "differences.study",
    "analyze": "differences.study",
    "compare": "quality.comparison",
    "forecast": "forecasts.forecasting",
    "load_pipeline": "pipelines",
}

__all__ = ["Analysis", "analyze", "compare", "forecast", "load_pipeline", "study"]


def __getattr__(name: str) -> Any:
    if name == "study":
        return importlib.import_module(".differences.study", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
