"""A generation's plan under a budget of bytes."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import compat
from ..rules.budget import FEWER_BITS, in_words
from ..rules.costs import Cost
from ..rules.within_budget import within
from .fusing import has_hooks
from .offload import moves_from, place_again
from .slots import CACHE_DTYPES
from .whole import shared

if TYPE_CHECKING:
    from .call import Call
    from .generation import Generation


class Budgeting:
    """Keeps the plan of one generation within the budget of its config.

    The first call of the model shows the shapes; the number of contexts is that of the generation before, or 1. A
    further context, or another shape, makes a plan that keeps less: what is held already is made smaller or released.

    Args:
        before: the generation before it, or None; if its seconds were measured, they say what a sublayer is worth.
        log: reports what a plan gives up.
    """

    def __init__(self, before: Generation | None, log: Callable[[str], None]) -> None:
        self._contexts = 1 if before is None else len(before.contexts)
        self._seconds = {} if before is None else _seconds_of(before)
        self._log = log
        self._seen: set[Any] = set()
        self._costs: dict[str | None, dict[str, Cost]] = {}
        self._follows: dict[str, str] | None = None
        self._latents_bytes = 0
        self._budget: int | None = None

    def split_spans(self) -> None:
        """See `Generation.split_spans`."""
        self._follows = {}
        self._seen.clear()

    def enter(self, call: Call, model: nn.Module, x: torch.Tensor) -> None:
        """Handle a call before anything of it runs.

        Args:
            call: that is open; it gets the new plan.
            model: that is called.
            x: the first tensor among its inputs.

        Raises:
            BudgetTooSmall: no plan that reuses an output fits.
            RuntimeError: the sizes of outputs are not known.
        """
        looks = (call.context.name, call.arguments)
        generation, before = call.generation, call.plan
        if not all(_is_plain(model, name) for name in before.spans):  # a hook came, or a block was compiled
            self.split_spans()
        if looks in self._seen or not (before.decided or before.whole):
            return
        found = generation.costs(model, {call.arguments})
        if found is None:
            raise RuntimeError(
                f"a budget needs the sizes of outputs, and those of {type(model).__name__} are not known, as "
                f"{generation.not_counted}; leave out the budget, or call the model with tensors and plain values"
            )
        (one,) = found.values()
        between_ranks = shared(model)
        if between_ranks is not None:
            one = between_ranks.part_of(one, call.shape)
        for dtype in {before.config.cache_dtype, FEWER_BITS}:
            costs, known = one.costs(dtype)[0], self._costs.setdefault(dtype, {})
            for name, cost in costs.items():
                other = known.get(name, cost)
                known[name] = replace(
                    cost,
                    slot_bytes=max(cost.slot_bytes, other.slot_bytes),
                    kept_bytes=max(cost.kept_bytes, other.kept_bytes),
                )
        follows = one.follows if self._follows is None else self._follows
        self._follows = {
            name: following
            for name, following in one.follows.items()
            if follows.get(name) == following and _is_plain(model, name) and _is_plain(model, following)
        }
        if generation.forecaster is not None:  # the sample may be in float32
            self._latents_bytes = max(self._latents_bytes, math.prod(call.shape) * max(4, x.itemsize))
        self._contexts = max(self._contexts, len(generation.contexts))
        if self._budget is None:
            self._budget = _bytes_of(before.config.budget, x.device, between_ranks)
        config = before.config
        if config.cache_device is not None and not moves_from(x.device):
            config = replace(config, cache_device=None)
        plan = within(
            replace(before, config=config, given_up=None),
            self._costs,
            self._budget,
            self._contexts,
            self._latents_bytes,
            generation.cuda_graphs,
            self._follows,
            self._seconds if between_ranks is None else {},  # the others measure something else
        )
        self._seen.add(looks)  # last, so that a call after an error is refused too
        if plan == before:
            return
        generation.plan = call.plan = plan
        given_up = plan.given_up
        if given_up is not None and (given_up.computed or given_up.fewer_bits or given_up.on_host):
            self._log(f"{type(model).__name__}: {in_words(plan)}")
        if generation.graphs is not None and before.given_up is not None:  # captured for the plan before
            generation.release()
            generation.graphs.clear()
            generation.graphs.take(generation)
        for context in generation.contexts.values():
            for place in context.arena.places_held():
                name = place.partition("#")[0]
                if name not in plan.decided or plan.spans.get(name) != before.spans.get(name):
                    context.arena.release(place)
                else:
                    place_again(context.arena, place, CACHE_DTYPES[plan.cache_dtype(name)], plan.on_host(name))


def _is_plain(model: nn.Module, name: str) -> bool:
    """Whether nothing runs around a block, and it is not compiled: its graphs would be more than one for all blocks."""
    module = model.get_submodule(name)
    return not has_hooks(module) and not compat.runs_compiled(module)


def _seconds_of(generation: Generation) -> dict[str, float]:
    """Seconds that a run of a sublayer took, by kind; empty if they were not measured."""
    seconds, runs = Counter[str](), Counter[str]()
    for context in generation.contexts.values() if generation.timed else ():
        for kind, tally in context.tallies().items():
            if tally.seconds is not None:
                seconds[kind] += tally.seconds  # type: ignore[assignment]
                runs[kind] += tally.computed
    return {kind: seconds[kind] / runs[kind] for kind in runs if runs[kind]}


def _bytes_of(budget: Any, device: torch.device, between_ranks: Any) -> int:
    """A budget in bytes, the same on all ranks that share the model."""
    if isinstance(budget, int):
        return budget
    found = int(budget * free_bytes(device))
    return found if between_ranks is None else between_ranks.least(found)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free, in bytes; on CUDA devices also what torch has reserved and does not use.

    Raises:
        ValueError: it is not known for this kind of device.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    raise ValueError(
        f"got a share of the free memory as budget, which is not known on {device.type} here; give a number of bytes, "
        "such as '8GiB'"
    )
