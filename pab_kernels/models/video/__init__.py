"""The video model: a small text-to-video diffusion transformer, trained by flow matching on real video.

>>> from pab_kernels.models.video import load                                # doctest: +SKIP
>>> clips = load().generate(["a street, close, fast"], seeds=[0])            # doctest: +SKIP
"""

from __future__ import annotations

from .captions import Caption, parse
from .pipeline import SCHEDULERS, VideoPipeline, load

__all__ = ["SCHEDULERS", "Caption", "VideoPipeline", "load", "parse"]
