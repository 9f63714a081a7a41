"""Serves diffusers' `transformer.enable_cache(PyramidAttentionBroadcastConfig(...))` by this package."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import api, compat
from .broadcast.broadcaster import Broadcaster, broadcaster_of
from .broadcast.generation import Generation
from .broadcast.pipeline import denoisers
from .broadcast.slots import Slot
from .extras import require
from .rules.formats import from_diffusers

logger = logging.getLogger("pab_kernels")

_PATCH = "_pab_patch"


@dataclass
class _Patch:
    """The patched methods of diffusers' mixin, each with its original, and the models that are served."""

    methods: dict[str, tuple[Callable[..., None], Callable[..., None]]] = field(default_factory=dict)
    served: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)


def patch_diffusers() -> None:
    """Make `enable_cache(PyramidAttentionBroadcastConfig(...))` of diffusers' models use this package.

    `disable_cache`, `is_cache_enabled` and `cache_context` work with it; configs of other caches go to diffusers. The
    rules are those of `rules.formats.from_diffusers`, and `summary(model)` reports the run.

    The pipeline is looked up in `current_timestep_callback`: `lambda: pipe.current_timestep` refers to it, and its
    scheduler gives the plan. If it is not found, each step is decided when it begins, by the timestep of the callback:
    a step ends when a context is called again, and a generation at `_reset_stateful_cache` or when the timestep rises.

    Unlike in diffusers, branches of guidance that are called one by one share neither outputs nor counts, temporal
    attention has its own range, and an interrupted run leaves nothing for the next.

    Raises:
        ModuleNotFoundError: diffusers is not installed.

    >>> patch_diffusers()    # doctest: +SKIP
    >>> pipe.transformer.enable_cache(config)    # doctest: +SKIP
    >>> unpatch_diffusers()  # doctest: +SKIP
    """
    mixin = _mixin()
    if hasattr(mixin, _PATCH):
        return
    patch = _Patch()
    setattr(mixin, _PATCH, patch)
    for name, served in (("enable_cache", _enable), ("disable_cache", _disable)):
        original = vars(mixin)[name]
        patch.methods[name] = original, _before(original, served)
        setattr(mixin, name, patch.methods[name][1])


def unpatch_diffusers() -> None:
    """Undo `patch_diffusers`: disable PAB on the models it serves, and restore diffusers' `enable_cache`."""
    mixin = _mixin()
    patch = getattr(mixin, _PATCH, None)
    if patch is None:
        return
    for model in list(patch.served):
        _disable(patch, model)
    delattr(mixin, _PATCH)
    for name, (original, method) in patch.methods.items():
        if vars(mixin)[name] is method:  # otherwise it was wrapped since, and passes calls through
            setattr(mixin, name, original)


def _mixin() -> Any:
    require("diffusers", "patching it")
    from diffusers.models.cache_utils import CacheMixin

    return CacheMixin


def _before(original: Callable[..., None], served: Callable[..., bool]) -> Callable[..., None]:
    """A method that calls `original` unless the patch is active and `served` handles the call."""

    @functools.wraps(original)
    def method(model: Any, *args: Any, **kwargs: Any) -> None:
        patch = getattr(model, _PATCH, None)
        if patch is not None and model not in patch.served:
            _hide(model)  # a copy of a served model has its hooks
        if patch is None or not served(patch, model, *args, **kwargs):
            original(model, *args, **kwargs)

    return method


