"""Why a run reused nothing, why a call runs plainly, and what to do: the texts of warnings."""

from __future__ import annotations

from .generation import Generation


def nothing_reused(generation: Generation) -> str | None:
    """The likely cause why a generation reused nothing although its plan had reuses, and what to do.

    None where that is not so.
    """
    tallies = [t for context in generation.contexts.values() for t in context.tallies().values()]
    if generation.failed or not generation.reuses_planned or any(t.reused for t in tallies):
        return None
    if generation.exchanged:
        name, times = generation.exchanged.most_common(1)[0]
        return (
            f"the argument {name} was another tensor {times} times, which shows another prompt; pass the same tensor "
            "at every step, and "
            'where branches of guidance are called one by one name them: with pab.context(model, "cond"):'
        )
    if not any(t.forced for t in tallies):
        return (
            "the sublayers were not reached: another forward was put in place of those of the blocks, or a step cache "
            "skipped them; call "
            "pab.enable after whatever changes the model"
        )
    if len(generation.contexts) > 2 and all(sum(c.calls.values()) == 1 for c in generation.contexts.values()):
        return (
            'every call was in a context of its own; name the calls of a branch alike: with pab.context(model, "cond"):'
        )
    return (
        "what was kept was never what a step reads: shapes, dtypes, flags or the order of the calls changed from step "
        "to step; name the "
        'calls of each branch: with pab.context(model, "cond"):'
    )


NOT_CALLED = (
    "its scheduler stepped and the model was not called under PAB: the pipeline calls another model, or a forward that "
    "does not lead to "
    "this one; call pab.enable(pipe) again"
)

NOT_BEGUN = (
    "no generation has begun",
    "call it inside `with pab.generation(model, num_steps=...):`, or give num_steps to pab.enable; on a pipeline pass "
    "the pipeline to "
    "pab.enable",
)
"""Of a call on a bare model."""

NOT_FOLLOWED = (
    "no sampling run that is followed has begun or has steps left",
    "the scheduler that runs is not the one that is followed where a pipeline that shares the model was not enabled, "
    "or has a copy of the "
    "scheduler: pab.enable every pipeline that calls the model",
)
"""Of a call where pipelines are followed."""

NOT_ENTERED = (
    "where its run enters the schedule is not known, as the scheduler has no step index and the timestep of the first "
    "call is none of the "
    "schedule's; it is taken to be the first step. In image-to-image, windows then lie too early: call "
    "scheduler.set_begin_index"
)
