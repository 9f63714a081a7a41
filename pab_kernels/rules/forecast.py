"""The cost of a plan: FLOPs, bytes of slots and bytes moved, as host numbers.

Bytes moved are those of the reuses, if the costs have output bytes:

    fused:   consecutive reuses in a block add up to `MOST_ADDED` outputs at a time. For n outputs the stream is read
             and written once and each output is read once: (4 + 2 n) C bytes a token at 16 bits
    module:  each output is read once, and the output that the model gets is written

The model's own norm and modulation in the same pass, which write `2 C` more, are not counted, nor is the model's use of
an output that it gets. An addition fused into the projection before it is counted as if it were separate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..limits import MOST_ADDED
from .costs import Cost, Forecast
from .plan import Action, Plan

TEXT, PREDICTIONS = "text", "predictions"
"""What is kept beside the slots of each kind: by sublayers for a generation, and to predict the model's output."""
ON_ITS_WAY = "on its way"
"""Outputs on the device that are copied to host memory, or were copied from there."""
DEVICE, HOST = "device", "host"
_RUN = (Action.COMPUTE, Action.STORE)


def forecast(
    plan: Plan, costs: Mapping[str, Cost], rest_flops: int = 0, contexts: int = 1, latents_bytes: int = 0
) -> Forecast:
    """See `Plan.forecast`."""
    columns = range(len(plan.steps))
    run = [[name for name, row in plan.rows.items() if row[i].action in _RUN] for i in columns]
    skipped = [plan.whole is not None and plan.whole not in names for names in run]
    flops = [
        0 if skips else contexts * (rest_flops + sum(flops_at(plan, costs, name, step) for name in names))
        for step, names, skips in zip(plan.steps, run, skipped, strict=True)
    ]
    full = contexts * len(columns) * (rest_flops + sum(costs[name].flops for name in plan.rows))
    held = _held(plan, costs, contexts, latents_bytes)
    by_kind = {kind: held.peak[kind] for kind in plan.kinds()}
    kept = [kind for kind in (*by_kind, TEXT, PREDICTIONS) if held.peak[kind]]
    on_device, on_host = (
        {kind: tuple(after[place, kind] for after in held.after) for kind in kept} for place in (DEVICE, HOST)
    )
    moved = contexts * sum(_moved(plan, i, costs) for i in columns)
    return Forecast(
        sum(flops),
        full,
        tuple(flops),
        _sums(on_device, columns),
        held.peak[DEVICE],
        by_kind,
        on_device,
        moved,
        _sums(on_host, columns),
        held.peak[HOST],
        {kind: found for kind, found in on_host.items() if any(found)},
        tuple(held.fetched),
        tuple(held.sent),
    )


def _sums(by_kind: Mapping[str, Sequence[int]], columns: range) -> tuple[int, ...]:
    return tuple(sum(found[i] for found in by_kind.values()) for i in columns)


def peak_bytes(
    plan: Plan,
    costs: Mapping[str | None, Mapping[str, Cost]],
    contexts: int = 1,
    latents_bytes: int = 0,
    fixed: bool = False,
) -> int:
    """The most bytes held at once.

    Args:
        plan: of the generation.
        costs: of each sublayer in one call, by cache dtype.
        contexts, latents_bytes: see `Plan.forecast`.
        fixed: whether the memory of slots is kept for the whole generation, as in CUDA graphs.
    """
    own = plan.costs(costs)
    peak = _held(plan, own, contexts, latents_bytes).peak[DEVICE]
    if not fixed:
        return peak
    places = sum(plan.outputs(name) * own[name].slot_bytes for name in plan.decided if plan.has_slot(name))
    without_slots = _held(plan, {name: Cost(0, 0) for name in own}, contexts, latents_bytes)
    return contexts * places + without_slots.peak[DEVICE]


