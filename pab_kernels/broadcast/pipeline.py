"""Pipelines: the models that they call at each step, and the end of a run."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from ..compat import is_compiled, uncompiled
from .attach import PREFIX, Attached, leave_out_of_copies, take_off

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")
"""Names of the attributes with models that a pipeline may call at the steps of its scheduler."""

_WATCH = f"{PREFIX}watch"
"""Name of the attribute that holds the watch while PAB is enabled on a pipeline."""


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The models that a pipeline calls at the steps of its scheduler, by name, without `torch.compile`'s wrapper."""
    held = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: uncompiled(model) for name, model in held.items() if isinstance(model, nn.Module)}


def other_schedulers(pipe: Any) -> list[str]:
    """Names of the schedulers that a pipeline holds beside `scheduler`, such as one for audio."""
    held = {name: part for name, part in vars(pipe).items() if part is not pipe.scheduler}
    return [name for name, part in held.items() if hasattr(part, "set_timesteps") and hasattr(part, "step")]


def holds(pipe: Any, model: nn.Module) -> bool:
    """Whether a pipeline calls `model` or a wrapper around it."""
    return any(model is m for held in denoisers(pipe).values() for m in held.modules())


def compiled(pipe: Any, model: nn.Module) -> nn.Module | None:
    """The result of `torch.compile(model)` that a pipeline holds, or None."""
    held = (getattr(pipe, name, None) for name in DENOISERS)
    return next((m for m in held if is_compiled(m, model)), None)


def left_at(pipe: Any, model: nn.Module) -> int:
    """The number of steps of a pipeline's schedule after which it no longer calls `model`.

    A pipeline with a `boundary_ratio` (Wan 2.2) calls `transformer` at timesteps of at least
    `boundary_ratio * num_train_timesteps`, and `transformer_2` below; any other model is called to the end.
    """
    timesteps, models = pipe.scheduler.timesteps, denoisers(pipe)
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    if ratio is None or "transformer_2" not in models or models.get("transformer") is not model:
        return len(timesteps)
    own = (timesteps >= ratio * pipe.scheduler.config.num_train_timesteps).tolist()
    return len(own) - [*reversed(own)].index(True) if any(own) else 0


class PipeListener(Protocol):
    """Receives the events of pipelines."""

    def pipe_failed(self, pipe: Any) -> None:
        """Handle an error in the loop over the steps."""

    def pipe_ended(self, pipe: Any) -> None:
        """Handle the end of a run."""


class PipeWatch:
    """Reports the end of a pipeline's runs to the broadcasters of its models.

    It sees the end of a run of diffusers' pipelines, when they free the hooks of offloaded models, and an error inside
    the progress bar.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = weakref.ref(pipe)
        self._listeners: dict[int, tuple[weakref.ref[nn.Module], weakref.ref[Any]]] = {}
        methods = {"progress_bar": self._progress_bar, "maybe_free_model_hooks": self._free}
        self._attached = [
            Attached(pipe, name, to) for name, to in methods.items() if callable(getattr(pipe, name, None))
        ]

    @classmethod
    def of(cls, pipe: Any) -> PipeWatch | None:
        """The watch of a pipeline, or None."""
        watch = getattr(pipe, "__dict__", {}).get(_WATCH)
        # A copy of the pipeline may hold the watch of the original.
        return watch if isinstance(watch, cls) and watch.pipe() is pipe else None

    @classmethod
    def add(cls, pipe: Any, model: nn.Module, listener: PipeListener) -> None:
        """Report the ends of runs of `pipe` to `listener`, the broadcaster of `model`."""
        watch = cls.of(pipe)
        if watch is None:
            watch = cls(pipe)
            vars(pipe)[_WATCH] = watch
            leave_out_of_copies(pipe)
            for attached in watch._attached:
                attached.attach()
        watch._listeners[id(model)] = weakref.ref(model), weakref.ref(listener)

    @classmethod
    def remove(cls, pipe: Any, model: int) -> None:
        """Remove a model by its `id`; the pipeline is restored when the last one is removed."""
        watch = cls.of(pipe)
        if watch is None:
            return
        watch._listeners.pop(model, None)
        if not watch.models():
            for attached in watch._attached:
                attached.detach()
            take_off(pipe, _WATCH)

    def models(self) -> list[nn.Module]:
        """The models that are alive."""
        return [model for ref, _ in self._listeners.values() if (model := ref()) is not None]

    def _receivers(self) -> list[PipeListener]:
        return [listener for _, ref in tuple(self._listeners.values()) if (listener := ref()) is not None]

    def failed(self) -> None:
        """Report an error in a run."""
        for listener in self._receivers():
            listener.pipe_failed(self.pipe())

    def _free(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        for listener in self._receivers():
            listener.pipe_ended(self.pipe())
        return result

    def _progress_bar(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        return _Bar(original(*args, **kwargs), self)


class _Bar:
    """A progress bar that reports an error inside the loop over the steps."""

    def __init__(self, bar: Any, watch: PipeWatch) -> None:
        self._bar, self._watch = bar, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def __enter__(self) -> Any:
        return self._bar.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        if kind is not None:
            self._watch.failed()
        return self._bar.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._bar)

    def __iter__(self) -> Iterator[Any]:
        whole = False
        try:
            yield from self._bar
            whole = True
        finally:
            if not whole:
                self._watch.failed()
