"""Switching PAB on and off, and asking what it did: the functions of `import pab_kernels`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from .adapters import adapter_for
from .broadcast.attach import take_off
from .broadcast.broadcaster import ATTRIBUTE, Broadcaster, broadcaster_of
from .broadcast.names import Naming
from .broadcast.pipeline import PipeWatch, denoisers
from .broadcast.request import Request
from .broadcast.summary import Summary, together
from .compat import uncompiled
from .rules.config import PABConfig
from .rules.plan import Sublayer
from .rules.presets import preset_for, preset_name, presets

logger = logging.getLogger("pab_kernels")

T = TypeVar("T")


def _resolve(model_or_pipe: Any) -> tuple[dict[str, nn.Module], Any]:
    """The DiTs by their names in the pipeline around them, and that or None."""
    if isinstance(model_or_pipe, nn.Module):
        return {"": uncompiled(model_or_pipe)}, None
    models = denoisers(model_or_pipe)
    scheduler = getattr(model_or_pipe, "scheduler", None)
    if models and hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step"):
        return models, model_or_pipe
    raise TypeError(
        f"got {type(model_or_pipe).__name__}; supported are a torch.nn.Module and a pipeline with a `transformer` or a "
        "`unet`, and a "
        "`scheduler`: pass the denoiser itself"
    )


def _all_models(model_or_pipe: Any) -> list[nn.Module]:
    """The DiTs, and those that a pipeline held when PAB was enabled on it."""
    watch = None if isinstance(model_or_pipe, nn.Module) else PipeWatch.of(model_or_pipe)
    known = [] if watch is None else watch.models()
    models = known if known and not denoisers(model_or_pipe) else [*_resolve(model_or_pipe)[0].values(), *known]
    return list({id(model): model for model in models}.values())


def _enabled(model_or_pipe: Any) -> dict[str, Broadcaster]:
    models, _ = _resolve(model_or_pipe)
    found = {name: broadcaster for name, model in models.items() if (broadcaster := broadcaster_of(model)) is not None}
    if not found:  # another model may have been put in place of the one that was enabled
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
) -> T:
    """Switch PAB on.

    On a pipeline, `set_timesteps` on the scheduler that it holds begins each generation. On a bare module `num_steps`
    or `timesteps` begins the first; `generation` begins every further one. On a model that is enabled already, `config`
    is taken from the next generation on, and a further pipeline that shares the model is followed too.

    Where a pipeline has a second model (Wan 2.2's `transformer_2`), both are switched on. Each has a plan over its own
    steps: windows are fractions of the full schedule, ranges count from the model's first step, and nothing is handed
    from one to the other.

    Args:
        model_or_pipe: a diffusers pipeline, or a DiT.
        config: default the published preset of the model's class, else the ranges 2/4/6 in the middle of the schedule.
        num_steps: steps of a bare module's first generation.
        timesteps: its timesteps, where the config counts in them.
        timed: whether `summary` has seconds by kind, from the next generation on; default as before, at first not. Time
            is read off the host's clock, on CUDA devices off events in their stream, from a sublayer's turn to the next
            one or to the end of its block. Reused outputs are added where the stream is read next, and counted there.
            Compiled blocks are not timed.
        cuda_graphs: whether the model's calls are captured as CUDA graphs and replayed, from the next generation on;
            default as before, at first not. There is a graph for each pattern of the plan, context and shape of the
            inputs; docs/cuda_graphs.md has the rest.
        kinds: patterns of module names and the kind that these modules are taken for, or None to leave them alone,
            where `sublayers` shows that they were taken for something else. In a pattern `*` is any part of one
            component of a name, `**` any part of the whole.

    Returns:
        What it was given.

    Raises:
        TypeError: no sublayers are found in the model.
        ValueError: the config or `kinds` do not suit the model, or the config the schedule; or `timed` does not suit
        `cuda_graphs`.
    """
    models, pipe = _resolve(model_or_pipe)
    if pipe is not None and (num_steps is not None or timesteps is not None):
        raise ValueError(
            "a pipeline's scheduler gives the steps; leave num_steps and timesteps out, or pass the bare model"
        )
    if config is not None and not isinstance(config, PABConfig):
        raise TypeError(
            f"config must be a PABConfig, got {type(config).__name__}; PABConfig.preset(name) gives a named one"
        )
    with contextlib.ExitStack() as undo:
        for name, model in models.items():
            given: Any = model_or_pipe if pipe is None else getattr(pipe, name)
            enable_model(undo, model, pipe, config, num_steps, timesteps, timed, cuda_graphs, kinds, given)
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
) -> None:
    """Switch PAB on for one model (see `enable`).

    Args:
        undo: takes what undoes it.
        given: the model, or what `torch.compile` made of it; default the model.
    """
    broadcaster = broadcaster_of(model)
    if broadcaster is not None and kinds is not None:
        raise ValueError(
            f"PAB is enabled on this {type(model).__name__} already, with its kinds; pab.disable it first to give "
            "others"
        )
    if broadcaster is not None and broadcaster.clock is not None and (config is not None or cuda_graphs):
        raise ValueError(
            f"PAB is enabled on this {type(model).__name__} by enable_cache, whose rules it has, without CUDA graphs; "
            "call its disable_cache first"
        )
    chosen = config
    if chosen is None:
        known = pipe is not None or timesteps is not None
        chosen = broadcaster.config if broadcaster else preset_for(model, timesteps_known=known)
    adapter = broadcaster.adapter if broadcaster else adapter_for(model, kinds)
    if chosen.cache_point not in adapter.cache_points:
        if config is not None:
            supported = ", ".join(map(repr, adapter.cache_points))
            raise ValueError(
                f"cache_point {chosen.cache_point!r} does not suit {type(model).__name__}; supported are {supported}"
            )
        logger.warning(
            "%s: its preset %r keeps outputs at cache_point %r, which is not supported for this model; they are kept "
            "at 'pre_gate' "
            "instead, and results differ from the published ones",
            type(model).__name__,
            preset_name(model, timesteps_known=True),
            chosen.cache_point,
        )
        chosen = dataclasses.replace(chosen, cache_point="pre_gate")
    before = None if broadcaster is None else (broadcaster.config, broadcaster.timed, broadcaster.cuda_graphs)
    timed = (before is not None and before[1]) if timed is None else timed
    cuda_graphs = (before is not None and before[2]) if cuda_graphs is None else cuda_graphs
    if timed and cuda_graphs:
        raise ValueError(
            "timed measures between sublayers, and a CUDA graph runs as a whole; supported is one of them: leave the "
            "other out"
        )
    if broadcaster is None:
        broadcaster = Broadcaster(model, adapter, chosen)
        undo.callback(disable, model)
    else:
        assert before is not None
        undo.callback(broadcaster.configure, *before)
        if pipe is not None and not broadcaster.watches(pipe):
            undo.callback(broadcaster.unwatch, pipe)
    if before is None:
        setattr(model, ATTRIBUTE, broadcaster)
        broadcaster.attach()
    if given is not None and given is not model:
        broadcaster.enclose(given)
    broadcaster.configure(chosen, timed, cuda_graphs, config is not None and config not in presets().values())
    if pipe is not None:
        broadcaster.watch(pipe)
    if num_steps is not None or timesteps is not None:
        broadcaster.prepare(num_steps=num_steps, timesteps=timesteps)


def disable(model_or_pipe: Any) -> None:
    """Switch PAB off: the model, and the schedulers that were followed, are what they were. Does nothing where PAB is
    not enabled.

    Of a pipeline that holds another model by now, PAB is switched off on the one that it was enabled on too.
    """
    for model in _all_models(model_or_pipe):
        broadcaster = broadcaster_of(model)
        if broadcaster is not None:
            broadcaster.detach()
            take_off(model, ATTRIBUTE)


def release(model_or_pipe: Any) -> None:
    """Release everything that is kept for a model, in all threads and for all requests, at once.

    PAB stays enabled. Every generation ends; a run that goes on computes at its next step, and its plan begins anew
    there.

    Raises:
        RuntimeError: PAB is not enabled.
    """
    for broadcaster in _enabled(model_or_pipe).values():
        broadcaster.release()


def generation(model: Any, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> Request:
    """Begin a further generation on a bare module; calls of the model inside `with` belong to it.

    The request that is returned can be put down and taken up between steps, in any thread or task, so that one model
    serves several:

        a, b = (pab.generation(model, num_steps=30) for _ in range(2))
        for t in timesteps:
            for request, x in ((a, x_a), (b, x_b)):
                with request:
                    ...

    What it keeps is released after its last step, by `close`, or when nobody holds the request any more.

    Args:
        model: a DiT on which PAB is enabled.
        num_steps: steps of the schedule.
        timesteps: its timesteps, where the config counts in them.

    Raises:
        RuntimeError: PAB is not enabled.
        ValueError: neither is given, or `model` is a pipeline with several.
    """
    enabled = _enabled(model)
    if len(enabled) > 1:
        raise ValueError(
            f"a generation of a bare module is one model's, and this pipeline has {', '.join(enabled)}; pass one of "
            "them"
        )
    (broadcaster,) = enabled.values()
    return broadcaster.begin(num_steps=num_steps, timesteps=timesteps)


def context(model: Any, name: str, step: int | None = None) -> contextlib.AbstractContextManager[None]:
    """Name the context of the calls inside `with`, such as "cond" and "uncond" where a pipeline calls the model once
    for each.

    Args:
        model: a DiT, or its pipeline, on which PAB is enabled.
        name: of the context; each has its own slots.
        step: of the full schedule, where a bare module's calls do not tell it.

    Raises:
        RuntimeError: PAB is not enabled.
        ValueError: the name is empty, or the step is no whole number.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a context needs a name, got {name!r}")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise ValueError(f"step must be a whole number from 0, got {step!r}; leave it out where the calls tell it")
    return Naming(list(_enabled(model).values()), name, step)


def sublayers(model: Any, kinds: Mapping[str, str | None] | None = None) -> list[Sublayer]:
    """The sublayers that PAB sees in a model: module name, kind, how they are run and, where they were found, by what.

    Args:
        model: a DiT, or its pipeline; of several models the first is meant.
        kinds: as in `enable`, to see what it would change; not for a model that is enabled.

    Raises:
        TypeError: no sublayers are found in the model.
        ValueError: `kinds` does not suit the model, or it is enabled already.
    """
    module = next(iter(_resolve(model)[0].values()))
    broadcaster = broadcaster_of(module)
    if broadcaster is not None and kinds is not None:
        raise ValueError(
            f"PAB is enabled on this {type(module).__name__} already, with its kinds; pab.disable it first to see "
            "others"
        )
    return list((broadcaster.adapter if broadcaster else adapter_for(module, kinds)).sublayers)


def summary(model_or_pipe: Any) -> Summary:
    """What was computed, reused and stored in the generation begun last; bytes; FLOPs; seconds, for which it waits for
    the device.

    Bytes held now are those of all generations. Of a pipeline with several models it has the sums, and each model's own
    under `models`. Of a request, which `generation` gives, it has what that did.

    FLOPs are counted here: a copy of the model as it is now, without PAB, runs once on the meta device for every set of
    shapes that the model was called with. Where it cannot run there, as its code reads values of tensors, they are not
    known, and 0.

    Raises:
        RuntimeError: PAB is not enabled.
    """
    if isinstance(model_or_pipe, Request):
        return model_or_pipe.summary()
    return together({name: broadcaster.summary() for name, broadcaster in _enabled(model_or_pipe).items()})
