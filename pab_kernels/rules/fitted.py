"""Fitted weights: for single sublayers and steps, what stands in place of the weight of the line.

At a linear reuse, step i reads c from step s and c_prev from step p, and its value is `c + w (c - c_prev)`. The line
through both has `w = (i - s) / (s - p)`. A fitted w is the least-squares one of recorded full runs,

    w = sum <c_i - c, c - c_prev> / sum ||c - c_prev||^2,

over contexts and clips. It belongs to one sublayer, to the step i, to the steps s and p, and to the schedule of these
runs. Wherever one of them is another one, the line is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..messages import shown
from .fields import known_fields
from .schedule import Schedule

if TYPE_CHECKING:
    from .plan import Plan, Sublayer

LARGEST_WEIGHT = 1000.0
"""The largest fitted weight: one above it would turn the rounding of outputs that hardly change into noise."""
_APART = 1e-3
"""How far timesteps may be from those of the fit, as a part of the largest one: a twentieth of a step of 50."""


def _numbers(values: Any, kinds: tuple[type, ...] = (int,)) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(v, kinds) and not isinstance(v, bool) for v in values)


@dataclass(frozen=True)
class FittedRow:
    """Weights of sublayers that are reused at the same steps.

    Args:
        reads: for each reuse, the step at which it happens and the two steps whose outputs it reads: (i, s, p).
        weights: by the name of the sublayer, w for each entry of `reads`.

    Raises:
        ValueError: a value is out of bounds, or the numbers of weights and of reuses differ.
    """

    reads: tuple[tuple[int, int, int], ...]
    weights: Mapping[str, tuple[float, ...]] = field(hash=False)

    def __post_init__(self) -> None:
        reads = [tuple(read) if _numbers(read) else () for read in self.reads] if _is_list(self.reads) else []
        if not reads or not all(len(read) == 3 and read[0] > read[1] > read[2] >= 0 for read in reads):
            raise ValueError(
                "reads must be a list of steps (i, s, p) with i > s > p >= 0: the step of a reuse, and those whose "
                f"outputs it reads; got {shown(self.reads)}"
            )
        if len({read[0] for read in reads}) < len(reads):
            raise ValueError(f"reads must name each step once, got {shown(self.reads)}")
        if not isinstance(self.weights, Mapping) or not all(isinstance(name, str) for name in self.weights):
            raise ValueError(f"weights must be lists by the names of sublayers, got {shown(self.weights)}")
        for name, row in self.weights.items():
            if not _numbers(row, (int, float)) or len(row) != len(reads):
                raise ValueError(
                    f"the weights of {name!r} must be {len(reads)} numbers, one for each of reads, got {shown(row)}"
                )
            if not all(abs(w) <= LARGEST_WEIGHT for w in row):
                raise ValueError(
                    f"the weights of {name!r} must be at most {LARGEST_WEIGHT:g} in size, got {shown(row)}"
                )
        object.__setattr__(self, "reads", tuple(reads))
        object.__setattr__(self, "weights", {name: tuple(map(float, row)) for name, row in self.weights.items()})

    def of(self, name: str) -> Iterable[tuple[tuple[int, int, int], float]]:
        """The weights of a sublayer, each with its entry of `reads`."""
        return zip(self.reads, self.weights[name], strict=True)

    def to_dict(self) -> dict[str, Any]:
        """The row as a JSON-ready dict."""
        return {"reads": list(map(list, self.reads)), "weights": {k: list(row) for k, row in self.weights.items()}}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


@dataclass(frozen=True)
class FittedWeights:
    """Weights of linear reuses by sublayer and step, for one schedule; `pab.fit` makes them.

    Args:
        num_steps: of the full schedule.
        rows: the weights.
        timesteps: of the full schedule, if they are known.

    Raises:
        ValueError: a value is out of bounds, or a sublayer has two weights at one step.

    >>> row = FittedRow(reads=((9, 8, 6),), weights={"blocks.0.attn": (0.4,)})
    >>> FittedWeights(50, (row,)).weight("blocks.0.attn", 9, (8, 6))
    0.4
    """

    num_steps: int
    rows: tuple[FittedRow, ...]
    timesteps: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", Schedule.of(self.num_steps, self.timesteps).timesteps)
        if not _is_list(self.rows) or not self.rows or not all(isinstance(row, FittedRow) for row in self.rows):
            raise ValueError(f"rows must be a list of FittedRow, got {shown(self.rows)}")
        object.__setattr__(self, "rows", tuple(self.rows))
        places = [(name, read[0]) for row in self.rows for name in row.weights for read in row.reads]
        late = [step for _, step in places if step >= self.num_steps]
        if late:
            raise ValueError(f"fitted weights of {self.num_steps} steps are for steps below that, got {late[0]}")
        if len(set(places)) < len(places):
            name, step = next(place for place in places if places.count(place) > 1)
            raise ValueError(f"{name!r} has two fitted weights at step {step}; leave one out")

    @cached_property
    def _by_place(self) -> dict[tuple[str, int, int, int], float]:
        pairs = [(read, name, w) for row in self.rows for name in row.weights for read, w in row.of(name)]
        return {(name, *read): w for read, name, w in pairs}

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the sublayers that have weights."""
        return frozenset(name for row in self.rows for name in row.weights)

    def weight(self, name: str, step: int, sources: Sequence[int]) -> float | None:
        """The weight at `step` of a sublayer whose outputs are from the steps `sources`; None if none was fitted."""
        return self._by_place.get((name, step, *sources))  # type: ignore[arg-type]

    def mismatch(self, schedule: Schedule) -> str | None:
        """Why the weights are not for `schedule`; None if they are. Unknown timesteps count as equal."""
        if schedule.num_steps != self.num_steps:
            return f"fitted weights are for {self.num_steps} steps and this schedule has {schedule.num_steps}"
        if schedule.timesteps is None or self.timesteps is None:
            return None
        pairs = list(zip(self.timesteps, schedule.timesteps, strict=True))
        largest = max(map(abs, self.timesteps))
        for step, (own, given) in enumerate(pairs):
            if not math.isclose(own, given, rel_tol=0.0, abs_tol=_APART * largest):
                return f"fitted weights are for timestep {own:g} at step {step} and this schedule has {given:g}"
        return None

    def check_names(self, sublayers: Iterable[Sublayer], model: str) -> None:
        """Raise a ValueError if a name is neither one of these sublayers of `model` nor "", the whole model."""
        unknown = sorted(self.names - {"", *(s.name for s in sublayers)})
        if unknown:
            raise ValueError(
                f"fitted weights name {shown(unknown[0])}, which is no sublayer of this {model}; fit them on it with "
                "pab.fit, or leave `fitted` out"
            )

    def to_dict(self) -> dict[str, Any]:
        """The weights as a JSON-ready dict, which `from_dict` reads."""
        timesteps = {} if self.timesteps is None else {"timesteps": list(self.timesteps)}
        return {"num_steps": self.num_steps, **timesteps, "rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FittedWeights:
        """The weights that `to_dict` wrote."""
        fields = known_fields(cls, data)
        if _is_list(fields["rows"]):
            fields["rows"] = tuple(FittedRow(**known_fields(FittedRow, row)) for row in fields["rows"])
        return cls(**fields)

    def __str__(self) -> str:
        steps = [read[0] for row in self.rows for read in row.reads]
        return f"fitted weights of {len(self.names)} sublayer(s), steps {min(steps)} to {max(steps)}"


def fitted_notes(plan: Plan) -> Iterable[str]:
    """Where the fitted weights of a plan's config do not apply."""
    fitted = plan.config.fitted
    if fitted is None:
        return
    mismatch = fitted.mismatch(plan.schedule)
    if mismatch is not None:
        yield f"{mismatch}: reuses take the line; fit them for this schedule with pab.fit"
        return
    if not fitted.names & plan.rows.keys():  # a plan by kind, without a model
        return
    steps = list(plan.steps)
    reuses = [
        (name, i, decision.reads)
        for name, row in plan.rows.items()
        for i, decision in zip(steps, row, strict=True)
        if len(decision.reads) == 2
    ]
    without = sum(fitted.weight(*reuse) is None for reuse in reuses)
    if not reuses:
        yield "the rules reuse nothing linearly on this schedule: the fitted weights have no effect"
    elif without:
        yield (
            f"{without} of {len(reuses)} linear reuses have no fitted weights and take the line: the rules or the "
            "first step are not those of the fit"
        )
