"""`BroadcastModule`: any attention module under a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..broadcast.config import KINDS
from ..broadcast.slots import Line, unpack
from ..broadcast.stopwatch import REST
from ..ops.quantize import Quantized

if TYPE_CHECKING:
    from ..broadcast.broadcaster import Broadcaster
    from ..broadcast.plan import Sublayer

_PREFIX = "module."


class BroadcastModule(nn.Module):
    """Wraps an attention module (or an MLP): computed as it is, or its last output given back, as the plan says.

    The output may be a tensor or any nest of tensors, and is kept whole. A linear reuse gives its floating-point tensors as
    `c + w (c - c_prev)`, in float32 (float64 where they are) and rounded once to their dtype; everything else is that of the newest
    output. Where it is used as `x + gate * module(...)`, the gate stays outside and fresh. `state_dict` has the names of the wrapped
    module. Without `enable`, it is the wrapped module.

    Args:
        module: what is wrapped.
        kind: "spatial", "temporal", "cross" or "mlp".
        layer: index of its block, for rules restricted to some layers.

    Raises:
        ValueError: the kind is not known.
    """

    def __init__(self, module: nn.Module, kind: str, layer: int = 0) -> None:
        super().__init__()
        if kind not in KINDS or kind == "block":
            raise ValueError(f"kind {kind!r} is not known; supported are 'spatial', 'temporal', 'cross', 'mlp'")
        self.module = module
        self.kind = kind
        self.layer = layer
        self._member: Membership | None = None
        self.register_state_dict_post_hook(_strip)
        self.register_load_state_dict_pre_hook(_restore)

    def join(self, broadcaster: Broadcaster, sublayer: Sublayer) -> Membership:
        """Follow `broadcaster` until the membership is detached."""
        self._member = Membership(self, broadcaster, sublayer)
        return self._member

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, computed or broadcast."""
        call = None if self._member is None else self._member.broadcaster.call
        if call is None or self._member is None:
            return self.module(*args, **kwargs)
        x = next((v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)), None)
        if x is None:
            raise TypeError(f"{self._member.sublayer.name}: no tensor among the inputs; a BroadcastModule needs at least one")
        turn = call.turn(self._member.sublayer, x)
        if turn.slot is not None:
            out = _extended(turn.slot) if isinstance(turn.slot, Line) else _handed_out(*turn.slot.value)
        else:
            out = self.module(*args, **kwargs)
            if turn.store is not None:
                turn.store.put(_kept(out))
        call.mark(REST)
        return out


class Membership:
    """A module's tie to the broadcaster of the model that it is in."""

    def __init__(self, module: BroadcastModule, broadcaster: Broadcaster, sublayer: Sublayer) -> None:
        self.module = module
        self.broadcaster = broadcaster
        self.sublayer = sublayer

    def __reduce__(self) -> Any:
        return (type(None), ())  # a copy of the model is a plain model

    def detach(self) -> None:
        """Be the wrapped module again."""
        if self.module._member is self:
            self.module._member = None


def _kept(out: Any) -> tuple[Any, list[torch.dtype | None]]:
    """What a slot keeps of an output: tensors of its own, as whoever gets the output may write to it, and their dtypes."""
    leaves, nest = pytree.tree_flatten(out)
    return pytree.tree_unflatten(list(map(_cloned, leaves)), nest), [v.dtype if isinstance(v, torch.Tensor) else None for v in leaves]


def _handed_out(kept: Any, dtypes: list[torch.dtype | None]) -> Any:
    """The output again, in tensors that may be written to."""
    leaves, nest = pytree.tree_flatten(kept)
    return pytree.tree_unflatten(list(map(_leaf, leaves, dtypes)), nest)


def _leaf(value: Any, dtype: torch.dtype | None) -> Any:
    return unpack(value, dtype) if dtype and isinstance(value, Quantized) else _cloned(value)


def _extended(line: Line) -> Any:
    """The output on the line through the two that were kept; the newest one where the other is another nest."""
    (newest, dtypes), (before, dtypes_before) = line.newest.value, line.before.value
    leaves, nest = pytree.tree_flatten(newest)
    leaves_before, nest_before = pytree.tree_flatten(before)
    if nest != nest_before:
        return _handed_out(newest, dtypes)

    def extended(c: Any, dtype: torch.dtype | None, c_prev: Any, dtype_prev: torch.dtype | None) -> Any:
        if dtype is None or not dtype.is_floating_point or dtype != dtype_prev or c.shape != c_prev.shape:
            return _leaf(c, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        c, c_prev = unpack(c, wide).to(wide), unpack(c_prev, wide).to(wide)
        return (c - line.weights[1] * (c - c_prev)).to(dtype)

    return pytree.tree_unflatten(list(map(extended, leaves, dtypes, leaves_before, dtypes_before)), nest)


def _cloned(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _strip(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    _rename(state, prefix + _PREFIX, prefix)


def _restore(module: nn.Module, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(state, dict)
    _rename(state, prefix, prefix + _PREFIX)


def _rename(state: dict[str, Any], prefix: str, other: str) -> None:
    """Names that start with `prefix` start with `other` instead; all are taken out first, as the wrapped module may have a `module` too."""
    state.update([(other + name[len(prefix) :], state.pop(name)) for name in [n for n in state if n.startswith(prefix)]])
