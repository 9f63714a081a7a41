"""FLOPs, outputs and memory of one call of a model on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...broadcast.between_blocks import Between
from ...broadcast.costs import CallCosts, watched, watched_kept
from ...broadcast.signature import tensors_of
from ...ops.flops import flop_counter
from ...rules.plan import Sublayer


@dataclass(frozen=True)
class Measured(CallCosts):
    """One call of a model.

    Args:
        activation_bytes: peak size of the call's tensors, inputs included, with attention that keeps no scores.
        weight_bytes: of parameters and buffers.
        output_bytes: of the first tensor that the model returns.
    """

    activation_bytes: int
    weight_bytes: int
    output_bytes: int


def measure(model: nn.Module, inputs: Mapping[str, Any], sublayers: Sequence[Sublayer]) -> Measured:
    """Call a model once without PAB.

    FLOPs are those of `ops.flop_counter()`. Memory is that of eager torch: every tensor from the operation that creates
    it until its last reference is gone. It does not include attention scores, which GPU kernels do not keep, and
    workspaces of kernels.

    Args:
        model: on the meta device; nothing is computed there.
        inputs: arguments of its `forward`, on the meta device.
        sublayers: of its adapter.

    Returns:
        FLOPs and memory of the call.

    Raises:
        RuntimeError: a sublayer did not run.
    """
    weights = {t.untyped_storage()._cdata: t.nbytes for t in (*model.parameters(), *model.buffers())}
    with torch.no_grad(), flop_counter() as counter, LiveBytes(weights) as live, AttentionWithoutScores(live):
        for tensor in tensors_of(inputs):
            live.add(tensor)
        with (
            watched(model, sublayers, counter) as runs,
            watched_kept(model, sublayers, counter) as kept,
            Between(model, sublayers) as between,
        ):
            out = tensors_of(model(**inputs))
            between.returned(out)
    if missing := [s.name for s in sublayers if s.name not in runs]:
        raise RuntimeError(f"{type(model).__name__}: {missing[0]} did not run in a call of the model")
    return Measured(
        counter.get_total_flops(), runs, kept, between.follows, live.peak, sum(weights.values()), out[0].nbytes
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors, and their peak.

    Args:
        ignored: `_cdata` of storages that are not counted: those of weights.
    """

    def __init__(self, ignored: Iterable[int] = ()) -> None:
        super().__init__()
        self._ignored = frozenset(ignored)
        self.now = self.peak = 0
        self.paused = False
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            for tensor in tensors_of(out):
                self.add(tensor)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's memory until its last reference is gone."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._ignored or key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._remove, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class AttentionWithoutScores(TorchFunctionMode):
    """Counts only the output of `F.scaled_dot_product_attention`, as for a kernel that keeps no scores."""

    def __init__(self, live: LiveBytes) -> None:
        super().__init__()
        self._live = live

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self._live.paused = True
        try:
            out = func(*args, **(kwargs or {}))
        finally:
            self._live.paused = False
        self._live.add(out)
        return out
