"""The plan: the action of each sublayer at each step of a generation, as host data made before the first step."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..messages import ranges
from .budget import FEWER_BITS, GivenUp, in_words
from .config import KINDS, Broadcast, PABConfig
from .costs import Cost, Forecast, HeldBytes
from .fitted import FittedWeights, fitted_notes
from .reuse import REUSES, Reuse
from .schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Action(enum.Enum):
    """The action of a sublayer at a step; the value is its mark in the printed plan."""

    COMPUTE = "#"
    STORE = "S"  # compute, and keep the output because a later step reads it
    REUSE = "."
    SKIP = " "  # does not run: the block around it, or the whole model, is reused


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a model.

    Args:
        name: the module's name in the model.
        kind: one of `KINDS`.
        layer: index of its block, for rules restricted to some layers.
        how: how it runs under PAB: "fused" (on the residual stream), "module" (called as it is) or "nn" (a module of
            `pab_kernels.nn`, which may keep more than its outputs).
        block: name of the `block` sublayer around it, if any.
        why: the evidence for its kind, in a few words, if it was found and not declared.
        keeps: name of a module in it whose output is computed once a generation in each context, and kept from the
            first run of the sublayer to its last one, if a sublayer in its block is reused at some step.
    """

    name: str
    kind: str
    layer: int
    how: str = "module"
    block: str | None = None
    why: str = ""
    keeps: str | None = None

    @property
    def owner(self) -> str:
        """Name of the block that it is or lies in, as far as its own name tells."""
        return self.name if self.kind == "block" else self.block or self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Decision:
    """One cell of the plan.

    Args:
        action: of the sublayer at the step.
        reads: for a reuse, the steps whose outputs are read, the newest first.
        held: number of outputs held after it: the newest ones, which a later step reads.
    """

    action: Action
    reads: tuple[int, ...] = ()
    held: int = 0


@dataclass(frozen=True)
class Counts:
    """Cells of a plan or of a run by action; `computed` includes `stored`."""

    computed: int = 0
    stored: int = 0
    reused: int = 0
    skipped: int = 0


def _row(
    rule: Broadcast | None, block: Sequence[Decision] | None, schedule: Schedule, computed_steps: Sequence[int]
) -> tuple[Decision, ...]:
    """The decisions of one sublayer, for the steps of `schedule`, of which the model runs at some."""
    steps = schedule.steps
    running = [i for i in computed_steps if block is None or block[i - schedule.begin].action is not Action.REUSE]
    reused = rule.reused(schedule, computed_steps) if rule else frozenset()
    outputs = REUSES[rule.reuse].outputs if rule else 0
    cells: dict[int, Decision] = {}
    computed: tuple[int, ...] = ()
    for i in running:
        if computed and i in reused:
            cells[i] = Decision(Action.REUSE, computed)
        else:
            computed = (i, *computed)[:outputs]
    last_reads = _last_reads(cells)
    released = Counter(last_reads.values())
    held, row = 0, []
    for i in steps:
        cell = cells.get(i, Decision(Action.SKIP))
        if i in running and i not in cells:
            cell = Decision(Action.STORE if i in last_reads else Action.COMPUTE)
        held += (cell.action is Action.STORE) - released[i]
        row.append(replace(cell, held=held))
    return tuple(row)


def _last_reads(cells: Mapping[int, Decision]) -> dict[int, int]:
    """For each step whose output is read, the last step that reads it; `cells` by step, in their order."""
    return {read: i for i, cell in cells.items() for read in cell.reads}


WHOLE = Sublayer("", "model", 0)
"""The whole model, under the name that it has among its own modules."""


def generic_sublayers(config: PABConfig) -> list[Sublayer]:
    """One sublayer for each kind in the config; if rules are restricted to layers, also one for each listed layer.

    If the config has a rule for blocks, the other sublayers lie in blocks, as in any model.
    """
    rules = config.broadcasts()
    named = {kind for kind, _ in rules}
    found = []
    for kind in KINDS:
        related = named if "block" in named else {kind}
        listed = sorted({layer for rule_kind, rule in rules if rule_kind in related for layer in rule.layers or ()})
        for layer in [*listed, (listed[-1] + 1 if listed else 0)] if kind in named else []:
            suffix = f".{layer}" if listed else ""
            block = f"block{suffix}" if "block" in named and kind != "block" else None
            found.append(Sublayer(kind + suffix, kind, layer, block=block))
    return found


