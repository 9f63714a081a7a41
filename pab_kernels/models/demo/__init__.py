"""The demo model: a small text-to-video diffusion transformer trained on captioned moving shapes, with its weights.

>>> from pab_kernels.models.demo import load                                 # doctest: +SKIP
>>> clips = load().generate(["a red circle moves right at night"], seeds=[0])  # doctest: +SKIP
"""

from __future__ import annotations

from .pipeline import SCHEDULERS, DemoPipeline, calibrated, load
from .shapes import Caption, parse, read_clip

__all__ = ["SCHEDULERS", "Caption", "DemoPipeline", "calibrated", "load", "parse", "read_clip"]
