"""What a generation did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .config import KINDS
from .context import Tally
from .generation import Generation
from .plan import Plan


@dataclass(frozen=True)
class Summary:
    """What was computed, reused and stored in the generation begun last.

    Args:
        plan: its plan; None before the model's first call.
        contexts: by context and kind, how often sublayers ran, and what they cost.
        flops: of the model, with PAB.
        flops_without: of the same calls with nothing reused.
        cache_bytes: bytes of slots held now.
        peak_cache_bytes: the most that were held.
        plain_calls: calls of the model without PAB, because gradients were recorded.
        rest_seconds: of the model outside of its sublayers; None where seconds were not asked for.
        models: of a pipeline with several, what each did, by its name in the pipeline. All else is then their sum (of the peaks too, which
            they need not reach at the same time), contexts have the model's name before their own, and there is no plan.
    """

    plan: Plan | None
    contexts: dict[str, dict[str, Tally]]
    flops: int
    flops_without: int
    cache_bytes: int
    peak_cache_bytes: int
    plain_calls: int
    rest_seconds: float | None = None
    models: dict[str, Summary] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """FLOPs with PAB as a share of those without; 1 where none are counted."""
        return self.flops / self.flops_without if self.flops_without else 1.0

    @property
    def forced(self) -> int:
        """Sublayers that had to compute although the plan had a reuse."""
        return sum(t.forced for kinds in self.contexts.values() for t in kinds.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the plan: that follows from the config."""
        counted = {name: value for name, value in vars(self).items() if name not in ("plan", "contexts", "models")}
        contexts = {
            name: {kind: vars(tally) | {"flops_saved": tally.flops_saved} for kind, tally in c.items()} for name, c in self.contexts.items()
        }
        plans = [s.plan for s in self.models.values()] or [self.plan]
        notes = list(dict.fromkeys(note for plan in plans if plan for note in plan.notes))
        return {**counted, "flops_share": round(self.share, 4), "notes": notes, "contexts": contexts}

    def __str__(self) -> str:
        lines = [f"{name}: {s.plan or 'not called'}" for name, s in self.models.items()] or [str(self.plan)] * (self.plan is not None)
        for name, kinds in self.contexts.items():
            lines += self._table(f"context {name}", kinds)
        if not self.contexts:
            lines.append("the model was not called yet")
        if self.flops_without:
            lines.append(f"FLOPs {self.flops:.3e} of {self.flops_without:.3e} ({self.share:.1%})")
        lines.append(f"cache {self.cache_bytes / 2**20:.1f} MiB now, {self.peak_cache_bytes / 2**20:.1f} MiB at the peak")
        if self.rest_seconds is not None:
            lines.append(f"{self.rest_seconds:.3f} s outside of the sublayers")
        if self.plain_calls:
            lines.append(f"{self.plain_calls} calls ran plainly because gradients were recorded")
        return "\n".join(lines)

    def _table(self, title: str, kinds: dict[str, Tally]) -> list[str]:
        rows = [[title, "computed", "stored", "reused", "forced", "MiB now", "MiB at the peak"]]
        rows[0] += ["FLOPs saved"] if self.flops_without else []
        rows[0] += ["seconds"] if self.rest_seconds is not None else []
        for kind in sorted(kinds, key=KINDS.index):
            t = kinds[kind]
            rows.append([f"  {kind}", str(t.computed), str(t.stored), str(t.reused), str(t.forced)])
            rows[-1] += [f"{nbytes / 2**20:.1f}" for nbytes in (t.cache_bytes, t.peak_cache_bytes)]
            rows[-1] += [f"{t.flops_saved:.2e}" if t.flops_saved else "0"] if self.flops_without else []
            rows[-1] += [f"{t.seconds:.3f}"] if t.seconds is not None else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def together(models: Mapping[str, Summary]) -> Summary:
    """One summary of all models of a pipeline; of a single one, its own."""
    if len(models) == 1:
        return next(iter(models.values()))
    sums: dict[str, Any] = {}
    for name in (f.name for f in fields(Summary) if f.name not in ("plan", "contexts", "models")):
        known = [value for s in models.values() if (value := getattr(s, name)) is not None]
        sums[name] = sum(known) if known else None
    contexts = {f"{model}: {name}": kinds for model, s in models.items() for name, kinds in s.contexts.items()}
    return Summary(plan=None, contexts=contexts, models=dict(models), **sums)


def summarise(generation: Generation | None) -> Summary:
    """The summary of a generation; an empty one for None."""
    if generation is None:
        return Summary(None, {}, 0, 0, 0, 0, 0)
    contexts = generation.contexts.values()
    rest = [seconds for c in contexts if (seconds := c.rest_seconds()) is not None]
    return Summary(
        generation.plan,
        {c.name: c.tallies() for c in contexts},
        sum(c.flops for c in contexts),
        sum(c.flops_without for c in contexts),
        generation.meter.now,
        generation.meter.peak,
        generation.plain_calls,
        sum(rest) if rest else None,
    )
