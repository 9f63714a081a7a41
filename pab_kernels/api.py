"""The functions of `import pab_kernels`: enable and disable PAB, begin generations, report what was done."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from .adapters import adapter_for
from .broadcast.attach import take_off
from .broadcast.broadcaster import ATTRIBUTE, Broadcaster, broadcaster_of
from .broadcast.names import Naming
from .broadcast.pipeline import PipeWatch, denoisers, other_schedulers
from .broadcast.request import Request
from .broadcast.summary import Summary, together
from .compat import uncompiled
from .rules.config import CacheDevice, PABConfig
from .rules.plan import Sublayer
from .rules.presets import default_preset, presets

logger = logging.getLogger("pab_kernels")

T = TypeVar("T")


def _resolve(model_or_pipe: Any) -> tuple[dict[str, nn.Module], Any]:
    """The DiTs by their names in the pipeline, and the pipeline; for a bare module {"": module} and None."""
    if isinstance(model_or_pipe, nn.Module):
        return {"": uncompiled(model_or_pipe)}, None
    models = denoisers(model_or_pipe)
    scheduler = getattr(model_or_pipe, "scheduler", None)
    if models and hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step"):
        return models, model_or_pipe
    raise TypeError(
        f"got {type(model_or_pipe).__name__}; supported are a torch.nn.Module and a pipeline with a `transformer` or a "
        "`unet`, and a `scheduler`: pass the denoiser itself"
    )


def _all_models(model_or_pipe: Any) -> list[nn.Module]:
    """The current DiTs, and those that the pipeline held when PAB was enabled on it."""
    watch = None if isinstance(model_or_pipe, nn.Module) else PipeWatch.of(model_or_pipe)
    known = [] if watch is None else watch.models()
    models = known if known and not denoisers(model_or_pipe) else [*_resolve(model_or_pipe)[0].values(), *known]
    return list({id(model): model for model in models}.values())


def _enabled(model_or_pipe: Any) -> dict[str, Broadcaster]:
    models, _ = _resolve(model_or_pipe)
    found = {name: broadcaster for name, model in models.items() if (broadcaster := broadcaster_of(model)) is not None}
    if not found:  # the pipeline may hold another model since
        found = {
            type(m).__name__: broadcaster
            for m in _all_models(model_or_pipe)
            if (broadcaster := broadcaster_of(m)) is not None
        }
    if not found:
        raise RuntimeError(
            f"PAB is not enabled on this {type(next(iter(models.values()))).__name__}; call pab.enable first"
        )
    return found


def enable(
    model_or_pipe: T,
    config: PABConfig | None = None,
    *,
    num_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    timed: bool | None = None,
    cuda_graphs: bool | None = None,
    kinds: Mapping[str, str | None] | None = None,
    budget: int | float | str | None = None,
    cache_device: CacheDevice | None = None,
) -> T:
    """Enable PAB on a pipeline or a model.

    On a pipeline, each call of its scheduler's `set_timesteps` begins a generation. On a bare module, `num_steps` or
    `timesteps` begins the first generation and `generation` begins each later one. If PAB is already enabled on the
    model, the new `config` applies from the next generation, and a further pipeline that shares the model is followed
    too.

    If a pipeline has a second model (Wan 2.2's `transformer_2`), PAB is enabled on both. Each has a plan over its own
    steps: windows are fractions of the full schedule, ranges count from the model's first step, and no output passes
    from one model to the other.

    Args:
        model_or_pipe: a diffusers pipeline, or a DiT.
        config: the rules; default the preset "balanced", which skips the whole model at every second step in the middle
            of the schedule and predicts its output, or "balanced-line" on a bare module and on a pipeline with several
            schedulers. They are not calibrated for the model. Below 12 steps, and for schedulers that forecasts refuse,
            presets leave the model alone, which is logged.
        num_steps: number of steps of a bare module's first generation.
        timesteps: the timesteps of that generation, needed if the config counts in timesteps.
        timed: whether `summary` reports seconds by kind, from the next generation on; default unchanged, initially
            False. A sublayer's time runs from its turn to the next turn or to the end of its block, by the host's
            clock, or by events in the stream on CUDA devices. A reused output is added, and its addition timed, where
            the stream is read next. Compiled blocks are not timed.
        cuda_graphs: whether calls of the model are captured as CUDA graphs and replayed, from the next generation on;
            default unchanged, initially False. There is one graph for each pattern of the plan, context and shape of
            the inputs; see docs/cuda_graphs.md.
        kinds: corrects modules that `sublayers` shows as misclassified: maps a pattern of module names to their kind,
            or to None to leave them alone. In a pattern, `*` matches within one component of a name, `**` matches
            anything.
        budget: the most bytes that a generation keeps on the device, in place of that of the config: a number, "8GiB",
            or a share of the memory that is free at the model's first call, 0.5 or "50%". What does not fit is kept in
            8 bits or computed, which is logged and shown by `summary`; see docs/memory.md. Default unchanged,
            initially no limit.
        cache_device: "cpu" keeps outputs in pinned host memory, in place of what the config says; with a budget as few
            as needed. They are copied there behind the model and back ahead of it. Default unchanged, initially on the
            model's device.

    Returns:
        `model_or_pipe`.

    Raises:
        TypeError: `model_or_pipe` is neither a module nor a supported pipeline, `config` is no PABConfig, or the model
            has no recognisable sublayers.
        ValueError: the config does not suit the model or the schedule, `kinds` does not suit the model, or
            `cuda_graphs` is set together with `timed` or `cache_device`.
    """
    models, pipe = _resolve(model_or_pipe)
    if pipe is not None and (num_steps is not None or timesteps is not None):
        raise ValueError(
            "got num_steps or timesteps with a pipeline, whose scheduler sets the steps; leave them out, or pass the "
            "bare model"
        )
    if config is not None and not isinstance(config, PABConfig):
        raise TypeError(
            f"config must be a PABConfig, got {type(config).__name__}; PABConfig.preset(name) gives a named one"
        )
    with contextlib.ExitStack() as undo:
        for name, model in models.items():
            given: Any = model_or_pipe if pipe is None else getattr(pipe, name)
            schedule = num_steps, timesteps
            enable_model(undo, model, pipe, config, *schedule, timed, cuda_graphs, kinds, given, budget, cache_device)
        undo.pop_all()
    return model_or_pipe


def enable_model(
    undo: contextlib.ExitStack,
    model: nn.Module,
    pipe: Any,
    config: PABConfig | None,
    num_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    timed: bool | None = None,
    cuda_graphs: bool | None = None,
    kinds: Mapping[str, str | None] | None = None,
    given: nn.Module | None = None,
    budget: int | float | str | None = None,
    cache_device: CacheDevice | None = None,
) -> None:
    """Enable PAB on one model; see `enable`.

    Args:
        undo: receives the callbacks that undo it.
        model: the DiT.
        pipe: the pipeline that holds it, or None.
        config, num_steps, timesteps, timed, cuda_graphs, kinds: as in `enable`.
        given: the compiled module around the model, if there is one; default the model.
        budget, cache_device: as in `enable`.

    Raises:
        TypeError, ValueError: as in `enable`.
    """
    broadcaster = broadcaster_of(model)
    if broadcaster is not None and kinds is not None:
        raise ValueError(
            f"PAB is enabled on this {type(model).__name__} already, with its kinds; call pab.disable first to change "
            "them"
        )
    kept: dict[str, Any] = {
        name: v for name, v in (("budget", budget), ("cache_device", cache_device)) if v is not None
    }
    if broadcaster is not None and broadcaster.clock is not None and (config is not None or cuda_graphs or kept):
        raise ValueError(
            f"PAB is enabled on this {type(model).__name__} by enable_cache, which sets its rules and excludes CUDA "
            "graphs, budgets and host memory; call disable_cache first"
        )
    if config is not None:
        chosen, own = config, all(config is not named for named in presets().values())
    elif broadcaster is not None and not broadcaster.default:
        chosen, own = broadcaster.config, broadcaster.chosen
    else:
        preset = default_preset(follows_scheduler=True)
        followed = broadcaster is not None and preset.storing(broadcaster.config) == preset
        chosen, own = default_preset(followed if pipe is None else not other_schedulers(pipe)), False
    if config is None and broadcaster is not None:
        chosen = broadcaster.config.storing(chosen)
    chosen = replace(chosen, **kept)
    default = config is None and (broadcaster is None or broadcaster.default)
    whole = chosen.rule("model", 0)
    if pipe is not None and whole is not None and whole.reuse == "forecast" and (others := other_schedulers(pipe)):
        raise ValueError(
            f"reuse='forecast' predicts what one scheduler's `step` gets, and {type(pipe).__name__} also has "
            f"{', '.join(others)}; use reuse='linear' or 'hold'"
        )
    adapter = broadcaster.adapter if broadcaster else adapter_for(model, kinds)
    if chosen.cache_point not in adapter.cache_points:
        supported = ", ".join(map(repr, adapter.cache_points))
        raise ValueError(
            f"cache_point {chosen.cache_point!r} does not suit {type(model).__name__}; supported are {supported}"
        )
    if chosen.fitted is not None:
        chosen.fitted.check_names(adapter.sublayers, type(model).__name__)
    timed = (broadcaster is not None and broadcaster.timed) if timed is None else timed
    cuda_graphs = (broadcaster is not None and broadcaster.cuda_graphs) if cuda_graphs is None else cuda_graphs
    if timed and cuda_graphs:
        raise ValueError(
            "got timed=True and cuda_graphs=True; only one of them is supported, as a CUDA graph runs as a whole and "
            "timed measures between sublayers: leave the other out"
        )
    if cuda_graphs and chosen.cache_device is not None:
        raise ValueError(
            f"got cuda_graphs=True and cache_device={chosen.cache_device!r}; only one of them is supported, as a CUDA "
            "graph reads outputs where they were when it was captured: leave the other out, or give a budget"
        )
    if broadcaster is None:
        broadcaster = Broadcaster(model, adapter, chosen)
        undo.callback(disable, model)
        setattr(model, ATTRIBUTE, broadcaster)
        broadcaster.attach()
    else:
        before = (broadcaster.config, broadcaster.timed, broadcaster.cuda_graphs, broadcaster.chosen)
        undo.callback(broadcaster.configure, *before, broadcaster.default)
        if pipe is not None and not broadcaster.watches(pipe):
            undo.callback(broadcaster.unwatch, pipe)
    if given is not None and given is not model:
        broadcaster.enclose(given)
    broadcaster.configure(chosen, timed, cuda_graphs, own, default)
    if pipe is not None:
        broadcaster.watch(pipe)
    if num_steps is not None or timesteps is not None:
        broadcaster.prepare(num_steps=num_steps, timesteps=timesteps)


def disable(model_or_pipe: Any) -> None:
    """Disable PAB: the model and the followed schedulers are exactly what they were.

    Does nothing if PAB is not enabled. If the pipeline holds another model by now, PAB is also disabled on the one it
    was enabled on.

    Args:
        model_or_pipe: what was passed to `enable`.
    """
    for model in _all_models(model_or_pipe):
        broadcaster = broadcaster_of(model)
        if broadcaster is not None:
            broadcaster.detach()
            take_off(model, ATTRIBUTE)


def release(model_or_pipe: Any) -> None:
    """Release everything that is kept for a model, in all threads and for all requests.

    PAB stays enabled. Every generation ends; a run that goes on starts a new plan at its next step, which computes.

    Args:
        model_or_pipe: a DiT, or its pipeline.

    Raises:
        RuntimeError: PAB is not enabled.
    """
    for broadcaster in _enabled(model_or_pipe).values():
        broadcaster.release()


def generation(model: Any, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> Request:
    """Begin a generation on a bare module.

    Calls of the model inside `with request:` belong to it. The block can be left and entered again between steps, in
    any thread or task, so one model can serve several requests:

        a, b = (pab.generation(model, num_steps=30) for _ in range(2))
        for t in timesteps:
            for request, x in ((a, x_a), (b, x_b)):
                with request:
                    ...

    Its slots are released after its last step, by `request.close()`, or when the request is garbage collected.

    Args:
        model: a DiT on which PAB is enabled.
        num_steps: number of steps of the schedule.
        timesteps: its timesteps, needed if the config counts in timesteps.

    Returns:
        The request.

    Raises:
        RuntimeError: PAB is not enabled.
        ValueError: neither `num_steps` nor `timesteps` is given, or `model` is a pipeline with several models.
    """
    enabled = _enabled(model)
    if len(enabled) > 1:
        raise ValueError(
            f"got a pipeline with several models; supported is one model, and this pipeline has {', '.join(enabled)}; "
            "pass one of them"
        )
    (broadcaster,) = enabled.values()
    return broadcaster.begin(num_steps=num_steps, timesteps=timesteps)


def context(model: Any, name: str, step: int | None = None) -> contextlib.AbstractContextManager[None]:
    """Name the context of the calls inside `with`, such as "cond" or "uncond" for the branches of guidance.

    Args:
        model: a DiT, or its pipeline, on which PAB is enabled.
        name: name of the context; each context has its own slots.
        step: step of the full schedule, if it does not follow from the order of the calls.

    Returns:
        A context manager.

    Raises:
        RuntimeError: PAB is not enabled.
        ValueError: `name` is empty or no string, or `step` is not a non-negative integer.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a context needs a name, got {name!r}")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ValueError(
            f"step must be a whole number from 0, got {step!r}; leave it out if the order of the calls gives it"
        )
    return Naming(list(_enabled(model).values()), name, step)


