"""What a calibration is asked for, and what it may cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...messages import shown
from ...rules.presets import FEWEST_STEPS
from ...rules.schedule import check_steps
from ..quality.clips import check_values
from ..sampling import check_seed
from .sampler import Clip

SEARCHED = 3
"""Clips that the search measures on."""
VERIFIED = 4
"""Clips that verify, where no more prompts are given."""
VERIFIED_OF_FLOOR = 6
"""Those of a floor, which they decide."""
FEWEST = 3
"""Clips that verify, at least."""
COMPARED = 2.15
"""Generations that comparing with three other ways to sample costs on one clip."""
TARGETS = ("floor", "flops", "seconds", "speed")


@dataclass(frozen=True)
class Target:
    """One of: a floor in dB, a share of the FLOPs, seconds of a call, a speed-up of calls.

    Args:
        name: one of `TARGETS`.
        value: of it.
    """

    name: str
    value: float

    @classmethod
    def of(cls, **given: float | None) -> Target:
        """The target among the arguments of `calibrate`.

        Raises:
            ValueError: none or several are given, or the value is out of bounds.
        """
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            got = ", ".join(f"{name}={shown(value)}" for name, value in named.items()) or "none"
            raise ValueError(f"calibrate takes exactly one of {', '.join(TARGETS)}, got {got}")
        ((name, value),) = named.items()
        least, most = {"floor": (0.0, 100.0), "flops": (0.1, 1.0), "seconds": (0.0, math.inf), "speed": (1.0, 10.0)}[
            name
        ]
        if not _is_number(value) or not least < value < most:
            meant = {"floor": "dB", "flops": "a share", "seconds": "seconds", "speed": "a factor"}[name]
            raise ValueError(f"{name} is {meant} above {least:g} and below {most:g}, got {shown(value)}")
        return cls(name, float(value))

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def check_sampling(num_steps: Any, seed: Any, values: Any = (0.0, 1.0), most_generations: Any = 20) -> None:
    """Refuse what no calibration runs.

    Raises:
        ValueError: the number of steps is too small to leave any out, or a value is out of bounds.
    """
    check_values(values)
    if not _is_number(most_generations):
        raise ValueError(f"most_generations must be a number, got {shown(most_generations)}; usual is 20")
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < FEWEST_STEPS:
        raise ValueError(
            f"num_steps must be a whole number of at least {FEWEST_STEPS}, got {shown(num_steps)}; with fewer steps "
            "outputs change too much from one to the next: leave the model as it is"
        )
    check_steps(num_steps, "num_steps")
    check_seed(seed, 1000)


def clips_of(prompts: Sequence[Any], seed: int, verified: int = VERIFIED) -> tuple[list[Clip], list[Clip], list[str]]:
    """The clips of the search, those that verify, and notes.

    Args:
        prompts: at least one.
        seed: of the first clip; the next ones have the next seeds.
        verified: clips that verify, at least.

    Raises:
        ValueError: there is no prompt.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts is a list of at least one prompt, got {shown(prompts)}")
    wanted = SEARCHED + max(len(prompts) - SEARCHED, verified)
    clips = [Clip(prompts[i % len(prompts)], seed + i) for i in range(wanted)]
    notes = []
    if len(prompts) < wanted:
        notes.append(
            f"{len(prompts)} prompt(s) for {wanted} clips: other seeds of the same prompts verify; give "
            f"{wanted} prompts to verify on prompts that the search has not seen"
        )
    return clips[:SEARCHED], clips[SEARCHED:], notes


@dataclass(frozen=True)
class Budget:
    """How the generations are spent.

    Args:
        gains: recordings on which gains are measured.
        verified: clips that verify.
        compared: clips on which other ways to sample are measured.
        ways: plans, and fewer steps, that are compared at a share of the FLOPs.
        tiers: of the plans with further tiers, those that are compared.
        total: generations in all.
    """

    gains: int
    verified: int
    compared: int
    ways: int
    tiers: int
    total: float


_POSSIBLE = (
    (2, 2, 5, 2),
    (1, 2, 5, 2),
    (1, 1, 5, 2),
    (1, 1, 4, 1),
    (1, 1, 4, 0),
    (1, 1, 3, 0),
    (0, 1, 3, 0),
    (0, 1, 2, 0),
)
"""Gains, compared, ways and tiers, from the most."""


def budget(most: float, target: Target, clips: int, gain_cost: float) -> Budget:
    """The most that fits into `most` generations.

    Args:
        most: generations.
        target: of the calibration.
        clips: that may verify.
        gain_cost: generations that the gains of one recording cost.

    Raises:
        ValueError: the least does not fit.
    """
    share = target.value if target.name == "flops" else 1 / target.value if target.name == "speed" else 0.65
    least = math.inf
    for verified in range(clips, min(clips, FEWEST) - 1, -1):
        for gains, compared, ways, tiers in _POSSIBLE:
            total = SEARCHED + gains * gain_cost + verified * (1 + share)
            if target.name == "floor":  # a guess, and a second attempt with more steps; what is left compares
                total += SEARCHED * 0.6 + verified * 0.75
            else:
                total += compared * (2 * share + 0.85)
                total += share * (ways + tiers + min(ways + tiers, 3) + 2 * (SEARCHED - 2))
            if target.name in ("seconds", "speed"):
                total += 2 * share
            if total <= most:
                return Budget(gains, verified, compared, ways, tiers, most if target.name == "floor" else total)
            least = min(least, total)
    least = math.ceil(10 * least) / 10
    raise ValueError(
        f"calibrating for {target} takes at least {least:.1f} generations, got most_generations={most:g}; raise it, or "
        "give fewer prompts"
    )
