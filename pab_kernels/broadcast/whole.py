"""The whole model under the rule of its kind: it runs, or an output that it gave before is returned and nothing of it
runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from ..rules.plan import Action
from ..rules.traffic import Sent, Traffic
from .attach import PREFIX
from .call import Call
from .costs import CallCosts
from .offload import offloading
from .outputs import kept, read
from .signature import tensors_of
from .slots import Key

PARALLEL = f"{PREFIX}parallel"
"""Name of the attribute that holds the `Shared` of a model."""


class Shared(Protocol):
    """A model that several ranks share; see `pab_kernels.parallel`."""

    def agree(self, call: Call) -> None:
        """Handle a call under PAB, before anything of it runs; every rank must be about to do the same."""

    def least(self, number: int) -> int:
        """The least of the numbers that the ranks give."""

    def part_of(self, costs: CallCosts, latents: Sequence[int]) -> CallCosts:
        """What one rank keeps of a call, from the costs of the whole call and the shape of its latents."""

    def taken(self) -> Sequence[Sent]:
        """What was sent by each place that sends, and is not counted yet."""

    def give(self, sent: Sequence[Sent]) -> None:
        """Count what was sent by each place."""

    def traffic(self, generation: Any) -> Traffic | None:
        """What this rank sent in a generation; None if a later one has begun."""


def shared(model: nn.Module) -> Shared | None:
    """What shares a model between ranks; None if it is not shared."""
    return vars(model).get(PARALLEL)


def broadcast_model(model: nn.Module | None, call: Call, x: torch.Tensor | None, compute: Callable[[], Any]) -> Any:
    """The output of a call of the model, computed or returned again as the plan says.

    Args:
        model: that is called.
        call: that is open.
        x: the first tensor among its inputs, by which a slot is known; without one the model is computed.
        compute: runs the model and finishes the call.
    """
    if call.generation.budgeting is not None and model is not None and x is not None:
        with call.generation.lock:
            call.generation.budgeting.enter(call, model, x)
    between_ranks = None if model is None else shared(model)
    if between_ranks is not None:
        between_ranks.agree(call)
    if call.plan.config.cache_device is not None and model is not None and x is not None:
        compute = offloading(call, model, compute)
    name, generation = call.plan.whole, call.generation
    if name is None or x is None:
        return compute()
    decision, arena, tally = call.plan.decision(name, call.step), call.context.outputs, call.context.tally("model")
    slot = call.read(name, decision) if decision.action is Action.REUSE else None
    # The guided output is of one kind: where one branch was computed at this step, the others are too.
    mixed = generation.forecaster is not None and generation.skips is False
    # What is predicted is given to the scheduler's step: where nobody calls it, or it steps one output of several, the
    # model has to run.
    unseen = generation.forecaster is not None and (generation.steps_seen == 0 or generation.several_outputs)
    reuses = slot is not None and slot.key.matches(x) and not mixed and not unseen
    if generation.skips is None:
        generation.skips = reuses
    stores = not reuses and decision.action in (Action.STORE, Action.REUSE) and decision.held > 0
    arena.release(name, decision.held - stores)
    if slot is not None and reuses:
        tally.reused += 1
        call.reused.append(name)
        out = read(slot, last=not decision.held)
        call.finish()
        return out
    out = compute()
    generation.several_outputs |= len([t for t in tensors_of(out) if t.is_floating_point()]) > 1
    tally.computed += 1
    tally.forced += decision.action is Action.REUSE
    if stores:
        tally.stored += 1
        own = out.dtype if isinstance(out, torch.Tensor) else None
        arena.put(name, "model", kept(out), Key.of(x), call.step, own, decision.held)
    return out