class _Held:
    """Bytes held as a generation goes on.

    Args:
        plan: of the generation.
    """

    def __init__(self, plan: Plan) -> None:
        self.peak: Counter[str] = Counter()
        """The most at once, by kind and by place."""
        self.after: list[Counter[tuple[str, str]]] = []
        """After each step, by place and kind."""
        self.fetched = [0] * len(plan.steps)
        self.sent = [0] * len(plan.steps)
        self._plan = plan
        self._held: Counter[tuple[str, str]] = Counter()
        self._now: Counter[str] = Counter()

    def add(self, kind: str, change: int, place: str) -> None:
        """Add bytes of a kind in a place."""
        self._held[place, kind] += change
        for meter in (kind, place):
            self._now[meter] += change
            self.peak[meter] = max(self.peak[meter], self._now[meter])

    def end_step(self) -> None:
        """Note what is held after a step."""
        self.after.append(Counter(self._held))

    def call(self, step: int, costs: Mapping[str, Cost]) -> None:
        """Run the model once, sublayer by sublayer; copies to and from host memory as in `broadcast/offload.py`."""
        plan, column = self._plan, step - self._plan.steps.start
        fetches: list[tuple[str, int]] = []  # by block, in the order in which they run
        for s in plan.sublayers:
            if plan.on_host(s.name) and plan.has_slot(s.name) and (reads := len(plan.rows[s.name][column].reads)):
                if not fetches or fetches[-1][0] != s.owner:
                    fetches.append((s.owner, 0))
                fetches[-1] = s.owner, fetches[-1][1] + reads * costs[s.name].slot_bytes
        nothing: tuple[str | None, int] = (None, 0)
        here = iter([*fetches, nothing])
        coming, present = next(here), nothing
        self.add(ON_ITS_WAY, coming[1], DEVICE)
        leaving: dict[str, int] = {}  # by block, of two at most
        for s in plan.sublayers:
            decision, cost, on_host = plan.rows[s.name][column], costs[s.name], plan.on_host(s.name)
            before = plan.rows[s.name][column - 1].held if column else 0
            has_slot = plan.has_slot(s.name)
            if on_host and has_slot and decision.reads and s.owner != present[0]:
                self.add(ON_ITS_WAY, -present[1], DEVICE)
                present, coming = coming, next(here)
                self.add(ON_ITS_WAY, coming[1], DEVICE)
            if has_slot and decision.held != before:
                self.add(s.kind, (decision.held - before) * cost.slot_bytes, HOST if on_host else DEVICE)
            if on_host and has_slot and decision.action is Action.STORE:
                if s.owner not in leaving and len(leaving) == 2:
                    self.add(ON_ITS_WAY, -leaving.pop(next(iter(leaving))), DEVICE)
                self.add(ON_ITS_WAY, cost.slot_bytes, DEVICE)
                leaving[s.owner] = leaving.get(s.owner, 0) + cost.slot_bytes
                self.sent[column] += cost.slot_bytes
            if s.name in plan.keeping:
                runs = plan.runs[s.name]
                self.add(TEXT, cost.kept_bytes * ((step == runs[0]) - (step == runs[-1])), DEVICE)
        self.fetched[column] += sum(count for _, count in fetches)
        self.add(ON_ITS_WAY, -self._now[ON_ITS_WAY], DEVICE)


def _held(plan: Plan, costs: Mapping[str, Cost], contexts: int, latents_bytes: int) -> _Held:
    held = _Held(plan)
    for step in plan.steps:
        for _ in range(contexts):
            held.call(step, costs)
        if plan.whole is not None:  # the scheduler's step comes after the model
            change = 2 * latents_bytes * (_predicts_from(plan, step) - _predicts_from(plan, step - 1))
            held.add(PREDICTIONS, change, DEVICE)
        held.end_step()
    return held


def flops_at(plan: Plan, costs: Mapping[str, Cost], name: str, step: int) -> int:
    """FLOPs of a sublayer at a step at which it runs: what it keeps for the generation is computed at the first one."""
    keeps = name in plan.keeping and step > plan.runs[name][0]
    return costs[name].flops - (costs[name].kept_flops if keeps else 0)


def _predicts_from(plan: Plan, step: int) -> int:
    """How many steps' guided outputs and samples are kept after a step, to predict those of later steps."""
    rule = plan.config.rule("model", 0)
    if plan.whole is None or rule is None or rule.reuse != "forecast" or step < plan.steps.start:
        return 0
    before, after = (
        plan.rows[plan.whole][: step + 1 - plan.steps.start],
        plan.rows[plan.whole][step + 1 - plan.steps.start :],
    )
    needed = before[-1].action is Action.REUSE or any(d.action is Action.REUSE for d in after)
    return min(2, sum(d.action in _RUN for d in before)) if needed else 0


def _moved(plan: Plan, column: int, costs: Mapping[str, Cost]) -> int:
    """Bytes that the reuses of one step move in one context."""
    total = added = 0
    block = None
    for sublayer in plan.sublayers:
        decision, cost = plan.rows[sublayer.name][column], costs[sublayer.name]
        owner = sublayer.block or sublayer.name.rpartition(".")[0]
        if decision.action in _RUN or owner != block:
            added, block = 0, owner
        if decision.action is not Action.REUSE or not plan.has_slot(sublayer.name):
            continue
        total += len(decision.reads) * cost.slot_bytes
        if sublayer.how != "fused":
            total += cost.output_bytes
            continue
        for _ in decision.reads:
            total += 2 * cost.output_bytes if added % MOST_ADDED == 0 else 0
            added += 1
    return total
