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
from collections.abc import Mapping

from ..limits import MOST_ADDED
from .costs import Cost, Forecast
from .plan import Action, Plan

TEXT, PREDICTIONS = "text", "predictions"
"""What is kept beside the slots of each kind: by sublayers for a generation, and to predict the model's output."""
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
    held, peak = _held(plan, costs, contexts, latents_bytes)
    by_kind = {kind: peak[kind] for kind in plan.kinds()}
    over_steps = {kind: tuple(after[kind] for after in held) for kind in (*by_kind, TEXT, PREDICTIONS) if peak[kind]}
    cache = [after["all"] for after in held]
    moved = contexts * sum(_moved(plan, i, costs) for i in columns)
    return Forecast(sum(flops), full, tuple(flops), tuple(cache), peak["all"], by_kind, over_steps, moved)


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
    peak = _held(plan, own, contexts, latents_bytes)[1]
    if not fixed:
        return peak["all"]
    places = sum(plan.outputs(name) * own[name].slot_bytes for name in plan.decided if plan.has_slot(name))
    return contexts * places + _held(plan, {name: Cost(0, 0) for name in own}, contexts, latents_bytes)[1]["all"]


def _held(
    plan: Plan, costs: Mapping[str, Cost], contexts: int, latents_bytes: int
) -> tuple[list[Counter[str]], Counter[str]]:
    """The bytes held after each step, and the most held at once, of each kind and of all."""
    kinds = {s.name: s.kind for s in plan.sublayers}
    held: Counter[str] = Counter()
    peak: Counter[str] = Counter()
    after = []

    def add(kind: str, change: int) -> None:
        for meter in (kind, "all"):
            held[meter] += change
            peak[meter] = max(peak[meter], held[meter])

    for step in plan.steps:
        for name in contexts * list(plan.rows):  # in the order in which they run
            before = plan.decision(name, step - 1).held if step > plan.steps.start else 0
            change = plan.decision(name, step).held - before
            if change and plan.has_slot(name):
                add(kinds[name], change * costs[name].slot_bytes)
            if name in plan.keeping:
                runs = plan.runs[name]
                add(TEXT, costs[name].kept_bytes * ((step == runs[0]) - (step == runs[-1])))
        if plan.whole is not None:  # the scheduler's step comes after the model
            add(PREDICTIONS, 2 * latents_bytes * (_predicts_from(plan, step) - _predicts_from(plan, step - 1)))
        after.append(Counter(held))
    return after, peak


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
