"""Models that diffusers' `enable_cache` takes, and calling it."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from tests.adapters.tiny_models import FAMILIES

METHODS = {name: vars(CacheMixin)[name] for name in ("enable_cache", "disable_cache")}
CACHING = [tiny for tiny in FAMILIES if issubclass(getattr(diffusers, tiny.name), CacheMixin)]


def config(callback: Any = None, **rules: Any) -> PyramidAttentionBroadcastConfig:
    return PyramidAttentionBroadcastConfig(
        **{"spatial_attention_block_skip_range": 2} | rules, current_timestep_callback=callback or (lambda: 500)
    )


def out(model: Any, inputs: dict[str, Any]) -> Tensor:
    given = model(**inputs)[0]
    return given if isinstance(given, Tensor) else given[0]
