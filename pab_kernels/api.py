"""Switching PAB on and off, and asking what it did: the functions of `import pab_kernels`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .adapters import adapter_for
from .broadcast.broadcaster import ATTRIBUTE, Broadcaster, broadcaster_of
from .broadcast.config import PABConfig
from .broadcast.generation import Generation
from .broadcast.plan import Sublayer
from .broadcast.presets import preset_for
from .broadcast.summary import Summary, summarise


def _resolve(model_or_pipe: Any) -> tuple[nn.Module, Any]:
    """The DiT, and the pipeline around it or None."""
    if isinstance(model_or_pipe, nn.Module):
        return getattr(model_or_pipe, "_orig_mod", model_or_pipe), None
    model = getattr(model_or_pipe, "transformer", None)
    scheduler = getattr(model_or_pipe, "scheduler", None)
    if isinstance(model, nn.Module) and hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step"):
        return getattr(model, "_orig_mod", model), model_or_pipe
    raise TypeError(
        f"got {type(model_or_pipe).__name__}; supported are a torch.nn.Module and a pipeline with a `transformer` and a `scheduler`: "
        "pass the DiT itself"
    )


def _enabled(model_or_pipe: Any) -> Broadcaster:
    model, _ = _resolve(model_or_pipe)
    broadcaster = broadcaster_of(model)
    if broadcaster is None:
        raise RuntimeError(f"PAB is not enabled on this {type(model).__name__}; call pab.enable first")
    return broadcaster


def enable(
    model_or_pipe: Any,
    config: PABConfig | None = None,
    *,
    num_steps: int | None = None,
    timesteps: Sequence[float] | None = None,
    timed: bool | None = None,
    cuda_graphs: bool | None = None,
    kinds: Mapping[str, str | None] | None = None,
) -> None:
    """Switch PAB on.

    On a pipeline, `set_timesteps` on the scheduler that it holds begins each generation. On a bare module `num_steps` or `timesteps` begins
    the first; `generation` begins every further one. On a model that is enabled already, `config` is taken from the next generation on, and
    a further pipeline that shares the model is followed too.

    Args:
        model_or_pipe: a diffusers pipeline, or a DiT.
        config: default the published preset of the model's class, else the ranges 2/4/6 in the middle of the schedule.
        num_steps: steps of a bare module's first generation.
        timesteps: its timesteps, where the config counts in them.
        timed: whether `summary` has seconds by kind, from the next generation on; default as before, at first not. Time is read off the
            host's clock, on CUDA devices off events in their stream, from a sublayer's turn to the next one or to the end of its block.
            Reused outputs are added where the stream is read next, and counted there. Compiled blocks are not timed.
        cuda_graphs: whether the model's calls are captured as CUDA graphs and replayed, from the next generation on; default as before, at
            first not. There is a graph for each pattern of the plan, context and shape of the inputs; docs/cuda_graphs.md has the rest.
        kinds: patterns of module names and the kind that these modules are taken for, or None to leave them alone, where `sublayers` shows
            that they were taken for something else. In a pattern `*` is any part of one component of a name, `**` any part of the whole.

    Raises:
        TypeError: no sublayers are found in the model.
        ValueError: the config or `kinds` do not suit the model, or the config the schedule; or `timed` does not suit `cuda_graphs`.
    """
    model, pipe = _resolve(model_or_pipe)
    if pipe is not None and (num_steps is not None or timesteps is not None):
        raise ValueError("a pipeline's scheduler gives the steps; leave num_steps and timesteps out, or pass the bare model")
    if config is not None and not isinstance(config, PABConfig):
        raise TypeError(f"config must be a PABConfig, got {type(config).__name__}; PABConfig.preset(name) gives a named one")
    broadcaster = broadcaster_of(model)
    if broadcaster is not None and kinds is not None:
        raise ValueError(f"PAB is enabled on this {type(model).__name__} already, with its kinds; pab.disable it first to give others")
    chosen = config
    if chosen is None:
        known = pipe is not None or timesteps is not None
        chosen = broadcaster.config if broadcaster else preset_for(model, timesteps_known=known)
    adapter = broadcaster.adapter if broadcaster else adapter_for(model, kinds)
    if chosen.cache_point not in adapter.cache_points:
        if config is not None:
            supported = ", ".join(map(repr, adapter.cache_points))
            raise ValueError(f"cache_point {chosen.cache_point!r} does not suit {type(model).__name__}; supported are {supported}")
        chosen = dataclasses.replace(chosen, cache_point="pre_gate")  # published for an adapter that knows the gates
    before = None if broadcaster is None else (broadcaster.config, broadcaster.timed, broadcaster.cuda_graphs)
    timed = (before is not None and before[1]) if timed is None else timed
    cuda_graphs = (before is not None and before[2]) if cuda_graphs is None else cuda_graphs
    if timed and cuda_graphs:
        raise ValueError(
            "timed measures between sublayers, and a CUDA graph runs as a whole; supported is one of them: leave the other out"
        )
    if broadcaster is None:
        broadcaster = Broadcaster(model, adapter, chosen)
        setattr(model, ATTRIBUTE, broadcaster)
    broadcaster.configure(chosen, timed, cuda_graphs)
    try:
        if pipe is not None:
            broadcaster.watch(pipe)
        if num_steps is not None or timesteps is not None:
            broadcaster.prepare(num_steps=num_steps, timesteps=timesteps)
    except BaseException:
        if before is None:
            disable(model)
        else:
            broadcaster.configure(*before)
        raise


def disable(model_or_pipe: Any) -> None:
    """Switch PAB off: the model, and the schedulers that were followed, are what they were. Does nothing where PAB is not enabled."""
    model, _ = _resolve(model_or_pipe)
    broadcaster = broadcaster_of(model)
    if broadcaster is not None:
        broadcaster.detach()
        delattr(model, ATTRIBUTE)


@contextlib.contextmanager
def generation(model: Any, *, num_steps: int | None = None, timesteps: Sequence[float] | None = None) -> Iterator[Generation]:
    """A further generation on a bare module: the calls of the model inside belong to it, and its slots are let go at the end.

    Args:
        model: a DiT on which PAB is enabled.
        num_steps: steps of the schedule.
        timesteps: its timesteps, where the config counts in them.

    Raises:
        RuntimeError: PAB is not enabled.
        ValueError: neither is given.
    """
    broadcaster = _enabled(model)
    begun = broadcaster.begin(num_steps=num_steps, timesteps=timesteps)
    try:
        yield begun
    finally:
        broadcaster.end(begun)


@contextlib.contextmanager
def context(model: Any, name: str, step: int | None = None) -> Iterator[None]:
    """Name the context of the calls inside, such as "cond" and "uncond" where a pipeline calls the model once for each.

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
    with _enabled(model).context(name, step):
        yield


