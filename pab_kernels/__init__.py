"""Pyramid Attention Broadcast for diffusion transformers: attention outputs are reused across sampling steps.

>>> from pab_kernels import PABConfig, plan
>>> print(plan(PABConfig(spatial=2, temporal=4, cross=6), num_steps=10))
10 steps, 7 patterns   # computed  S computed and stored  . reused
spatial  ##S.S.S.##  7 computed, 3 reused
temporal #S..S...##  5 computed, 5 reused
cross    #S....S..#  4 computed, 6 reused
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .analysis.calibration.calibrate import calibrate
    from .analysis.calibration.fitting import fit
    from .api import context, disable, enable, generation, release, sublayers, summary
    from .parallel.parallelize import parallelize, unparallelize
    from .patch import patch_diffusers, unpatch_diffusers
    from .rules.config import Broadcast, PABConfig
    from .rules.plan import Plan, plan

_HOMES = {
    "calibrate": "analysis.calibration.calibrate",
    "fit": "analysis.calibration.fitting",
    "enable": "api",
    "disable": "api",
    "generation": "api",
    "release": "api",
    "context": "api",
    "sublayers": "api",
    "summary": "api",
    "parallelize": "parallel.parallelize",
    "unparallelize": "parallel.parallelize",
    "plan": "rules.plan",
    "Plan": "rules.plan",
    "Broadcast": "rules.config",
    "PABConfig": "rules.config",
    "patch_diffusers": "patch",
    "unpatch_diffusers": "patch",
}

__all__ = [
    "Broadcast",
    "PABConfig",
    "Plan",
    "calibrate",
    "context",
    "disable",
    "enable",
    "fit",
    "generation",
    "parallelize",
    "patch_diffusers",
    "plan",
    "release",
    "sublayers",
    "summary",
    "unparallelize",
    "unpatch_diffusers",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pab-kernels")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
