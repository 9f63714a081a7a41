"""Step caches of diffusers stacked with PAB: what they skip computes at its next turn, and is counted as forced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.first_block_cache import FBCHeadBlockHook

from tests.works_with.combination import COGVIDEOX, FLUX, STEPS, WAN, Subject, check

pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # diffusers' own use
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),  # FasterCache's
]


def first_block() -> Any:
    return FirstBlockCacheConfig(threshold=0.5)


def mag() -> Any:
    """Skips steps 3 and 4, so that step 5 finds what step 2 kept for step 3."""
    return MagCacheConfig(
        mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS, retention_ratio=3 / STEPS, max_skip_steps=2
    )


def sea() -> Any:
    return SeaCacheConfig(threshold=10.0, retention_steps=2, max_consecutive_cached=1)


def taylor_seer() -> Any:
    """Predicts attention at steps 2 and 4."""
    return TaylorSeerCacheConfig(disable_cache_before_step=2, cache_interval=2, cache_identifiers=[r".*\.attn1?"])


def faster() -> Any:
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        attention_weight_callback=lambda module: 0.5,
        unconditional_batch_skip_range=4,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
        tensor_format="BFCHW",
    )


def diffusers_own() -> Any:
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )


def _guided(seed: int) -> dict[str, Any]:
    """Both branches of guidance in one batch."""
    branches = [COGVIDEOX.inputs(seed), COGVIDEOX.inputs(seed + 1)]
    return {
        k: torch.cat([b[k] for b in branches]) if isinstance(v, torch.Tensor) else v for k, v in branches[0].items()
    }


GUIDED = replace(COGVIDEOX, inputs=_guided)


@pytest.mark.parametrize(
    ("subject", "config", "forced"),
    [
        (WAN, first_block, False),
        (FLUX, first_block, False),
        (WAN, mag, True),
        (FLUX, mag, True),
        (WAN, sea, True),
        (FLUX, taylor_seer, True),
        (COGVIDEOX, taylor_seer, True),
        (GUIDED, faster, True),
        (WAN, diffusers_own, False),
        (COGVIDEOX, diffusers_own, False),
    ],
    ids=lambda v: getattr(v, "name", getattr(v, "__name__", "")),
)
def test_a_step_cache(subject: Subject, config: Callable[[], Any], forced: bool) -> None:
    check(subject, lambda model: model.enable_cache(config()), forced=forced)


@pytest.mark.parametrize("subject", [WAN, FLUX], ids=lambda s: s.name)
def test_first_block_cache_that_skips_what_is_to_be_reused(subject: Subject) -> None:
    """Its first block runs at every step and reuses; the others were skipped at steps 3 and 4."""

    def computes(hook: Any, residual: torch.Tensor) -> bool:
        return hook.state_manager.context.step_index not in (3, 4)

    check(
        subject,
        lambda model: model.enable_cache(first_block()),
        around=lambda: mock.patch.object(FBCHeadBlockHook, "_should_compute_remaining_blocks", computes),
        forced=True,
    )
