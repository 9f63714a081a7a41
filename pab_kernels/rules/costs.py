"""What a plan costs: that of a sublayer in one call, and that of a generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The cost of one sublayer in one call, from shapes alone.

    Args:
        flops: to compute it; for a `block`, those outside of its sublayers.
        slot_bytes: bytes of its slot.
        output_bytes: bytes of its output in the model's dtype; 0 if bytes moved are not needed.
        kept_flops: FLOPs, among `flops`, of what it keeps for a generation; see `Sublayer.keeps`.
        kept_bytes: bytes of it.
    """

    flops: int
    slot_bytes: int
    output_bytes: int = 0
    kept_flops: int = 0
    kept_bytes: int = 0


@dataclass(frozen=True)
class Forecast:
    """FLOPs and bytes of a whole generation, over all its contexts.

    Args:
        flops: with the plan.
        flops_without: with every sublayer computed at every step.
        flops_by_step: with the plan, step by step.
        cache_bytes: bytes held after each step: slots, and what sublayers keep for the generation (`Sublayer.keeps`).
        peak_cache_bytes: peak of these, also within a step, when a sublayer stores before another releases.
        peak_by_kind: peak of each kind's slots; the kinds need not peak at the same time.
        cache_bytes_by_kind: the same after each step, by kind; "text" is what sublayers keep, and "predictions" what
            outputs of skipped steps are predicted from.
        moved_bytes: bytes that reuses read and write in device memory; see `rules/forecast.py`.
    """

    flops: int
    flops_without: int
    flops_by_step: tuple[int, ...]
    cache_bytes: tuple[int, ...]
    peak_cache_bytes: int
    peak_by_kind: Mapping[str, int]
    cache_bytes_by_kind: Mapping[str, tuple[int, ...]]
    moved_bytes: int

    @property
    def share(self) -> float:
        """FLOPs with the plan as a share of those without; 1 if none are counted."""
        return self.flops / self.flops_without if self.flops_without else 1.0
