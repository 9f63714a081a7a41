"""What a plan costs: that of a sublayer in one call, and that of a generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


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


class HeldBytes(Protocol):
    """Bytes held after each step, by kind and place, and their peaks: a `Forecast`, or the summary of a run."""

    @property
    def cache_bytes_by_kind(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def host_bytes_by_kind(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def peak_cache_bytes(self) -> int: ...
    @property
    def peak_host_bytes(self) -> int: ...


@dataclass(frozen=True)
class Forecast:
    """FLOPs and bytes of a whole generation, over all its contexts.

    Args:
        flops: with the plan.
        flops_without: with every sublayer computed at every step.
        flops_by_step: with the plan, step by step.
        cache_bytes: bytes held on the device after each step: slots, and what sublayers keep for the generation
            (`Sublayer.keeps`).
        peak_cache_bytes: peak of these, also within a step, when a sublayer stores before another releases, and when
            outputs are on their way to host memory or back.
        peak_by_kind: peak of each kind's slots, wherever they are; the kinds need not peak at the same time.
        cache_bytes_by_kind: `cache_bytes` by kind; "text" is what sublayers keep, and "predictions" what outputs of
            skipped steps are predicted from.
        moved_bytes: bytes that reuses read and write in device memory; see `rules/forecast.py`.
        host_bytes: bytes held in host memory after each step.
        peak_host_bytes: peak of these.
        host_bytes_by_kind: `host_bytes` by kind.
        fetched_bytes: bytes that each step copies from host memory.
        sent_bytes: bytes that each step copies to host memory.
    """

    flops: int
    flops_without: int
    flops_by_step: tuple[int, ...]
    cache_bytes: tuple[int, ...]
    peak_cache_bytes: int
    peak_by_kind: Mapping[str, int]
    cache_bytes_by_kind: Mapping[str, tuple[int, ...]]
    moved_bytes: int
    host_bytes: tuple[int, ...] = ()
    peak_host_bytes: int = 0
    host_bytes_by_kind: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fetched_bytes: tuple[int, ...] = ()
    sent_bytes: tuple[int, ...] = ()

    def least_step_seconds(self, bandwidth: float) -> float:
        """The seconds that a step without PAB must at least take so that copies to and from host memory keep up.

        Step i copies `max(fetched_i, sent_i)` bytes, as both ways are used at once, in the time that its FLOPs take:

            max over i of  max(fetched_i, sent_i) / bandwidth * (full FLOPs of a step) / flops_i

        Within a step, blocks are taken to compute and to copy at an even pace.

        Args:
            bandwidth: of the bus, in bytes a second each way.
        """
        full = self.flops_without / max(1, len(self.flops_by_step))
        steps = zip(self.fetched_bytes, self.sent_bytes, self.flops_by_step, strict=True)
        return max((max(a, b) / bandwidth * full / max(1, flops) for a, b, flops in steps if a or b), default=0.0)

    @property
    def share(self) -> float:
        """FLOPs with the plan as a share of those without; 1 if none are counted."""
        return self.flops / self.flops_without if self.flops_without else 1.0
