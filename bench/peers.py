"""Other caches, enabled on a pipeline for comparison: those of diffusers, and cache-dit where it is installed.

Each has the settings that its documentation gives, at a few speeds. Where the defaults of its identifiers match nothing
in a model, those of the model are passed, as its users would. SeaCache is left out: it computes every step unless the
pipeline names steps and sigmas, which of diffusers 0.42 only Cosmos' does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
from diffusers import hooks

from pab_kernels.analysis.diffusers_pab import diffusers_pab
from pab_kernels.rules.schedule import Schedule

Enabled = contextlib.AbstractContextManager[Any]

_IDENTIFIERS = {
    "LatteTransformer3DModel": (
        r"transformer_blocks\.\d+\.(attn1|attn2|ff)",
        r"temporal_transformer_blocks\.\d+\.(attn1|ff)",
    ),
    "WanTransformer3DModel": (r"blocks\.\d+\.(attn1|attn2|ffn)",),
}
"""Modules that TaylorSeer predicts, by the class of the transformer."""


def peers(pipe: Any, schedule: Schedule, run: Callable[[], Any]) -> dict[str, Callable[[], Enabled]]:
    """By name, what enables each cache on a pipeline while its block runs.

    Args:
        pipe: the pipeline.
        schedule: of the sampling.
        run: samples once, for caches that are calibrated by a run.
    """
    steps, name = schedule.num_steps, type(pipe.transformer).__name__
    found: dict[str, Callable[[], Enabled]] = {"diffusers PAB 2/4/6": lambda: _pab(pipe, schedule)}
    for interval in (2, 3, 4):
        config = hooks.TaylorSeerCacheConfig(
            cache_interval=interval,
            disable_cache_before_step=max(3, round(0.15 * steps)),
            max_order=1,
            taylor_factors_dtype=pipe.transformer.dtype,
            cache_identifiers=list(_IDENTIFIERS[name]),
        )
        found[f"TaylorSeer {interval}"] = lambda config=config: _hooked(pipe, config)  # type: ignore[misc]
    for threshold in (0.05, 0.1, 0.2):
        block = hooks.FirstBlockCacheConfig(threshold)
        found[f"FirstBlockCache {threshold}"] = lambda config=block: _hooked(pipe, config)  # type: ignore[misc]
    for threshold in (0.03, 0.06, 0.12):
        found[f"MagCache {threshold}"] = lambda threshold=threshold: _mag(pipe, steps, threshold, run)  # type: ignore[misc]
    found["FasterCache"] = lambda: _hooked(pipe, _faster(pipe, schedule))
    if importlib.util.find_spec("cache_dit") is not None:
        for threshold in (0.08, 0.16, 0.24):
            for order in (0, 1):
                title = f"cache-dit DBCache {threshold}" + (f" TaylorSeer {order}" if order else "")
                found[title] = lambda t=threshold, o=order: _dbcache(pipe, t, o)  # type: ignore[misc]
    return found


@contextlib.contextmanager
def _hooked(pipe: Any, config: Any) -> Iterator[None]:
    pipe.transformer.enable_cache(config)
    # LattePipeline names no context, and the caches ask for one.
    named = pipe.transformer.cache_context("run") if isinstance(pipe, diffusers.LattePipeline) else None
    try:
        with named or contextlib.nullcontext():
            yield
    finally:
        pipe.transformer.disable_cache()


def _pab(pipe: Any, schedule: Schedule) -> Enabled:
    if isinstance(pipe, diffusers.LattePipeline):
        return diffusers_pab(pipe, (2, 4, 6), schedule)
    t = schedule.require_timesteps("diffusers' PAB")
    window = (t[round(0.85 * len(t))], t[round(0.15 * len(t))])
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=6,
        spatial_attention_timestep_skip_range=window,
        cross_attention_timestep_skip_range=window,
        current_timestep_callback=lambda: pipe.current_timestep,
    )
    return _hooked(pipe, config)


def _faster(pipe: Any, schedule: Schedule) -> Any:
    return hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        temporal_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        temporal_attention_timestep_skip_range=(-1, 681),
        spatial_attention_block_identifiers=(r"^blocks.*attn", r"^transformer_blocks.*attn"),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: pipe.current_timestep,
        tensor_format="BCFHW",
    )


def _mag(pipe: Any, steps: int, threshold: float, run: Callable[[], Any]) -> Enabled:
    """MagCache with the ratios that its own calibration prints after a run."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        _hooked(pipe, hooks.MagCacheConfig(calibrate=True, num_inference_steps=steps)),
    ):
        run()
    ratios = re.search(r"\[[-\d., e]+\]", printed.getvalue())
    if ratios is None:
        raise RuntimeError("MagCache printed no ratios")
    values = [float(v) for v in ratios[0].strip("[]").split(",")]
    return _hooked(pipe, hooks.MagCacheConfig(threshold=threshold, mag_ratios=values, num_inference_steps=steps))


@contextlib.contextmanager
def _dbcache(pipe: Any, threshold: float, order: int) -> Iterator[None]:
    import cache_dit

    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=4, residual_diff_threshold=threshold
    )
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)
