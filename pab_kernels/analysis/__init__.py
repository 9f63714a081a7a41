"""Measurements: what broadcasting rests on, its cost in quality, and forecasts of its FLOPs and memory.

A folder for each question: `differences`, `quality` and `forecasts`. The modules beside them load, call and measure
pipelines.
"""

from .differences import study
from .differences.study import Analysis, analyze
from .forecasts.forecasting import forecast
from .pipelines import load_pipeline
from .quality.comparison import compare

__all__ = ["Analysis", "analyze", "compare", "forecast", "load_pipeline", "study"]
