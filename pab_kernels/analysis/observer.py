"""Observing the outputs of a model's sublayers while it samples without broadcasting."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..broadcast.adapter import Adapter
from ..broadcast.attach import Attached, attach_forward, take_off
from ..broadcast.broadcaster import ATTRIBUTE, Broadcaster
from ..broadcast.call import Call
from ..rules.config import PABConfig
from ..rules.plan import Sublayer


class Observer(ABC):
    """Takes the place of a model's adapter: its modules run unchanged, and `observe` gets their outputs.

    Args:
        model: the DiT.
        sublayers: whose outputs are observed; a sublayer named "" is the whole model.
        check: called before every sublayer; an exception that it raises ends the run.
    """

    cache_points = ("pre_gate",)

    def __init__(self, model: nn.Module, sublayers: Sequence[Sublayer], check: Callable[[], None] = lambda: None):
        self.sublayers = sublayers
        self._modules = [model.get_submodule(s.name) for s in sublayers]
        self._check = check

    @abstractmethod
    def observe(self, call: Call, sublayer: Sublayer, outputs: list[Tensor]) -> None:
        """Receives the floating-point tensors of an output, of a block those of the change that it made.

        The caller may write to them: what is kept must be copied.
        """

    def attach(self, broadcaster: Broadcaster, names: Collection[str]) -> Iterator[tuple[str, Attached]]:
        """Yield wrappers of every module's `forward` that observe."""
        for sublayer, module in zip(self.sublayers, self._modules, strict=True):
            yield sublayer.name, attach_forward(module, self._forward(broadcaster, sublayer))

    def _forward(self, broadcaster: Broadcaster, sublayer: Sublayer) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            call = broadcaster.call
            if call is None:
                return original(*args, **kwargs)
            self._check()
            streams = _tensors((args, kwargs)) if sublayer.kind == "block" else []
            before = {tuple(x.shape): x for x in reversed(streams)}
            # a block may write to its stream in place
            held = {shape: x.clone() for shape, x in before.items()}
            out = original(*args, **kwargs)
            tensors = _tensors(out)
            if sublayer.kind == "block":
                tensors = [t - held[tuple(t.shape)] for t in tensors if tuple(t.shape) in held]
            self.observe(call, sublayer, tensors)
            return out

        return forward


@contextlib.contextmanager
def observing(model: nn.Module, observer: Adapter, pipe: Any, num_steps: int | None) -> Iterator[Broadcaster]:
    """Attach an observer to a model while the block runs.

    Args:
        model: a DiT on which PAB is not enabled.
        observer: an `Observer` of it.
        pipe: the pipeline whose scheduler is followed, or None.
        num_steps: of the first generation of a bare module, or None.
    """
    broadcaster = Broadcaster(model, observer, PABConfig())
    try:
        setattr(model, ATTRIBUTE, broadcaster)
        broadcaster.attach()
        if pipe is None:
            broadcaster.prepare(num_steps=num_steps)
        else:
            broadcaster.watch(pipe)
        yield broadcaster
    finally:
        broadcaster.detach()
        take_off(model, ATTRIBUTE)


def _tensors(nest: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(nest) if isinstance(v, Tensor) and v.is_floating_point()]
