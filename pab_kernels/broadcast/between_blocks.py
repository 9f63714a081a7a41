"""Finds out which blocks of a model follow one another directly, with nothing that sees the stream between them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..rules.plan import Sublayer
from .signature import tensors_of


class Between(TorchDispatchMode):
    """Watches the tensors that blocks return, during one call of a model inside `with`.

    A block follows another one if every tensor that the other returns is among its inputs, as the same object, and if
    no operation outside of the two, no other block and not the model's output has one of them.

    Args:
        model: that is called.
        sublayers: its sublayers.
    """

    def __init__(self, model: nn.Module, sublayers: Sequence[Sublayer]) -> None:
        super().__init__()
        self.follows = _on_streams(sublayers)
        """For blocks, the block that follows directly; for sublayers on a residual stream, the next one in it."""
        self._model = model
        self._blocks = [s.name for s in sublayers if s.kind == "block"]
        self._handles: list[Any] = []
        self._ran: set[str] = set()
        self._again: set[str] = set()
        self._inside: str | None = None
        self._last: str | None = None  # the last block, until something sees what it returned
        self._returned: dict[int, tuple[str, torch.Tensor]] = {}  # by id, which is theirs as long as they are held

    def __enter__(self) -> Between:
        for name in self._blocks:
            module = self._model.get_submodule(name)
            enter, leave = functools.partial(self._enter, name), functools.partial(self._leave, name)
            self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(leave))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._returned.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._returned:
            self._seen((args, kwargs))
        return func(*args, **(kwargs or {}))

    def returned(self, out: Any) -> None:
        """Handle the output of the model."""
        self._seen(out)
        for name, following in tuple(self.follows.items()):
            if not self._again.isdisjoint((name, following)):
                del self.follows[name]

    def _seen(self, nest: Any) -> None:
        """Handle tensors that the block inside which the model is, or something else, has."""
        for tensor in tensors_of(nest):
            block, _ = self._returned.get(id(tensor), (None, None))
            if block is not None and (self._inside is None or self.follows.get(block) != self._inside):
                self.follows.pop(block, None)
                self._last = None if block == self._last else self._last

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._inside is not None:
            return
        given = {id(tensor) for tensor in tensors_of((args, kwargs))}
        passed = {key for key, (block, _) in self._returned.items() if block == self._last}
        if self._last is not None and passed and passed <= given:
            self.follows[self._last] = name
        self._inside = name
        self._seen((args, kwargs))
        (self._again if name in self._ran else self._ran).add(name)

    def _leave(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        if self._inside == name:
            self._inside, self._last = None, name
            self._returned |= {id(tensor): (name, tensor) for tensor in tensors_of(out)}


def _on_streams(sublayers: Sequence[Sublayer]) -> dict[str, str]:
    fused = [s for s in sublayers if s.how == "fused" and s.kind != "block"]
    return {one.name: other.name for one, other in itertools.pairwise(fused) if one.block == other.block}
