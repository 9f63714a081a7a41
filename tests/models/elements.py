"""Counting the elements of tensors that a computation makes, on any device."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


class Elements(TorchDispatchMode):
    """Counts elements of tensors that are made inside it: of the largest one, and of those that live at once.

    Weights and inputs are not counted.
    """

    def __init__(self, *known: Tensor | nn.Module) -> None:
        super().__init__()
        tensors = [t for k in known for t in (k.state_dict().values() if isinstance(k, nn.Module) else [k])]
        self.seen = {id(t.untyped_storage()): t.untyped_storage() for t in tensors}
        self.largest = self.peak = self._now = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self.seen:
            return
        elements = storage.nbytes() // tensor.element_size()
        self.seen[id(storage)] = None  # type: ignore[assignment]
        weakref.finalize(storage, self._released, id(storage), elements)
        self.largest = max(self.largest, elements)
        self._now += elements
        self.peak = max(self.peak, self._now)

    def _released(self, storage: int, elements: int) -> None:
        del self.seen[storage]
        self._now -= elements
