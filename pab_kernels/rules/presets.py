"""Presets: published configs, and configs for other models.

The published ones are those of VideoSys (commit 4cce477), with its timestep windows, MLP tables and cache points.
Timesteps are compared as in VideoSys (`Broadcast.number`): rounded to bfloat16 where its Open-Sora casts them, and not
rounded in Open-Sora-Plan 1.2, whose sampler has fractional ones too. An MLP table lists timesteps of the model's
published schedules, each of which has some: Open-Sora's 480p clips of 2 s have all three, longer and larger ones have
one. If a schedule has none of them, `Plan.notes` reports it.

"demo" is for the model of the package: in the default window, every second output of every sublayer lies on the line
through the two before it.

"close", "balanced" and "fast" are for pipelines of any model and skip the whole model, with forecasts. They are not
calibrated: of 30 steps they run 24, 20 and 17. Their windows begin late: with few steps, an early step that is skipped
decides what is drawn (UniPC with 20 steps on the demo model, from .15 on: the worst clip loses 11 dB). "balanced-line"
does the same as "balanced" on the model's own output, where no scheduler is followed.
"""

from __future__ import annotations

from typing import Any

from .config import Broadcast, PABConfig


def _timesteps(lo: int, hi: int, *, exact: bool = False, **ranges: int) -> dict[str, Any]:
    return {kind: Broadcast(reach, (lo, hi), "timestep", exact=exact) for kind, reach in ranges.items()}


def _mlp(points: tuple[int, ...], layers: int) -> Broadcast:
    return Broadcast(3, unit="timestep", at=points, layers=tuple(range(layers)))


def _skipping(reach: int, lo: float, hi: float) -> PABConfig:
    return PABConfig(model=Broadcast(reach, (lo, hi), reuse="forecast"))


_LINE = Broadcast(2, reuse="linear")

_PRESETS: dict[str, PABConfig] = {
    "open-sora-1.2": PABConfig(
        **_timesteps(450, 930, spatial=2, temporal=4, cross=6), mlp=_mlp((676, 788, 864), 5), cache_point="post_gate"
    ),
    "open-sora-plan-1.1": PABConfig(
        **_timesteps(100, 850, spatial=2, temporal=4, cross=6),
        mlp=_mlp(tuple(range(738, 425, -24)), 7),
        cache_point="post_gate",
    ),
    "open-sora-plan-1.2": PABConfig(**_timesteps(100, 850, exact=True, spatial=2, cross=6)),
    "latte": PABConfig(
        **_timesteps(100, 800, spatial=2, temporal=3, cross=6),
        mlp=_mlp((720, 640, 560, 480, 400), 5),
        cache_point="post_gate",
    ),
    "cogvideox": PABConfig(**_timesteps(100, 850, spatial=2)),
    "vchitect": PABConfig(**_timesteps(100, 800, spatial=2, temporal=4, cross=6)),
    "demo": PABConfig(spatial=_LINE, temporal=_LINE, cross=_LINE, mlp=_LINE),
    "close": _skipping(2, 0.5, 0.9),
    "balanced": _skipping(2, 0.2, 0.9),
    "fast": _skipping(3, 0.25, 0.9),
    "balanced-line": PABConfig(model=Broadcast(2, (0.2, 0.9), reuse="linear")),
    "pab246": PABConfig(spatial=2, temporal=4, cross=6),
    "pab357": PABConfig(spatial=3, temporal=5, cross=7),
    "pab579": PABConfig(spatial=5, temporal=7, cross=9),
}

SKIPPING = ("close", "balanced", "fast")
"""Presets that skip the model with forecasts, from the most computed steps."""
FEWEST_STEPS = 12
"""With fewer steps, outputs change too much from one to the next for a preset that skips the model."""
LEAST_SKIPPED = 0.03
"""The share of the steps below which skipping them is not worth it to a preset."""


def presets() -> dict[str, PABConfig]:
    """All named configs."""
    return dict(_PRESETS)


def preset(name: str) -> PABConfig:
    """The config with a name in `presets()`; a ValueError if there is none."""
    if name not in _PRESETS:
        raise ValueError(f"there is no preset {name!r}; supported are {', '.join(sorted(_PRESETS))}")
    return _PRESETS[name]


def default_preset(follows_scheduler: bool) -> PABConfig:
    """The config that `enable` takes without one: for a pipeline whose one scheduler is followed, or for others."""
    return _PRESETS["balanced" if follows_scheduler else "balanced-line"]