def _enable(patch: _Patch, model: Any, config: Any) -> bool:
    from diffusers import PyramidAttentionBroadcastConfig

    if model.is_cache_enabled or not isinstance(config, PyramidAttentionBroadcastConfig):
        return False
    callback = config.current_timestep_callback
    if callback is None:
        raise ValueError(
            "current_timestep_callback is missing; pass current_timestep_callback=lambda: pipe.current_timestep"
        )
    if broadcaster_of(model) is not None:
        raise ValueError(f"PAB is enabled on this {type(model).__name__} by pab.enable; pab.disable it first")
    sublayers = api.sublayers(model)
    rules = from_diffusers(config, sublayers)
    pipe = _pipe_of(callback, model)
    held = vars(pipe).values() if pipe is not None else ()
    compiled = next((m for m in held if compat.is_compiled(m, model)), model)
    with contextlib.ExitStack() as undo:
        api.enable_model(undo, model, pipe, rules, given=compiled)
        undo.pop_all()
    broadcaster = broadcaster_of(model)
    assert broadcaster is not None
    broadcaster.clock = callback
    for sublayer in sublayers:
        rule = rules.rule(sublayer.kind, sublayer.layer)
        if rule is not None and rule.window is not None:
            state = _State(broadcaster, sublayer.name)
            _show(model.get_submodule(sublayer.name), state, rule.window, rule.range or 1, callback)
    if pipe is None:
        name = type(model).__name__
        logger.info("%s: no pipeline in current_timestep_callback; each step is decided when it begins", name)
    compat.set_cache_config(model, config)
    patch.served.add(model)
    return True


def _disable(patch: _Patch, model: Any) -> bool:
    if model not in patch.served:
        return False
    patch.served.discard(model)
    api.disable(model)
    _hide(model)
    compat.set_cache_config(model, None)  # also if no module has a hook
    return True


def _pipe_of(callback: Callable[[], Any], model: nn.Module) -> Any:
    """The pipeline of `model` among the objects that `callback` refers to and their attributes, or None."""
    for thing in _named_in(callback):
        for candidate in (thing, *getattr(thing, "__dict__", {}).values()):
            if (
                not isinstance(candidate, nn.Module)
                and hasattr(candidate, "scheduler")
                and model in denoisers(candidate).values()
            ):
                return candidate
    return None


def _named_in(callback: Callable[[], Any]) -> Iterator[Any]:
    while isinstance(callback, functools.partial):
        yield from (*callback.args, *callback.keywords.values())
        callback = callback.func
    yield getattr(callback, "__self__", None)
    yield from getattr(callback, "__defaults__", None) or ()
    with contextlib.suppress(TypeError, ValueError):  # not a Python function, or an empty closure
        found = inspect.getclosurevars(callback)
        yield from (*found.nonlocals.values(), *found.globals.values())


# For code that reads diffusers' hooks


class _State:
    """Replaces the state of diffusers' hook on one module: its number of steps and its kept outputs.

    Args:
        broadcaster: of the model.
        name: of the module in it.
    """

    def __init__(self, broadcaster: Broadcaster, name: str) -> None:
        self._broadcaster = weakref.ref(broadcaster)
        self._name = name

    def _generation(self) -> Generation | None:
        broadcaster = self._broadcaster()
        generation = None if broadcaster is None else broadcaster.latest
        return None if generation is None or generation.put_away else generation

    @property
    def iteration(self) -> int:
        """Number of steps at which the running generation has called the model."""
        generation = self._generation()
        return 0 if generation is None else generation.taken

    @property
    def cache(self) -> tuple[Slot, ...] | None:
        """The module's kept outputs in all contexts; None before the first step."""
        generation = self._generation()
        if generation is None or not generation.taken:
            return None
        held = (context.arena.get(self._name) for context in generation.contexts.values())
        return tuple(slot for slot in held if slot is not None)


def _show(
    module: nn.Module, state: _State, window: tuple[float, float], reach: int, callback: Callable[[], Any]
) -> None:
    """Register a hook of diffusers with `state`. It is never called: the module's `forward` does not change."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook

    hook = PyramidAttentionBroadcastHook(window, reach, callback)
    hook.state = state
    HookRegistry.check_if_exists_or_initialize(module).hooks[compat.PAB_HOOK] = hook


def _hide(model: Any) -> None:
    """Remove the hooks that `_show` registered on modules of `model`, and the config."""
    shown = False
    for module in model.modules():
        hook = compat.diffusers_hooks(module).get(compat.PAB_HOOK)
        if isinstance(getattr(hook, "state", None), _State):
            shown = True
            compat.remove_hook(module, compat.PAB_HOOK)
    if shown:
        compat.forget_registries_of_children(model)
        compat.set_cache_config(model, None)
