"""Deciding which of several generations a call of the model belongs to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from .generation import Generation, label_of
from .inputs import Inputs
from .request import begun_here


def whose(
    candidates: Sequence[Generation], name: str | None, inputs: Inputs, holders: Callable[[Generation], Sequence[Any]]
) -> Generation | None:
    """The generation among `candidates` that a call belongs to; None if it belongs to none of them.

    If several remain, they are narrowed down by, in this order:

    1. the timestep: a call belongs to a generation only if it is at the generation's next timestep
    2. the steady tensors: a generation is recognised by the prompt, masks, ... of its last call
    3. before its first call, a generation belongs to the thread or task that began it
    4. the function that calls the model: it holds the generation's pipeline or scheduler

    Args:
        candidates: generations that are not over.
        name: of the call's context, or None.
        inputs: of the call.
        holders: returns the pipelines and the scheduler of a generation.

    Raises:
        RuntimeError: more than one remains.
    """
    label = label_of(name)
    claims = {id(g): g.claims(inputs.timestep, label) for g in candidates}
    left = [g for g in candidates if claims[id(g)] is not False]
    if len(left) > 1:
        left = [g for g in left if claims[id(g)]] or left
    if len(left) > 1 and all(g.contexts for g in left):
        left = [g for g in left if g.recognises(label, inputs)] or left
    if len(left) > 1:
        begun = list(begun_here())
        left = [g for g in left if not g.contexts and any(g is other for other in begun)] or left
    if len(left) < 2:
        return left[0] if left else None
    held = _held_by_caller()
    found = [g for g in left if any(value is holder for value in held for holder in holders(g))]
    if len(found) == 1:
        return found[0]
    steps = ", ".join(str(g.step) for g in left)
    raise RuntimeError(
        f"{len(left)} sampling runs on this model go on (at steps {steps}), and nothing shows which one this call "
        "belongs to; begin one request for each run, request = pab.generation(model, num_steps=...), and call the "
        "model inside `with request:`. If a run was abandoned, call pab.release(pipe)"
    )


def _held_by_caller() -> list[Any]:
    """The local variables of the function that calls the model, and the attributes of its `self`."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    if frame is None or frame.f_locals is frame.f_globals:
        return []
    held = list(frame.f_locals.values())
    return held + list(getattr(frame.f_locals.get("self"), "__dict__", {}).values())


_BETWEEN = (__name__.partition(".")[0], "torch", "accelerate", "peft")
"""Packages whose frames are skipped between that function and the model."""
