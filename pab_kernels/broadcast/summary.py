"""The summary of a generation: counts, FLOPs, bytes and seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..rules.config import KINDS
from ..rules.forecast import PREDICTIONS
from ..rules.plan import WHOLE, Plan
from ..rules.schedule import MOST_STEPS
from ..rules.traffic import Traffic
from .context import Tally
from .costs import CallCosts
from .generation import Generation
from .whole import shared

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Summary:
    """What was computed, stored and reused in a generation.

    Args:
        plan: its plan; None before the model's first call.
        contexts: counts and costs by context and kind.
        flops: FLOPs of the model with PAB; 0 if they are not known for every model, which is logged.
        flops_without: FLOPs of the same calls without reuse.
        cache_bytes: bytes of slots held now on the device, by all generations of the model.
        peak_cache_bytes: the most bytes that the generation held at once on the device.
        plain_calls: number of plain calls of the model since the generation began: those that recorded gradients or
            belonged to no run.
        rest_seconds: seconds of the model outside its sublayers; None if seconds were not measured.
        graphs: number of CUDA graphs now, including those captured by earlier generations; None without CUDA graphs.
        graph_bytes: device memory of the graphs in bytes: places of slots, inputs, and the memory pool of the captured
            work; None without CUDA graphs.
        traffic: what this rank sent to others, if the model is parallel; without PAB, what the same calls would have
            sent.
        host_bytes: bytes of slots held now in host memory, by all generations of the model.
        peak_host_bytes: the most bytes that the generation held at once in host memory.
        cache_bytes_by_kind: bytes held on the device after each step of the plan, by kind; 0 after those to come.
        host_bytes_by_kind: the same in host memory.
        models: for a pipeline with several models, the summary of each by its name in the pipeline. The other fields
            are then sums (also of the peaks, although these may be reached at different times), contexts are named
            "model: context", and `plan` is None.
    """

    plan: Plan | None
    contexts: dict[str, dict[str, Tally]]
    flops: int
    flops_without: int
    cache_bytes: int
    peak_cache_bytes: int
    plain_calls: int
    rest_seconds: float | None = None
    graphs: int | None = None
    graph_bytes: int | None = None
    traffic: Traffic | None = None
    host_bytes: int = 0
    peak_host_bytes: int = 0
    cache_bytes_by_kind: dict[str, tuple[int, ...]] = field(default_factory=dict)
    host_bytes_by_kind: dict[str, tuple[int, ...]] = field(default_factory=dict)
    models: dict[str, Summary] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """FLOPs with PAB divided by those without; 1 if they are not known."""
        return self.flops / self.flops_without if self.flops_without else 1.0

    @property
    def forced(self) -> int:
        """Number of planned reuses that had to compute."""
        return sum(t.forced for kinds in self.contexts.values() for t in kinds.values())

    def plot(self, path: str | None = None) -> Figure:
        """Draw the plan and, below it, the bytes held after each step, by kind and place; save it to `path` if given.

        Raises:
            ValueError: there is no plan, or one for each of several models: draw those in `models`.
        """
        if self.plan is None:
            raise ValueError(
                f"got a summary of {len(self.models) or 'no'} models' plans; one is drawn: call the model first, or "
                "draw each of summary.models"
            )
        return self.plan.plot(path, self)

    def to_dict(self) -> dict[str, Any]:
        """The summary as values for JSON, without the plan, which follows from the config."""
        counted = {name: value for name, value in vars(self).items() if name not in ("plan", "contexts", "models")}
        contexts = {
            name: {kind: vars(tally) | {"flops_saved": tally.flops_saved} for kind, tally in c.items()}
            for name, c in self.contexts.items()
        }
        plans = [s.plan for s in self.models.values()] or [self.plan]
        notes = list(dict.fromkeys(note for plan in plans if plan for note in plan.notes))
        counted["traffic"] = self.traffic and self.traffic.to_dict()
        return {**counted, "flops_share": round(self.share, 4), "notes": notes, "contexts": contexts}

    def __str__(self) -> str:
        lines = [f"{name}: {s.plan or 'not called'}" for name, s in self.models.items()] or [str(self.plan)] * (
            self.plan is not None
        )
        for name, kinds in self.contexts.items():
            lines += self._table(f"context {name}", kinds)
        if not self.contexts:
            lines.append("the model was not called yet")
        if self.flops_without:
            lines.append(f"FLOPs {self.flops:.3e} of {self.flops_without:.3e} ({self.share:.1%})")
        for place, now, peak in (
            ("cache", self.cache_bytes, self.peak_cache_bytes),
            ("in host memory", self.host_bytes, self.peak_host_bytes),
        ):
            if peak or place == "cache":
                lines.append(f"{place} {now / 2**20:.1f} MiB now, {peak / 2**20:.1f} MiB at the peak")
        if self.rest_seconds is not None:
            lines.append(f"{self.rest_seconds:.3f} s outside of the sublayers")
        if self.graphs is not None and self.graph_bytes is not None:
            lines.append(f"{self.graphs} CUDA graphs, {self.graph_bytes / 2**20:.1f} MiB")
        if self.traffic is not None:
            lines.append(f"sent by this rank: {self.traffic}")
        if self.plain_calls:
            lines.append(
                f"{self.plain_calls} calls ran plainly: gradients were recorded, or they belonged to no sampling run"
            )
        return "\n".join(lines)

    def _table(self, title: str, kinds: dict[str, Tally]) -> list[str]:
        rows = [[title, "computed", "stored", "reused", "forced", "MiB now", "MiB at the peak"]]
        rows[0] += ["on the host now", "at the peak"] if self.peak_host_bytes else []
        rows[0] += ["FLOPs saved"] if self.flops_without else []
        rows[0] += ["seconds"] if self.rest_seconds is not None else []
        for kind in sorted(kinds, key=KINDS.index):
            t = kinds[kind]
            rows.append([f"  {kind}", str(t.computed), str(t.stored), str(t.reused), str(t.forced)])
            held = [t.cache_bytes, t.peak_cache_bytes]
            held += [t.host_bytes, t.peak_host_bytes] if self.peak_host_bytes else []
            rows[-1] += [f"{nbytes / 2**20:.1f}" for nbytes in held]
            rows[-1] += [f"{t.flops_saved:.2e}" if t.flops_saved else "0"] if self.flops_without else []
            rows[-1] += ["" if t.seconds is None else f"{t.seconds:.3f}"] if self.rest_seconds is not None else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def with_held(found: Summary, generations: Iterable[Generation]) -> Summary:
    """The summary with the bytes that all these generations hold now."""
    meters = [generation.meter for generation in generations]
    return replace(found, cache_bytes=sum(m.now for m in meters), host_bytes=sum(m.host.now for m in meters))


NOT_SUMMED = ("plan", "contexts", "traffic", "cache_bytes_by_kind", "host_bytes_by_kind", "models")
"""The fields of a summary that are those of one model."""


def together(models: Mapping[str, Summary]) -> Summary:
    """One summary for all models of a pipeline."""
    if len(models) == 1:
        return next(iter(models.values()))
    sums: dict[str, Any] = {}
    for name in (f.name for f in fields(Summary) if f.name not in NOT_SUMMED):
        known = [value for s in models.values() if (value := getattr(s, name)) is not None]
        sums[name] = sum(known) if known else None
    # A model was called and its FLOPs are not known: the sum is not known either.
    if any(any(s.contexts.values()) and not s.flops_without for s in models.values()):
        sums["flops"] = sums["flops_without"] = 0
    contexts = {f"{model}: {name}": kinds for model, s in models.items() for name, kinds in s.contexts.items()}
    return Summary(plan=None, contexts=contexts, models=dict(models), **sums)


@dataclass
class _Flops:
    """FLOPs of a context's calls without reuse, those saved, and both by kind."""

    full: int = 0
    saved: int = 0
    full_by_kind: Counter[str] = field(default_factory=Counter)
    saved_by_kind: Counter[str] = field(default_factory=Counter)

    def of(self, tally: Tally, kind: str) -> Tally:
        """The tally of a kind, with its FLOPs."""
        full = self.full_by_kind[kind]
        return replace(tally, flops=full - self.saved_by_kind[kind], flops_without=full)