@dataclass(frozen=True)
class Plan:
    """The whole schedule of one generation.

    Args:
        config: the rules.
        schedule: the steps.
        sublayers: the model's sublayers in the order in which they run, a block after those in it; blocks without a
            rule are left out, and the whole model is added where it has one. Default: one for each kind of `config`.
        given_up: what it gives up for a budget; None without one.

    `str(plan)` is a drawing in text; `plan.plot()` draws a picture.
    """

    config: PABConfig
    schedule: Schedule
    sublayers: tuple[Sublayer, ...] = field(default=())
    given_up: GivenUp | None = None

    def __post_init__(self) -> None:
        if not self.sublayers:
            object.__setattr__(self, "sublayers", tuple(generic_sublayers(self.config)))
        optional = ("block", "model")
        ruled = tuple(s for s in self.sublayers if s.kind not in optional or self.config.rule(s.kind, s.layer))
        if self.config.rule("model", 0) and not any(s.kind == "model" for s in ruled):
            ruled = (*ruled, WHOLE)
        object.__setattr__(self, "sublayers", ruled)
        names = [s.name for s in self.sublayers]
        if len(set(names)) != len(names):
            raise ValueError(f"sublayer names must differ, got {names}")
        self.rows  # noqa: B018  refuses a rule that the schedule cannot serve

    @cached_property
    def rows(self) -> dict[str, tuple[Decision, ...]]:
        """The decisions of each sublayer, for the steps that are run."""
        made: dict[Any, tuple[Decision, ...]] = {}
        rows: dict[str, tuple[Decision, ...]] = {}
        running: Sequence[int] = self.steps
        for sublayer in sorted(self.sublayers, key=lambda s: (s.kind != "model", s.kind != "block")):
            rule = self._rule(sublayer)
            block = rows.get(sublayer.block) if sublayer.block else None
            key = rule, block, len(running)
            if key not in made:
                made[key] = _row(rule, block, self.schedule, running)
            rows[sublayer.name] = made[key]
            if sublayer.kind == "model":
                pairs = zip(self.steps, rows[sublayer.name], strict=True)
                running = [i for i, decision in pairs if decision.action is not Action.REUSE]
        return {s.name: rows[s.name] for s in self.sublayers}

    def _rule(self, sublayer: Sublayer) -> Broadcast | None:
        return None if sublayer.name in self._computed else self.config.rule(sublayer.kind, sublayer.layer)

    @cached_property
    def _computed(self) -> frozenset[str]:
        return frozenset(() if self.given_up is None else self.given_up.computed)

    @cached_property
    def _fewer_bits(self) -> frozenset[str]:
        return frozenset(() if self.given_up is None else self.given_up.fewer_bits)

    @cached_property
    def whole(self) -> str | None:
        """The name of the whole model, where it has a rule."""
        return next((s.name for s in self.sublayers if s.kind == "model"), None)

    @property
    def steps(self) -> range:
        """The steps that are run."""
        return self.schedule.steps

    def decision(self, name: str, step: int) -> Decision:
        """The cell of sublayer `name` at `step`."""
        return self.rows[name][step - self.schedule.begin]

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """The rules and fitted weights that have no effect on this schedule."""
        present = {s.kind for s in self.sublayers}
        in_effect = {(s.kind, self.config.rule(s.kind, s.layer)) for s in self.sublayers}
        notes = []
        for kind, rule in self.config.broadcasts():
            if rule.range == 1:
                continue
            if kind not in present:
                notes.append(f"{kind}: this model has no such sublayers")
            elif not any(s.kind == kind and rule.applies_to(s.layer) for s in self.sublayers):
                notes.append(f"{kind}: this model has no layers {ranges(rule.layers or ())}")
            elif (kind, rule) not in in_effect:  # a later rule wins
                continue
            elif rule.at is not None:
                points = rule.points(self.schedule)
                # a published table of timesteps is for several schedules, each of which has some of its points
                missing = [p for p in rule.at if p not in points] if rule.unit == "step" else [] if points else rule.at
                if rule.num_steps not in (None, self.schedule.num_steps):
                    notes.append(
                        f"{kind}: its steps are those of a schedule of {rule.num_steps}, and this one has "
                        f"{self.schedule.num_steps}: sample with the number of steps that the rule is for"
                    )
                elif missing:
                    listed = ", ".join(map(str, missing))
                    notes.append(f"{kind}: {rule.unit}s {listed} do not occur in this schedule and have no effect")
            elif not rule.reused(self.schedule):
                window = f"{rule.window} ({rule.unit}s)"
                notes.append(f"{kind}: range {rule.range} in the window {window} reuses no step of this schedule")
        return tuple(dict.fromkeys((*notes, *fitted_notes(self))))

    def counts(self) -> dict[str, Counts]:
        """Cells by kind and action, over all sublayers and steps."""
        return {
            kind: self._count(row for s in self.sublayers if s.kind == kind for row in [self.rows[s.name]])
            for kind in self.kinds()
        }

    def step_counts(self) -> dict[str, Counts]:
        """Steps by kind and action, for the sublayer of each kind that is reused most."""
        counts: dict[str, Counts] = {}
        for s in self.sublayers:
            counted = self._count([self.rows[s.name]])
            counts[s.kind] = max(counts.get(s.kind, counted), counted, key=lambda c: c.reused)
        return {kind: counts[kind] for kind in self.kinds()}

    def kinds(self) -> list[str]:
        """The kinds of the plan's sublayers, in the order of `KINDS`."""
        present = {s.kind for s in self.sublayers}
        return [kind for kind in KINDS if kind in present]

    @staticmethod
    def _count(rows: Iterable[Sequence[Decision]]) -> Counts:
        actions = [d.action for row in rows for d in row]
        stored = actions.count(Action.STORE)
        return Counts(
            actions.count(Action.COMPUTE) + stored, stored, actions.count(Action.REUSE), actions.count(Action.SKIP)
        )

    @cached_property
    def _columns(self) -> Sequence[Sequence[Decision]]:
        return list(zip(*self.rows.values(), strict=True)) or [()] * len(self.steps)

    def decisions(self, step: int) -> Sequence[Decision]:
        """The column of `step`: a decision for each sublayer."""
        return self._columns[step - self.schedule.begin]

    def program(self, step: int) -> Sequence[tuple[str, Decision]]:
        """Name and decision at `step` of each sublayer in `decided`, in the order in which they run."""
        return self._programs[step - self.schedule.begin]

    @cached_property
    def _programs(self) -> Sequence[Sequence[tuple[str, Decision]]]:
        decided = [(name, row) for name, row in self.rows.items() if name in self.decided]
        return [[(name, row[i]) for name, row in decided] for i in range(len(self.steps))]

    @cached_property
    def decided(self) -> frozenset[str]:
        """Names of the sublayers whose runs are decided: those reused at some step, and modules of `nn`, which may keep
        more than their outputs."""
        reused = [name for name, row in self.rows.items() if any(d.action is Action.REUSE for d in row)]
        return frozenset(reused).union(s.name for s in self.sublayers if s.how == "nn")

    @cached_property
    def runs(self) -> Mapping[str, Sequence[int]]:
        """The steps at which each sublayer runs."""
        run = (Action.COMPUTE, Action.STORE)
        return {
            name: [i for i, decision in zip(self.steps, row, strict=True) if decision.action in run]
            for name, row in self.rows.items()
        }

    @cached_property
    def keeping(self) -> frozenset[str]:
        """Names of the sublayers that keep something for the generation: those in blocks where something is reused."""
        active = {s.block or s.name for s in self.sublayers if s.name in self.decided}
        return frozenset(s.name for s in self.sublayers if s.keeps and s.block in active)

    def outputs(self, name: str) -> int:
        """The most outputs that a reuse of `name` reads; 1 if it is not a sublayer."""
        return self._reuses[name].outputs if name in self._reuses else 1

    def weights(self, name: str, step: int, sources: Sequence[int]) -> tuple[float, ...]:
        """The weights at `step` of the outputs of sublayer `name` from the steps `sources`: see `Reuse.weights`.

        Those that were fitted for these steps come first.
        """
        own = None if self.fitted is None else self.fitted.weight(name, step, sources)
        return self._reuses[name].weights(step, sources, self.schedule) if own is None else (own,)

    @cached_property
    def spans(self) -> Mapping[str, tuple[str, ...]]:
        """The blocks and the sublayers that share a slot, by the name of each of them."""
        spans = () if self.given_up is None else self.given_up.spans
        return {name: span for span in spans for name in span}

    def has_slot(self, name: str) -> bool:
        """Whether the outputs of a sublayer have a slot; that of a span is the last member's."""
        span = self.spans.get(name)
        return span is None or span[-1] == name

    def on_host(self, name: str) -> bool:
        """Whether the slots of sublayer `name` are in host memory."""
        return name in self._on_host

    @cached_property
    def _on_host(self) -> frozenset[str]:
        if self.config.cache_device is None:
            return frozenset()
        return frozenset(self.rows if self.given_up is None else self.given_up.on_host) - {self.whole}

    def cache_dtype(self, name: str) -> str | None:
        """The dtype of the slots of sublayer `name`; None for that of its outputs."""
        return FEWER_BITS if name in self._fewer_bits else self.config.cache_dtype

    def costs(self, by_dtype: Mapping[str | None, Mapping[str, Cost]]) -> dict[str, Cost]:
        """The cost of each sublayer in one call with its cache dtype, from those with every cache dtype."""
        return {name: by_dtype[self.cache_dtype(name)][name] for name in self.rows}

    @cached_property
    def fitted(self) -> FittedWeights | None:
        """The fitted weights of the config, if they are for this schedule."""
        fitted = self.config.fitted
        return None if fitted is None or fitted.mismatch(self.schedule) else fitted

    @cached_property
    def _reuses(self) -> dict[str, Reuse]:
        rules = {s.name: self._rule(s) for s in self.sublayers}
        return {name: REUSES["hold" if rule is None else rule.reuse] for name, rule in rules.items()}

    @cached_property
    def patterns(self) -> int:
        """Number of different columns, which is the number of compiled graphs; reuses of one and two outputs differ.

        Steps that skip the whole model have no graph.
        """
        rows = [row for name, row in self.rows.items() if name != self.whole]
        skipped = {i for i, d in enumerate(self.rows[self.whole]) if d.reads} if self.whole is not None else set()
        columns = [i for i in range(len(self.steps)) if i not in skipped]
        return len({tuple((row[i].action, len(row[i].reads)) for row in rows) for i in columns})

    def forecast(
        self, costs: Mapping[str, Cost], rest_flops: int = 0, contexts: int = 1, latents_bytes: int = 0
    ) -> Forecast:
        """FLOPs and bytes of a generation, without running it.

        Args:
            costs: of each sublayer in one call, by name (an adapter's `costs`, or measured).
            rest_flops: FLOPs of one call outside of the plan's sublayers.
            contexts: calls of the model in a step; each has its own slots.
            latents_bytes: of the sample that the scheduler's `step` gets, as large as the guided output. Rules
                with `reuse="forecast"` keep up to two of both.
        """
        from .forecast import forecast

        return forecast(self, costs, rest_flops, contexts, latents_bytes)

    def grouped(self) -> list[tuple[str, tuple[Decision, ...]]]:
        """The labelled rows of the drawings: sublayers of one kind with equal rows share one."""
        groups: dict[tuple[str, tuple[Decision, ...]], list[int]] = {}
        for s in self.sublayers:
            groups.setdefault((s.kind, self.rows[s.name]), []).append(s.layer)
        several = {kind for kind, _ in groups if sum(k == kind for k, _ in groups) > 1}
        if any(kind == "block" and rule.layers is not None for kind, rule in self.config.broadcasts()):
            several.add("block")  # those without a rule are left out
        labelled = []
        for kind, row in sorted(groups, key=lambda g: KINDS.index(g[0])):
            layers = sorted(set(groups[kind, row]))
            labelled.append((f"{kind} {ranges(layers)}" if kind in several else kind, row))
        return labelled

    def __str__(self) -> str:
        begin = f", entered at {self.schedule.begin}" if self.schedule.begin else ""
        end = f", left at {self.schedule.end}" if self.steps.stop < self.schedule.num_steps else ""
        legend = "# computed  S computed and stored  . reused"
        lines = [f"{self.schedule.num_steps} steps{begin}{end}, {self.patterns} patterns   {legend}"]
        groups = self.grouped()
        width = max((len(label) for label, _ in groups), default=0)
        for label, row in groups:
            c, marks = self._count([row]), "".join(d.action.value for d in row)
            skipped = f", {c.skipped} skipped" if c.skipped else ""
            lines.append(f"{label:<{width}} {marks}  {c.computed} computed, {c.reused} reused{skipped}")
        if self.fitted is not None:
            lines.append(str(self.fitted))
        if self.given_up is not None:
            lines.append(in_words(self))
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def plot(self, path: str | None = None, cost: HeldBytes | None = None) -> Figure:
        """Draw the plan as a pyramid, steps by kind, and save it to `path` if given: see `plot_plan`."""
        from .plot import plot_plan

        return plot_plan(self, path, cost)


def plan(config: PABConfig, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> Plan:
    """The plan of a config for a schedule, by kind, without a model.

    Args:
        config: the rules.
        num_steps: steps of the schedule.
        timesteps: of the schedule, if rules count in them.

    Returns:
        The plan, with one sublayer for each kind of the config.

    Raises:
        ValueError: neither is given, or a rule needs timesteps.

    >>> print(plan(PABConfig(spatial=2, temporal=4, cross=6), num_steps=20).rows["cross"][6].action)
    Action.STORE
    """
    return Plan(config, Schedule.of(num_steps, timesteps))
