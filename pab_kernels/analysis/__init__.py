"""Measurements: what broadcasting rests on, its cost in quality, plans found by it, and forecasts of FLOPs and memory.

A folder for each question: `differences`, `quality`, `calibration` and `forecasts`. The modules beside them load, call
and measure pipelines.
"""

from .calibration.calibrate import calibrate
from .calibration.calibration import Calibration
from .differences import study
from .differences.study import Analysis, analyze
from .forecasts.forecasting import forecast
from .pipelines import load_pipeline
from .quality.comparison import compare

__all__ = ["Analysis", "Calibration", "analyze", "calibrate", "compare", "forecast", "load_pipeline", "study"]