def _flops(of_context: Mapping[Any, int], costs: dict[Any, CallCosts], kinds: dict[str, str]) -> _Flops:
    found = _Flops()
    for (arguments, reused, spared), calls in of_context.items():
        call = costs[arguments]
        found.full += calls * call.flops
        for run in call.runs.values():
            found.full_by_kind[kinds[run.name]] += calls * run.own[run.name]
        for run in (call.runs[where] for where in reused if where in call.runs):
            found.saved += calls * run.flops
            for name, flops in run.own.items():
                found.saved_by_kind[kinds[name]] += calls * flops
        for kind, flops in spared:
            found.saved += calls * flops
            found.saved_by_kind[kind] += calls * flops
    return found


def _without_turns(
    generation: Generation, of_context: Mapping[Any, int], costs: Mapping[Any, CallCosts] | None
) -> Counter[str]:
    """The runs, by kind, of the sublayers that are never reused, which no call counts."""
    assert generation.plan is not None, "it was called"
    others = {s.name: s for s in generation.plan.sublayers if s.name not in generation.plan.decided}
    found: Counter[str] = Counter()
    for (arguments, reused, _), calls in of_context.items():
        ran = others if costs is None else [run.name for run in costs[arguments].runs.values() if run.name in others]
        skipped = {WHOLE.name, *(s.block for s in others.values())}.intersection(reused)
        for name in ran if WHOLE.name not in skipped else ():
            if others[name].block not in skipped:
                found[others[name].kind] += calls
    return found


