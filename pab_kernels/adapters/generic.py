"""Any DiT: its sublayers are found by what they are, and every module is called as it is or its last output given back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from ..broadcast.attach import Attached, attach_forward
from ..broadcast.broadcaster import Broadcaster
from ..broadcast.outputs import broadcast_change, broadcast_output
from ..broadcast.plan import Sublayer
from .finder import find

_TIMESTEPS = ("timestep", "timesteps", "t", "sigma", "sigmas")


class GenericAdapter:
    """Modules found by `find`, each under its `forward`.

    An attention or MLP gives its whole output back, before any gate that is outside of it; a block adds the change that it made.

    Args:
        model: any module.
        kinds: see `find`.

    Raises:
        TypeError: nothing was found.
        ValueError: `kinds` does not suit the model.
    """

    cache_points = ("pre_gate",)

    def __init__(self, model: nn.Module, kinds: Mapping[str, str | None] | None = None) -> None:
        self.sublayers = find(model, kinds)
        if not self.sublayers:
            raise TypeError(
                f"{type(model).__name__}: no attention was found in it, by projections of queries or by name; name its modules: "
                "enable(model, kinds={'blocks.*.attn': 'spatial'}), or wrap them in pab_kernels.nn.BroadcastModule"
            )
        modules = dict(model.named_modules())
        self._modules = [modules[s.name] for s in self.sublayers]
        parameters = list(inspect.signature(model.forward).parameters)
        self._timestep = next((name for name in _TIMESTEPS if name in parameters), None)
        self._place = parameters.index(self._timestep) if self._timestep else 0

    def attach(self, broadcaster: Broadcaster) -> Iterator[Attached]:
        """Replace the `forward` of every module that was found."""
        for sublayer, module in zip(self.sublayers, self._modules, strict=True):
            yield attach_forward(module, _forward(broadcaster, sublayer))

    def timestep(self, *args: Any, **kwargs: Any) -> Any:
        """The argument of the model's `forward` that is called `timestep`, `timesteps`, `t`, `sigma` or `sigmas`."""
        if self._timestep in kwargs:
            return kwargs[self._timestep]
        return args[self._place] if self._timestep is not None and self._place < len(args) else None


def _forward(broadcaster: Broadcaster, sublayer: Sublayer) -> Callable[..., Any]:
    """The stand-in for a module's `forward`; plain where the model is not called under PAB."""
    run = broadcast_change if sublayer.kind == "block" else broadcast_output

    def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = broadcaster.call
        return original(*args, **kwargs) if call is None else run(call, sublayer, original, args, kwargs)

    return forward