def sublayers(model: Any, kinds: Mapping[str, str | None] | None = None) -> list[Sublayer]:
    """List the sublayers that PAB finds in a model.

    Args:
        model: a DiT, or its pipeline; if the pipeline has several models, the first one is used.
        kinds: as in `enable`, to preview its effect; only if PAB is not enabled yet.

    Returns:
        For each sublayer its module name, kind, how it is run and why it was classified so.

    Raises:
        TypeError: the model has no recognisable sublayers.
        ValueError: `kinds` does not suit the model, or PAB is enabled already.
    """
    module = next(iter(_resolve(model)[0].values()))
    broadcaster = broadcaster_of(module)
    if broadcaster is not None and kinds is not None:
        raise ValueError(
            f"PAB is enabled on this {type(module).__name__} already, with its kinds; call pab.disable first to "
            "preview others"
        )
    return list((broadcaster.adapter if broadcaster else adapter_for(module, kinds)).sublayers)


def summary(model_or_pipe: Any) -> Summary:
    """Summarise the latest generation: what was computed, stored, reused and forced; bytes, FLOPs and seconds.

    FLOPs are counted now: a copy of the current model without PAB runs once on the meta device for each set of shapes
    that the model was called with. If it cannot run there, because its code reads values of tensors, they are reported
    as 0. If seconds were measured, this waits for the device.

    Args:
        model_or_pipe: a DiT, its pipeline, or the request of one generation.

    Returns:
        The summary. `cache_bytes` counts the slots of all generations. For a pipeline with several models the figures
        are sums, with one summary for each model under `models`; for a request they are those of its generation.

    Raises:
        RuntimeError: PAB is not enabled.
    """
    if isinstance(model_or_pipe, Request):
        return model_or_pipe.summary()
    return together({name: broadcaster.summary() for name, broadcaster in _enabled(model_or_pipe).items()})
