"""Rules: which sublayers are broadcast, over how many steps and in which part of the sampling."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, get_args

from ..messages import shown
from .budget import parsed
from .fields import known_fields
from .fitted import FittedWeights
from .reuse import REUSES
from .schedule import MOST_STEPS, Schedule

Kind = Literal["spatial", "temporal", "cross", "mlp", "block", "model"]
Unit = Literal["fraction", "step", "timestep"]
CachePoint = Literal["pre_gate", "post_gate", "unprojected"]
CacheDtype = Literal["float8_e4m3fn", "int8", "int4"]
CacheDevice = Literal["cpu"]

KINDS: tuple[str, ...] = get_args(Kind)
MODULE_KINDS = tuple(kind for kind in KINDS if kind != "model")
"""What a module in a model may be taken for."""
DEFAULT_WINDOW = (0.15, 0.85)
"""The stable middle of the schedule, in fractions: the first and last 15 % change fast (PAB, section 3.1)."""
MOST_LAYERS = 4096
"""The most blocks that a rule lists."""
LARGEST = 2**63 - 1
"""The largest number in a rule: that of an index."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bfloat16(value: float) -> float:
    """`value` rounded to float32 and then to bfloat16, both to nearest even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + (bits >> 16 & 1)
    rounded: float = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
    return rounded


def _check_size(name: str, *values: float) -> None:
    if any(abs(value) > LARGEST for value in values):
        raise ValueError(f"{name} must be at most 2**63 - 1, got {shown(values[0] if len(values) == 1 else values)}")


def _listed(name: str, given: Any, most: int, without: str) -> tuple[int, ...]:
    """The numbers of an iterable, which may be endless, sorted and each once."""
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes))
    values = tuple(islice(given, most + 1)) if several else ()
    if len(values) > most:
        raise ValueError(f"{name} lists at most {most:,} numbers, got {shown(given)}; leave it out {without}")
    if not values or not all(_whole(v) and v >= 0 for v in values):
        raise ValueError(
            f"{name} must be a non-empty list of whole numbers from 0, got {shown(given)}; leave it out {without}"
        )
    _check_size(name, *values)
    return tuple(sorted(set(values)))


def _check_member(what: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {shown(value)} is not known; supported are {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Broadcast:
    """One kind's rule: compute once, then reuse.

    Step i is reused iff `i % range != 0`, counted from the generation's first call, and i lies in the window:
    `lo <= i / N < hi` (unit "fraction", of the full schedule of N steps), `lo <= i < hi` ("step"), or `lo < int(t) <
    hi` ("timestep", see `Broadcast.number`). With explicit steps `at` there is no window: each point of `at` that
    occurs in the schedule is computed and the `range - 1` steps after it are reused, up to the next point.

    With c the output computed last, at step s, and c_prev the one computed before it, at step p, step i reuses

        hold:    c
        linear:  c + w (c - c_prev)  with  w = (i - s) / (s - p)

    Linear is the straight line through both outputs. It keeps two outputs instead of one, and holds if nothing was
    computed before s. Kind `model` has a third reuse:

        forecast:  the model's guided output is predicted in the sampler's coordinates, and the latents are corrected
                   when the next output is known; see `broadcast/forecaster.py`

    Args:
        range: steps from one compute to the next, at least 1; 1 always computes. May be left out with `at`: every step
            between two points is then reused.
        window: `(lo, hi)`; default (0.15, 0.85) for fractions, required for the other units.
        unit: what `window` or `at` counts.
        reuse: "hold", "linear" or, for kind `model`, "forecast": see `rules/reuse.py`.
        layers: block indices to which the rule is restricted, at most 4,096; default all.
        at: explicit points in `unit` "step" or "timestep", at most 10,000.
        exact: for unit "timestep", whether timesteps are compared without rounding.
        num_steps: of the schedule whose steps `at` names; the plan of another one has a note. Default: not known.

    Raises:
        ValueError: a value is out of bounds.

    >>> Broadcast(4, (5, 15), "step").window
    (5, 15)
    """

    range: int | None = None
    window: tuple[float, float] | None = None
    unit: Unit = "fraction"
    reuse: str = "hold"
    layers: tuple[int, ...] | None = None
    at: tuple[int, ...] | None = None
    exact: bool = False
    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.range is not None or self.at is None:
            if not isinstance(self.range, int) or isinstance(self.range, bool) or self.range < 1:
                raise ValueError(
                    f"range must be a whole number of at least 1, got {shown(self.range)}; 1 computes at every step"
                )
            _check_size("range", self.range)
        _check_member("unit", self.unit, get_args(Unit))
        _check_member("reuse", self.reuse, tuple(REUSES))
        if not isinstance(self.exact, bool) or (self.exact and self.unit != "timestep"):
            got = f"{shown(self.exact)} with unit {self.unit!r}"
            raise ValueError(f"exact is True or False, and only unit='timestep' rounds; got {got}")
        if self.layers is not None:
            object.__setattr__(self, "layers", _listed("layers", self.layers, MOST_LAYERS, "for all layers"))
        if self.num_steps is not None and (not _whole(self.num_steps) or self.at is None or self.unit != "step"):
            got = f"{shown(self.num_steps)} with at={shown(self.at)} and unit {self.unit!r}"
            raise ValueError(
                f"num_steps is a whole number that goes with explicit steps `at` and unit='step', got {got}"
            )
        if self.at is not None:
            object.__setattr__(self, "at", _listed("at", self.at, MOST_STEPS, "for a window"))
            if self.window is not None:
                got = f"at={shown(self.at)} with window {shown(self.window)}"
                raise ValueError(f"explicit steps take no window, got {got}; leave one of the two out")
            if self.unit == "fraction":
                raise ValueError("explicit steps `at` need unit='step' or unit='timestep', got 'fraction'")
            if self.num_steps is not None and self.at[-1] >= self.num_steps:
                raise ValueError(
                    f"at names step {self.at[-1]}, and num_steps={shown(self.num_steps)} are counted from 0"
                )
            return
        window = DEFAULT_WINDOW if self.window is None and self.unit == "fraction" else self.window
        if window is None:
            raise ValueError(f"unit {self.unit!r} needs a window (lo, hi) in {self.unit}s")
        pair = tuple(islice(window, 3)) if isinstance(window, Iterable) and not isinstance(window, str) else ()
        if len(pair) != 2:
            raise ValueError(f"window must be a pair (lo, hi), got {shown(window)}")
        lo, hi = pair
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (lo, hi)) or not lo < hi:
            raise ValueError(f"window must be two numbers with lo < hi, got {shown(window)}")
        _check_size("a window's ends", lo, hi)
        if (lo < 0 and self.unit != "timestep") or (self.unit == "fraction" and hi > 1):
            bounds = "0 <= lo < hi" + (
                " <= 1; for steps or timesteps pass that unit" if self.unit == "fraction" else ""
            )
            raise ValueError(f"window {shown(window)} is out of bounds; unit {self.unit!r} supports {bounds}")
        object.__setattr__(self, "window", (lo, hi))

    def applies_to(self, layer: int) -> bool:
        """Whether block `layer` is under this rule."""
        return self.layers is None or layer in self._layers

    @cached_property
    def _layers(self) -> frozenset[int]:
        return frozenset(self.layers or ())

    def number(self, timestep: float) -> int:
        """The whole number that represents a timestep: `int(t)`, where a fractional t is first rounded to bfloat16.

        VideoSys compares this number. Its Open-Sora casts the fractional timesteps to the model's bfloat16: the
        published point 676 is the timestep 674.86. The timesteps of its other samplers are whole numbers. Rules with
        `exact` round nothing.
        """
        return int(timestep if self.exact or float(timestep).is_integer() else _bfloat16(timestep))

    def covers(self, timestep: float) -> bool:
        """Whether a timestep lies in the window of a rule that counts in timesteps."""
        assert self.window is not None
        return self.window[0] < self.number(timestep) < self.window[1]

    def points(self, schedule: Schedule) -> tuple[int, ...]:
        """The steps of `schedule` that `at` names; empty without `at`."""
        if self.at is None:
            return ()
        if self.unit == "step":
            return tuple(i for i in self.at if i in schedule.steps)
        host, at = schedule.require_timesteps(f"explicit steps at={shown(self.at)}"), frozenset(self.at)
        return tuple(i for i in schedule.steps if self.number(host[i]) in at)

    def reused(self, schedule: Schedule, running: Sequence[int] | None = None) -> frozenset[int]:
        """The steps at which the rule asks for reuse.

        Args:
            schedule: of the generation.
            running: the steps that count, those at which the model runs; default all.
        """
        steps = schedule.steps if running is None else running
        reach = self.range or len(steps)
        if self.at is None:
            inside = frozenset(self.inside(schedule))
            return frozenset(i for count, i in enumerate(steps) if count % reach and i in inside)
        reused, points, since = [], frozenset(self.points(schedule)), reach
        for i in steps:
            since = 0 if i in points else since + 1
            if 0 < since < reach:
                reused.append(i)
        return frozenset(reused)

    def inside(self, schedule: Schedule) -> tuple[int, ...]:
        """The steps of `schedule` in the window; none if the rule has no window."""
        if self.window is None:
            return ()
        if self.unit == "timestep":
            timesteps = schedule.require_timesteps(f"the window {self.window}")
            return tuple(i for i in schedule.steps if self.covers(timesteps[i]))
        lo, hi = self.window
        n = schedule.num_steps if self.unit == "fraction" else 1
        return tuple(i for i in schedule.steps if lo <= i / n < hi)

    def to_dict(self) -> dict[str, Any]:
        """The rule as a JSON-ready dict, which `from_dict` reads."""
        written = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and (k != "exact" or v)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in written.items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Broadcast:
        """The rule that `to_dict` wrote."""
        return cls(**known_fields(cls, data))


def _rule_from(pair: Any) -> Any:
    """A (kind, dict) pair as (kind, Broadcast); anything else unchanged, for `PABConfig` to refuse."""
    if isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[1], Mapping):
        return pair[0], Broadcast.from_dict(pair[1])
    return pair


@dataclass(frozen=True)
class PABConfig:
    """Rules for every kind, and how outputs are kept.

    Args:
        spatial, temporal, cross, mlp, block, model: a `Broadcast`, a range (shorthand for `Broadcast(range)`), or None:
            always computed. At a reuse of kind `model` nothing of the model runs, and the other rules count only the
            steps at which it runs.
        rules: further `(kind, Broadcast)` pairs for some layers; later ones override earlier ones and the six fields.
        cache_dtype: None keeps the model's dtype; "float8_e4m3fn" or "int8" keep 8 bits with a scale per 1 x 128
            channels, "int4" 4 bits with one per 1 x 32.
        cache_point: "pre_gate" (projected, gate applied at reuse), "post_gate" (gated) or "unprojected".
        fitted: weights of linear reuses by sublayer and step, in place of those of the line: see `pab.fit`.
        budget: the most bytes that a generation keeps on the device: a number, "8GiB", or a share of the memory that
            is free at the model's first call, 0.5 or "50%". The plan gives up what does not fit: see
            `rules/within_budget.py`. None for no limit.
        cache_device: None keeps outputs on the model's device; "cpu" keeps them in host memory, with a budget as few as
            needed: see `broadcast/offload.py`.

    Raises:
        ValueError: a value is not supported.

    >>> PABConfig(spatial=2, temporal=4, cross=6).rule("cross", layer=0).range
    6
    """

    spatial: Broadcast | int | None = None
    temporal: Broadcast | int | None = None
    cross: Broadcast | int | None = None
    mlp: Broadcast | int | None = None
    block: Broadcast | int | None = None
    model: Broadcast | int | None = None
    rules: tuple[tuple[Kind, Broadcast], ...] = ()
    cache_dtype: CacheDtype | None = None
    cache_point: CachePoint = "pre_gate"
    fitted: FittedWeights | None = None
    budget: int | float | str | None = None
    cache_device: CacheDevice | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            object.__setattr__(self, "budget", parsed(self.budget))
        for kind in KINDS:
            value = getattr(self, kind)
            if _whole(value):
                object.__setattr__(self, kind, Broadcast(value))
            elif value is not None and not isinstance(value, Broadcast):
                raise ValueError(f"{kind} must be a Broadcast, a range or None, got {shown(value)}")
        if not isinstance(self.rules, (tuple, list)):
            raise ValueError(f"rules must be a list of (kind, Broadcast) pairs, got {shown(self.rules)}")
        rules = []
        for rule in self.rules:
            kind, broadcast = rule if isinstance(rule, (tuple, list)) and len(rule) == 2 else (None, None)
            if not isinstance(broadcast, Broadcast):
                raise ValueError(f"rules must be (kind, Broadcast) pairs, got {shown(rule)}")
            _check_member("kind", kind, KINDS)
            rules.append((kind, broadcast))
        object.__setattr__(self, "rules", tuple(rules))
        for kind, broadcast in self.broadcasts():
            if broadcast.reuse == "forecast" and kind != "model":
                raise ValueError(f"{kind} takes reuse='hold' or 'linear', got 'forecast', which is for kind 'model'")
            if broadcast.layers is not None and kind == "model":
                raise ValueError(f"the model is one whole, got layers {shown(broadcast.layers)}; leave layers out")
        _check_member("cache_dtype", self.cache_dtype, (None, *get_args(CacheDtype)))
        _check_member("cache_device", self.cache_device, (None, *get_args(CacheDevice)))
        _check_member("cache_point", self.cache_point, get_args(CachePoint))
        if not isinstance(self.fitted, (FittedWeights, type(None))):
            raise ValueError(f"fitted must be FittedWeights or None, got {shown(self.fitted)}; pab.fit makes them")
        if self.fitted is not None and self.cache_point == "post_gate":
            raise ValueError(
                "fitted weights are for outputs before the gate, got cache_point 'post_gate'; supported are 'pre_gate' "
                "and 'unprojected'"
            )

    def storing(self, rules: PABConfig) -> PABConfig:
        """Other rules, for outputs that are kept where and within the budget that this config says."""
        return dataclasses.replace(rules, budget=self.budget, cache_device=self.cache_device)

    def rule(self, kind: str, layer: int) -> Broadcast | None:
        """The rule of one sublayer: the last that applies, or None."""
        _check_member("kind", kind, KINDS)
        found = None
        for rule_kind, broadcast in ((kind, getattr(self, kind)), *self.rules):
            if rule_kind == kind and broadcast is not None and broadcast.applies_to(layer):
                found = broadcast
        return found

    def may_reuse(self, kind: str, layer: int) -> bool:
        """Whether a sublayer is reused at some step of some schedule."""
        rule = self.rule(kind, layer)
        return rule is not None and rule.range != 1

    def broadcasts(self) -> list[tuple[str, Broadcast]]:
        """All (kind, rule) pairs; later ones override earlier ones."""
        fields = [(kind, getattr(self, kind)) for kind in KINDS if getattr(self, kind) is not None]
        return [*fields, *self.rules]

    def to_dict(self) -> dict[str, Any]:
        """The config as a JSON-ready dict, which `from_dict` reads."""
        data: dict[str, Any] = {
            kind: getattr(self, kind).to_dict() for kind in KINDS if getattr(self, kind) is not None
        }
        if self.rules:
            data["rules"] = [[kind, broadcast.to_dict()] for kind, broadcast in self.rules]
        data |= {"cache_dtype": self.cache_dtype, "cache_point": self.cache_point}
        data |= {} if self.budget is None else {"budget": self.budget}
        data |= {} if self.cache_device is None else {"cache_device": self.cache_device}
        return data if self.fitted is None else data | {"fitted": self.fitted.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PABConfig:
        """The config that `to_dict` wrote."""
        fields = known_fields(cls, data)
        for kind in KINDS:
            if isinstance(fields.get(kind), Mapping):
                fields[kind] = Broadcast.from_dict(fields[kind])
        if isinstance(fields.get("rules"), (tuple, list)):
            fields["rules"] = tuple(map(_rule_from, fields["rules"]))
        if isinstance(fields.get("fitted"), Mapping):
            fields["fitted"] = FittedWeights.from_dict(fields["fitted"])
        return cls(**fields)

    @staticmethod
    def preset(name: str) -> PABConfig:
        """A named config: see `presets()`."""
        from .presets import preset

        return preset(name)