def _by_step(generation: Generation) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Bytes after each step by kind, on the device and in host memory."""
    if generation.plan is None or generation.schedule.num_steps == MOST_STEPS:  # or its end is not known
        return {}, {}
    held = generation.held_after | ({} if generation.over else {generation.step: generation.held_now()})
    rows = [held.get(step, {}) for step in generation.plan.steps]
    kinds = [kind for kind in (*KINDS, PREDICTIONS) if any(kind in row for row in rows)]
    device = {kind: tuple(row[kind].now if kind in row else 0 for row in rows) for kind in kinds}
    host = {kind: tuple(row[kind].host.now if kind in row else 0 for row in rows) for kind in kinds}
    return device, {kind: found for kind, found in host.items() if any(found)}


def summarise(generation: Generation | None, model: nn.Module) -> Summary:
    """The summary of a generation of `model`; an empty one for None."""
    if generation is None:
        return Summary(None, {}, 0, 0, 0, 0, 0)
    contexts = tuple(generation.contexts.values())
    kinds = {s.name: s.kind for s in (*generation.sublayers, WHOLE)}
    calls = {c.name: dict(c.calls) for c in contexts}  # copies, as another thread may still call the model
    costs = generation.costs(model, {arguments for of_context in calls.values() for arguments, _, _ in of_context})
    flops = {
        name: _Flops() if costs is None else _flops(of_context, costs, kinds) for name, of_context in calls.items()
    }
    tallies = {}
    for c in contexts:
        here, found = c.tallies(), flops[c.name]
        if c.stopwatch is None:
            for kind, runs in _without_turns(generation, calls[c.name], costs).items():
                tally = here.setdefault(kind, Tally())
                tally.computed += runs
        # Kinds whose sublayers were only reused inside blocks never had a turn.
        within = [kind for kind in found.saved_by_kind if kind not in here]
        tallies[c.name] = {
            kind: found.of(tally, kind) for kind, tally in (*here.items(), *((kind, Tally()) for kind in within))
        }
    between_ranks = shared(model)
    rest = [seconds for c in contexts if (seconds := c.rest_seconds()) is not None]
    return Summary(
        generation.plan,
        tallies,
        sum(f.full - f.saved for f in flops.values()),
        sum(f.full for f in flops.values()),
        generation.meter.now,
        generation.meter.peak,
        generation.plain_calls,
        sum(rest) if rest else None,
        None if generation.graphs is None else len(generation.graphs),
        None if generation.graphs is None else generation.graphs.nbytes,
        None if between_ranks is None else between_ranks.traffic(generation),
        generation.meter.host.now,
        generation.meter.host.peak,
        *_by_step(generation),
    )
