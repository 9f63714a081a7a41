"""Plans that fit a budget of bytes for kept outputs."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from .budget import BudgetTooSmall, GivenUp
from .costs import Cost
from .forecast import peak_bytes
from .plan import Action, Plan


def within(
    plan: Plan,
    costs: Mapping[str | None, Mapping[str, Cost]],
    budget: int,
    contexts: int = 1,
    latents_bytes: int = 0,
    fixed: bool = False,
    follows: Mapping[str, str] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> Plan:
    """The plan, or one that keeps less of it, whose slots fit a budget.

    It is a function of its arguments alone. A sublayer is worth the FLOPs that its reuses save over the generation, or
    the seconds where they are known, divided by the bytes that it holds:

        1. If all slots fit as they are, the plan stays as it is.
        2. Else blocks in a row that are reused at the same steps share a slot, and so do sublayers in a row on the
           stream of a block if slots include the gate: before it, each reuse has another gate.
        3. If that is too much and `cache_device` is "cpu", slots are moved to host memory, as few as are needed: those
           that are copied least often first.
        4. If that is too much, the slots of the sublayers worth least are kept in 8 bits, of as few as are needed.
        5. If all slots in 8 bits are too many, the sublayers worth least are computed at every step, as few as are
           needed; in what is then left free, the slots of those worth most are kept in their own dtype again, and on
           the device.

    With a block, those in it are computed too. The whole model's own outputs and predictions are always kept.

    Args:
        plan: without a budget.
        costs: of each sublayer in one call, by cache dtype: that of the plan's config, and 8 bits if that is None.
        budget: the most bytes held at once, over all contexts.
        contexts: calls of the model in a step.
        latents_bytes: see `Plan.forecast`.
        fixed: whether a slot's memory is kept for the whole generation, as in CUDA graphs.
        follows: for blocks, the block that gets their output unchanged and unseen by anything else; for sublayers on a
            residual stream, the next one in the block.
        seconds: of one run of a sublayer, by kind, as measured; used if all kinds that are reused are there.

    Raises:
        BudgetTooSmall: no plan that reuses an output fits.
    """
    as_it_is = replace(plan, given_up=GivenUp(budget, 0))
    whole_peak = peak_bytes(as_it_is, costs, contexts, latents_bytes, fixed)
    if whole_peak <= budget:
        return replace(plan, given_up=GivenUp(budget, whole_peak))
    follows = follows or {}
    order = _least_worth_first(plan, costs, _spans(plan, follows, ()), seconds or {})
    smaller = order if plan.config.cache_dtype is None else []
    movable = [] if plan.config.cache_device is None else _least_copied_first(plan, order)

    def given_up(fewer_bits: Sequence[str], computed: Sequence[str], on_host: Sequence[str] = movable) -> GivenUp:
        inside = [s.name for s in plan.sublayers if s.block in computed and s.name not in computed]
        spans = _spans(plan, follows, (*computed, *inside))
        without_slot = {name for span in spans for name in span[:-1]}.union(computed, inside)
        fewer, moved = (tuple(name for name in names if name not in without_slot) for names in (fewer_bits, on_host))
        found = GivenUp(budget, 0, (*computed, *inside), fewer, spans, moved)
        peak = peak_bytes(replace(plan, given_up=found), costs, contexts, latents_bytes, fixed)
        return replace(found, peak=peak)

    def nothing_reused(computed: Sequence[str]) -> bool:
        return set(order) <= set(given_up([], computed).computed)

    def fewest(given_up_of: Callable[[int], GivenUp], most: int) -> int:
        """The smallest n that fits; `most` if no smaller one does."""
        return bisect.bisect_left(range(most), True, key=lambda n: given_up_of(n).peak <= budget)

    computed: list[str] = []
    if given_up(smaller, []).peak > budget:
        computed = order[: fewest(lambda n: given_up(smaller, order[:n]), len(order))]
        whole = plan.whole is not None and any(decision.reads for decision in plan.rows[plan.whole])
        if nothing_reused(computed) and (not whole or given_up([], order).peak > budget):
            tried = [order[:n] for n in range(len(order))]
            tried = [order] if whole else [names for names in tried if not nothing_reused(names)]
            peaks = {given_up(smaller, names).peak: names for names in reversed(tried)}
            least = min(peaks)
            if least > budget:
                raise BudgetTooSmall(budget, least, contexts)
            computed = peaks[least]  # it was missed: a block computed in the middle of a span makes two of it
    gone = given_up([], computed).computed
    kept = [name for name in order if name not in gone] if smaller else []
    fewer_bits = kept[: fewest(lambda n: given_up(kept[:n], computed), len(kept))]
    moved = movable[: fewest(lambda n: given_up(fewer_bits, computed, movable[:n]), len(movable))]
    return replace(plan, given_up=given_up(fewer_bits, computed, moved))


def _spans(plan: Plan, follows: Mapping[str, str], computed: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The longest rows of blocks, and of sublayers in a block, that may share a slot."""
    if plan.fitted is not None:  # each may have weights of its own
        return ()
    gated = plan.config.cache_point == "post_gate"
    reused = [s for s in plan.sublayers if s.name in plan.decided and (gated or s.kind == "block")]
    rules = {s.name: plan.config.rule(s.kind, s.layer) for s in reused if s.name not in computed}
    alike = {name: (plan.rows[name], rule.reuse) for name, rule in rules.items() if rule is not None}
    then = {name: follows[name] for name in alike if name in follows and alike.get(follows[name]) == alike[name]}
    found = []
    for first in (name for name in then if name not in then.values()):
        span = [first]
        while span[-1] in then:
            span.append(then[span[-1]])
        found.append(tuple(span))
    return tuple(found)


def _least_worth_first(
    plan: Plan,
    costs: Mapping[str | None, Mapping[str, Cost]],
    spans: Sequence[tuple[str, ...]],
    seconds: Mapping[str, float],
) -> list[str]:
    """The sublayers that are reused, by what is saved over bytes held; those that share a slot count together."""
    sharing = {name: span for span in spans for name in span}
    own = costs[plan.config.cache_dtype]
    measured = all(s.kind in seconds for s in plan.sublayers if s.name in plan.decided)
    takes = {s.name: seconds.get(s.kind, 0.0) if measured else own[s.name].flops for s in plan.sublayers}
    inside: dict[str, float] = dict.fromkeys(takes, 0)
    for s in plan.sublayers:
        if s.block in inside:
            inside[s.block] += takes[s.name]
    worth = {}
    for s in plan.sublayers:
        row, together = plan.rows[s.name], sharing.get(s.name, (s.name,))
        reused = sum(bool(decision.reads) for decision in row)
        held = max(decision.held for decision in row) * own[together[-1]].slot_bytes
        if reused and s.kind != "model":
            worth[s.name] = reused * sum(takes[name] + inside[name] for name in together) / max(1, held)
    return sorted(worth, key=lambda name: worth[name])


def _least_copied_first(plan: Plan, names: Sequence[str]) -> list[str]:
    """Sublayers by the number of outputs that are copied over the generation, to host memory and back."""

    def copies(name: str) -> int:
        return sum(len(decision.reads) + (decision.action is Action.STORE) for decision in plan.rows[name])

    return sorted(names, key=copies)
