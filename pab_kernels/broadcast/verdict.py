"""The texts of warnings: why a run reused nothing, why a call runs plainly, and what to do."""

from __future__ import annotations

from ..rules.plan import Plan
from .generation import Generation


def nothing_reused(generation: Generation) -> str | None:
    """Why a generation with planned reuses probably reused nothing, and what to do; None for any other generation."""
    tallies = [t for context in generation.contexts.values() for t in context.tallies().values()]
    if generation.failed or not generation.reuses_planned or any(t.reused for t in tallies):
        return None
    if generation.forecaster is not None and generation.steps_seen == 0:
        return (
            "nobody called its scheduler's step, in which outputs are predicted: the loop steps by itself or with a "
            'copy of the scheduler; use reuse="linear", or the preset balanced-line'
        )
    if generation.forecaster is not None and generation.several_outputs:
        return (
            "the model returns several tensors, such as video and audio, and its scheduler's step, where outputs are "
            'predicted, is given one of them; use reuse="linear", or the preset balanced-line'
        )
    if generation.exchanged:
        name, times = generation.exchanged.most_common(1)[0]
        return (
            f"the argument {name} was another tensor {times} times, which shows another prompt; pass the same tensor "
            "at every step, and if branches of guidance are called one by one, name them: "
            'with pab.context(model, "cond"):'
        )
    if not any(t.forced for t in tallies):
        return (
            "the sublayers were not reached: the forward of the blocks was replaced, or a step cache skipped them; "
            "call pab.enable after everything that changes the model"
        )
    if len(generation.contexts) > 2 and all(sum(c.calls.values()) == 1 for c in generation.contexts.values()):
        return (
            "every call was in a different context; give all calls of a branch the same name: "
            'with pab.context(model, "cond"):'
        )
    return (
        "no kept output fitted a later step: shapes, dtypes, flags or the order of the calls changed from step to "
        'step; name the calls of each branch: with pab.context(model, "cond"):'
    )


NOT_CALLED = (
    "its scheduler stepped and the model was not called under PAB: the pipeline calls another model, or a forward that "
    "does not lead to this one; call pab.enable(pipe) again"
)

COMPILED_LAST = (
    "a model under PAB is called from a compiled graph: after compiled = torch.compile(model) call "
    "pab.enable(compiled) or give it to the pipeline and enable that, or compile it by model.compile()"
)
NOT_BEGUN = (
    "no generation has begun",
    "call it inside `with pab.generation(model, num_steps=...):`, or give num_steps to pab.enable; on a pipeline pass "
    "the pipeline to pab.enable",
)
"""For a plain call of a bare model: why, and what to do."""

NOT_FOLLOWED = (
    "no sampling run that is followed has begun or has steps left",
    "a pipeline that shares the model and was not enabled, or that has a copy of the scheduler, is not followed: "
    "pab.enable every pipeline that calls the model",
)
"""For a plain call while pipelines are followed: why, and what to do."""

NOT_ENTERED = (
    "the step at which its run enters the schedule is not known, as the scheduler has no step index and the timestep "
    "of the first call is not in the schedule; step 0 is assumed. In image-to-image, windows then begin too late: "
    "call scheduler.set_begin_index"
)
"""For a run whose first step is assumed to be 0."""


def in_a_line(plan: Plan) -> str:
    """How often a plan reuses what."""
    reused = [f"{kind} reused {counts.reused} of {len(plan.steps)}" for kind, counts in plan.step_counts().items()]
    return f"a generation of {plan.schedule.num_steps} steps, {plan.patterns} patterns; {', '.join(reused)}"