def sublayers(model: Any, kinds: Mapping[str, str | None] | None = None) -> list[Sublayer]:
    """The sublayers that PAB sees in a model: module name, kind, how they are run and, where they were found, by what.

    Args:
        model: a DiT, or its pipeline.
        kinds: as in `enable`, to see what it would change; not for a model that is enabled.

    Raises:
        TypeError: no sublayers are found in the model.
        ValueError: `kinds` does not suit the model, or it is enabled already.
    """
    module, _ = _resolve(model)
    broadcaster = broadcaster_of(module)
    if broadcaster is not None and kinds is not None:
        raise ValueError(f"PAB is enabled on this {type(module).__name__} already, with its kinds; pab.disable it first to see others")
    return list((broadcaster.adapter if broadcaster else adapter_for(module, kinds)).sublayers)


def summary(model_or_pipe: Any) -> Summary:
    """What was computed, reused and stored in the generation begun last; bytes; FLOPs; seconds, for which it waits for the device.

    FLOPs are counted here: a copy of the model as it is now, without PAB, runs once on the meta device for every set of shapes that the
    model was called with. Where it cannot run there, as its code reads values of tensors, they are not known, and 0.

    Raises:
        RuntimeError: PAB is not enabled.
    """
    broadcaster = _enabled(model_or_pipe)
    return summarise(broadcaster.latest, _resolve(model_or_pipe)[0])
