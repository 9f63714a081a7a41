"""diffusers' Pyramid Attention Broadcast, run for comparison, with its computed calls counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..compat import PAB_HOOK, diffusers_hooks
from ..extras import require
from ..rules.config import DEFAULT_WINDOW, Broadcast
from ..rules.schedule import Schedule


@dataclass
class Observed:
    """What diffusers' PAB computed.

    Args:
        computed: number of computed calls of each attention module, by its name in the transformer.
        cache_bytes: peak size of the kept outputs after a call.
    """

    computed: dict[str, int] = field(default_factory=dict)
    cache_bytes: int = 0


def timesteps_around(schedule: Schedule, window: tuple[float, float]) -> tuple[float, float]:
    """Exclusive bounds in timesteps of the steps in `window`, which is in fractions."""
    t, n = schedule.require_timesteps("diffusers' PAB"), schedule.num_steps
    inside = Broadcast(2, window).inside(schedule)
    if not inside:
        return -2.0, -1.0
    first, last = inside[0], inside[-1]
    high = (t[first - 1] + t[first]) / 2 if first else t[first] + 1
    low = (t[last] + t[last + 1]) / 2 if last + 1 < n else -1.0
    return low, high


@contextlib.contextmanager
def diffusers_pab(pipe: Any, ranges: tuple[int, int, int], schedule: Schedule) -> Iterator[Observed]:
    """Enable diffusers' PAB on a Latte pipeline during the block.

    diffusers' default identifiers give temporal attention the spatial range; here each kind has its own.

    Args:
        pipe: a `LattePipeline`.
        ranges: spatial, temporal, cross.
        schedule: of the sampling, which places the default window.
    """
    transformer = pipe.transformer
    names = ("spatial", "temporal", "cross")
    blocks = ("^transformer_blocks", "^temporal_transformer_blocks", "^transformer_blocks")
    window = timesteps_around(schedule, DEFAULT_WINDOW)
    settings: dict[str, Any] = {}
    for name, reach, pattern in zip(names, ranges, blocks, strict=True):
        settings[f"{name}_attention_block_skip_range"] = reach
        settings[f"{name}_attention_timestep_skip_range"] = window
        settings[f"{name}_attention_block_identifiers"] = (pattern,)
    config = require("diffusers", "running diffusers' PAB").PyramidAttentionBroadcastConfig(
        **settings, current_timestep_callback=lambda: pipe.current_timestep
    )
    modules = {name: module for name, module in transformer.named_modules() if name.endswith(("attn1", "attn2"))}
    observed = Observed(dict.fromkeys(modules, 0))

    def count(name: str, *_: Any) -> None:
        observed.computed[name] += 1

    def note_cache(*_: Any) -> None:
        hooks = [hook for module in modules.values() if (hook := diffusers_hooks(module).get(PAB_HOOK)) is not None]
        kept = [hook.state.cache for hook in hooks if hook.state.cache is not None]
        observed.cache_bytes = max(observed.cache_bytes, sum(output.nbytes for output in kept))

    handles = [module.to_q.register_forward_hook(partial(count, name)) for name, module in modules.items()]
    handles.append(transformer.register_forward_hook(note_cache))
    transformer.enable_cache(config)
    try:
        yield observed
    finally:
        transformer.disable_cache()
        for handle in handles:
            handle.remove()
