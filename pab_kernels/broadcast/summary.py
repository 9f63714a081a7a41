"""What a generation did."""

from __future__ import annotations

from dataclasses import dataclass

from .config import KINDS
from .generation import Generation, Tally
from .plan import Plan


@dataclass(frozen=True)
class Summary:
    """What was computed, reused and stored in the generation begun last.

    Args:
        plan: its plan; None before the model's first call.
        contexts: by context and kind, how often sublayers ran.
        flops: of the model, with PAB.
        flops_without: of the same calls with nothing reused.
        cache_bytes: bytes of slots held now.
        peak_cache_bytes: the most that were held.
        plain_calls: calls of the model without PAB, because gradients were recorded.
    """

    plan: Plan | None
    contexts: dict[str, dict[str, Tally]]
    flops: int
    flops_without: int
    cache_bytes: int
    peak_cache_bytes: int
    plain_calls: int

    @property
    def share(self) -> float:
        """FLOPs with PAB as a share of those without; 1 where none are counted."""
        return self.flops / self.flops_without if self.flops_without else 1.0

    @property
    def forced(self) -> int:
        """Sublayers that had to compute although the plan had a reuse."""
        return sum(t.forced for kinds in self.contexts.values() for t in kinds.values())

    def __str__(self) -> str:
        lines = [] if self.plan is None else [str(self.plan)]
        for name, kinds in self.contexts.items():
            lines.append(f"context {name}:")
            for kind in sorted(kinds, key=KINDS.index):
                t = kinds[kind]
                lines.append(f"  {kind:<8} {t.computed} computed, {t.stored} of them stored, {t.reused} reused, {t.forced} forced")
        if not self.contexts:
            lines.append("the model was not called yet")
        if self.flops_without:
            lines.append(f"FLOPs {self.flops:.3e} of {self.flops_without:.3e} ({self.share:.1%})")
        lines.append(f"cache {self.cache_bytes / 2**20:.1f} MiB now, {self.peak_cache_bytes / 2**20:.1f} MiB at the peak")
        if self.plain_calls:
            lines.append(f"{self.plain_calls} calls ran plainly because gradients were recorded")
        return "\n".join(lines)


def summarise(generation: Generation | None) -> Summary:
    """The summary of a generation; an empty one for None."""
    if generation is None:
        return Summary(None, {}, 0, 0, 0, 0, 0)
    contexts = generation.contexts.values()
    return Summary(
        generation.plan,
        {c.name: {kind: Tally(**vars(tally)) for kind, tally in c.tallies.items()} for c in contexts},
        sum(c.flops for c in contexts),
        sum(c.flops_without for c in contexts),
        generation.meter.now,
        generation.meter.peak,
        generation.plain_calls,
    )
