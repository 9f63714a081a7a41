"""Several things at once: an adapter, an attention backend, a step cache and offloaded weights, all on one model under
PAB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from diffusers import MagCacheConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from tests.works_with.combination import FLUX, STEPS, WAN, Subject, check
from tests.works_with.group_offloading import grouped, offloading

pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # diffusers' own use


@pytest.fixture(autouse=True)
def _the_default_afterwards() -> Iterator[None]:
    """`set_attention_backend` sets what other models use too."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry._active_backend = before


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("subject", [WAN, FLUX], ids=lambda s: s.name)
def test_all_at_once(subject: Subject, kind: str) -> None:
    pytest.importorskip("peft")
    from tests.works_with.lora import inject

    def combine(model: Any) -> None:
        inject(model)
        model.set_attention_backend("_native_math")
        model.enable_cache(
            MagCacheConfig(
                mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, retention_ratio=3 / STEPS, max_skip_steps=2
            )
        )
        grouped(
            model, kind, prefetch=True
        )  # last: when its first pass ends diffusers takes hooks out from under others, which are lost

    with offloading():
        check(subject, combine, forced=True)
